"""A container engine for the tests where no image registry is reachable: Debian's podman, driven by Docker Compose.

Its programs are unpacked by docker/install_test_programs.sh. They run in a mount namespace of their own, laid over
/usr, so that nothing is installed. Base images are stand-ins with the real ones' names: Debian with its Python for
python:3.12-slim, and the programs of the `embedded` extra for NATS and etcd.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
PROGRAMS = BIN.parent / "containers"
ROOT = Path(__file__).parents[2]
BASE = "docker.io/library/python:3.12-slim"
_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates,wget"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# Podman's own defaults would raise the limit of open files, which not every machine lets root do.
_CONFIG = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=32768:32768"]
init_path = "/usr/bin/catatonit"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
_STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{folder}/graph"
runroot = "{folder}/run"
"""
# Podman 4.3 does not know hybrid cgroups.
_ENTER = """\
set -e
mountpoint -q /sys/fs/cgroup/unified && umount /sys/fs/cgroup/unified
mount -t overlay -o lowerdir={programs}/usr:/usr overlay /usr
mkdir -p /etc/containers
mount -t tmpfs containers /etc/containers
cp {folder}/etc/* /etc/containers
touch {folder}/entered
exec sleep infinity
"""


def why_not() -> str:
    """Why no container can run here; nothing if one can."""
    if os.geteuid() != 0:
        return "containers need root here"
    if not (PROGRAMS / "usr/bin/podman").exists():
        return "no container engine: docker/install_test_programs.sh unpacks one"
    laid_over = ["mount", "-t", "overlay", "-o", f"lowerdir={PROGRAMS}/usr:/usr", "overlay", "/usr"]
    enter = ["unshare", "-m", "--propagation", "private", *laid_over]
    tried = subprocess.run(enter, capture_output=True, text=True, check=False)
    return tried.stderr.strip()


class Engine:
    """Podman with its storage in a folder. Its health checks are run by a thread: podman's own need systemd."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.socket = f"unix://{folder}/podman.sock"
        self._stopping = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        etc = self.folder / "etc"
        etc.mkdir(parents=True)
        (etc / "containers.conf").write_text(_CONFIG.format(folder=self.folder))
        (etc / "storage.conf").write_text(_STORAGE.format(folder=self.folder))
        (etc / "registries.conf").write_text("unqualified-search-registries = []\n")
        (etc / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        (self.folder / "tmp").mkdir()
        script = _ENTER.format(programs=PROGRAMS, folder=self.folder)
        enter = ["unshare", "-m", "--propagation", "private", "sh", "-c", script]
        keeper = subprocess.Popen(enter)
        service = None
        checks = threading.Thread(target=self._check_health, daemon=True)
        try:
            _wait(lambda: (self.folder / "entered").exists(), 20, "a mount namespace")
            self._enter = ["nsenter", "-m", "-t", str(keeper.pid), "--wd=/"]
            command = [*self._enter, "podman", "system", "service", "--time=0", self.socket]
            with (self.folder / "log").open("wb") as log:
                service = subprocess.Popen(command, env=self._environment(), stderr=log, start_new_session=True)
            _wait(lambda: Path(self.socket.removeprefix("unix://")).exists(), 20, "podman's socket")
            checks.start()
            yield
        finally:
            self._stopping.set()
            if checks.is_alive():
                checks.join()
            if service is not None:
                with suppress(subprocess.SubprocessError):
                    self.run("podman", "rm", "--all", "--force", "--time=0")
                    self.run("podman", "network", "prune", "--force")
                os.killpg(service.pid, signal.SIGTERM)
                service.wait()
            keeper.kill()
            keeper.wait()

    def run(self, *command: str | Path, seconds: float = 600) -> str:
        """Output of a command beside the engine. Raises CalledProcessError."""
        return _run([*self._enter, *map(str, command)], self._environment(), seconds)

    def compose(self, *arguments: str, files: Sequence[Path], seconds: float = 600) -> str:
        named = [word for file in files for word in ("-f", str(file))]
        environment = {**os.environ, "DOCKER_HOST": self.socket}
        return _run([str(BIN / "docker-compose"), *named, *arguments], environment, seconds)

    def build(self, name: str, tag: str, *options: str, context: Path = ROOT, file: Path | None = None) -> int:
        """Build an image from its Dockerfile; its size in bytes beyond the base's."""
        found = file or ROOT / "docker" / f"{name}.Dockerfile"
        command = ["buildah", "bud", "--network=host", "--isolation=chroot", *options]
        self.run(*command, "-f", found, "-t", tag, context, seconds=1200)
        return self._size(tag) - self._size(BASE)

    def make_base(self) -> None:
        root = self.folder / "base"
        self.run("sh", "/usr/sbin/debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", root)
        # In the real image, python is /usr/local's and pip may install into it.
        for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            marker.unlink()
        (root / "usr/bin/python").symlink_to("python3")
        shutil.copy(_CERTIFICATES, root / "usr/share/certificates.pem")  # of a proxy, too, if there is one
        settings = [
            *("-c", "ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"),
            *("-c", "ENV SSL_CERT_FILE=/usr/share/certificates.pem"),
            *("-c", "ENV PIP_CERT=/usr/share/certificates.pem"),
        ]
        packed = self.folder / "base.tar"
        self.run("tar", "-C", root, "--exclude=./proc/*", "--exclude=./sys/*", "-cf", packed, ".")
        self.run("podman", "import", *settings, packed, BASE)
        packed.unlink()

    def make_broker(self, tag: str, *programs: Path, entry: str = "") -> None:
        context = self.folder / "brokers"
        context.mkdir(exist_ok=True)
        for program in programs:
            shutil.copy(program, context)
        file = context / "Dockerfile"
        start = f"ENTRYPOINT {json.dumps([entry])}\n" if entry else ""
        file.write_text(f"FROM {BASE}\nCOPY {' '.join(one.name for one in programs)} /usr/local/bin/\n{start}")
        self.build("", tag, context=context, file=file)

    def containers(self) -> dict[str, Any]:
        """What runs, by its service's name."""
        listed = json.loads(self.run("podman", "ps", "--all", "--format=json") or "[]") or []
        return {one["Labels"]["com.docker.compose.service"]: one for one in listed if one.get("Labels")}

    def _size(self, tag: str) -> int:
        return int(self.run("podman", "image", "inspect", "--format={{.Size}}", tag))

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.folder / "tmp")}

    def _check_health(self) -> None:
        while not self._stopping.wait(1):
            with suppress(subprocess.SubprocessError):
                for container in self.run("podman", "ps", "--quiet").split():
                    with suppress(subprocess.SubprocessError):
                        self.run("podman", "healthcheck", "run", container, seconds=20)


def _run(command: Sequence[str], environment: dict[str, str], seconds: float) -> str:
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    if ended.returncode:
        error = subprocess.CalledProcessError(ended.returncode, command, ended.stdout, ended.stderr)
        error.add_note(f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}")
        raise error
    return ended.stdout


def _wait(condition: Any, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} does not appear")
        time.sleep(0.05)
