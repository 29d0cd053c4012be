"""The fixture ``needs_memory`` of conftest.py, which tests of large tensors on a GPU share."""

import fcntl
import os
import tempfile
from pathlib import Path

import pytest
import torch


def test_one_at_a_time_and_where_there_is_room(needs_memory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * 2**30, 80 * 2**30))
    needs_memory(20 * 2**30)
    with pytest.raises(pytest.skip.Exception, match="needs 21 GiB, of 80 GiB 20 are free"):
        needs_memory(21 * 2**30)
    # Another process, or here another file, does not get it meanwhile.
    with open(Path(tempfile.gettempdir(), f"hlip-gpu-memory-{os.getuid()}.lock")) as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
