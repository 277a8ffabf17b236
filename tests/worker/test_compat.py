"""The names taken from vLLM: those of the installed one for real, and the renames up to 0.33 by their new names."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.kv_offload.tiering import base

from components.worker import compat

ROOT = Path(__file__).parents[2]


def test_every_name_is_there_in_the_installed_release() -> None:
    assert all(getattr(compat, name) is not None for name in compat.__all__)


def test_the_names_of_0_33_do_as_well() -> None:
    """In a process of its own, with the installed release's tiering names changed to the later ones."""
    program = """
from vllm.v1.kv_offload.tiering import base
import vllm.v1.kv_offload.tiering.manager
base.TransferJob = base.JobMetadata
del base.JobMetadata
from components.worker import compat, remote_tier
assert compat.JobMetadata is base.TransferJob
print("imported")
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout.strip().endswith("imported"), ended.stderr


@pytest.mark.parametrize("name", ["block_ids", "chunk_ids"])
def test_rows_of_a_job_under_both_names(name: str) -> None:
    job: Any = SimpleNamespace(**{name: np.array([3, 1, 2])})
    assert compat.job_rows(job) == [3, 1, 2]


def test_a_manager_that_is_built_otherwise_is_refused_in_words() -> None:
    known: Any = SimpleNamespace(_transfer_jobs={}, _pending_load_submissions={}, _req_state={})
    compat.check_manager(known)
    other: Any = SimpleNamespace(_jobs={}, _pending_load_submissions={}, _req_state={})
    with pytest.raises(RuntimeError, match=r"expected 0\.26: its tiering manager has no _transfer_jobs"):
        compat.check_manager(other)


def test_the_installed_release_is_read_under_its_own_name() -> None:
    assert importlib.reload(compat).JobMetadata is base.JobMetadata
