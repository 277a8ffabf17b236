"""The systemd unit, by systemd's own offline analysis."""

import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "docker" / "kvtier-store@.service"
EXPOSURE_MAX = 20  # tenths


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_the_unit_is_hardened(tmp_path: Path) -> None:
    copied = shutil.copy(UNIT, tmp_path / "kvtier-store@nvme0.service")
    security = ["systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={EXPOSURE_MAX}"]
    ended = subprocess.run([*security, copied], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stdout[-300:]


def test_the_unit_leaves_what_a_target_reads() -> None:
    """The boot id in /proc/sys, by which clients on the same host are known."""
    assert "ProcSubset" not in UNIT.read_text()


def test_a_target_is_started_again_until_its_broker_is_there() -> None:
    """Nodes start together, and a target without its broker ends with exit code 2, as after a wrong setting."""
    text = UNIT.read_text()
    assert "Restart=always\n" in text
    assert "RestartPreventExitStatus" not in text
