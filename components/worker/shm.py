"""The DRAM tier's shared memory files, and cleaning up after engines that were killed.

`/dev/shm/vllm_offload_*.mmap` holds a whole DRAM tier. It survives kill -9 and some kinds of shutdown. Each region of
this project has a lock file, which its processes hold until they end. A region whose lock is free is stale.
"""

import contextlib
import fcntl
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

SHM = Path("/dev/shm")
MARK = "kvtier-"  # prefix of the engine id, and so of the file names, of this project's regions


def sweep_stale_regions() -> None:
    """Delete the DRAM tiers of dead engines."""
    for lock in SHM.glob(f"vllm_offload_{MARK}*.lock"):
        with contextlib.suppress(OSError), lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            region = lock.with_suffix(".mmap")
            if region.exists():
                logger.info("deleting %s: its engine is gone", region)
                region.unlink()
            lock.unlink()


def hold_region(engine_id: str) -> int:
    """Hold the region's lock until this process ends. The lock is shared with the engine's other processes. Returns the
    file."""
    path = SHM / f"vllm_offload_{engine_id}.lock"
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)  # deleted between open and lock: create a new one
