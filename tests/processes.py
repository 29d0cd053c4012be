"""Runs a function in several processes joined by gloo, as ``torchrun`` would, without the seconds of starting them."""

import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.multiprocessing as mp

LIMIT = 120.0
SLOW = [
    "hlip.train.loop", "hlip.data", "accelerate", "open_clip.loss", "transformers.models.bert.modeling_bert", "pytest",
    "torch.utils.tensorboard", "torch.nn.parallel.distributed", "safetensors.torch", "sklearn.metrics",
]  # fmt: skip


def together(function, *args, processes=2, timeout=60.0):
    """``[function(*args) of each process]``; an exception in one of them comes back with its traceback.

    Args:
        function: of a module, or a ``functools.partial`` of one, so that it can be pickled.
        timeout: seconds after which a collective gives up.

    Raises:
        TimeoutError: they hang.
    """
    # Processes are forked from a server without threads that has imported, once, what takes seconds.
    mp.get_context("forkserver").set_forkserver_preload(SLOW)
    with tempfile.TemporaryDirectory() as folder:
        started = mp.start_processes(
            _one, (function, args, processes, timeout, folder), nprocs=processes, join=False, start_method="forkserver"
        )
        end = time.monotonic() + LIMIT
        try:
            while not started.join(timeout=1.0):
                if time.monotonic() > end:
                    raise TimeoutError(f"{function} hangs in {processes} processes")
        finally:
            for process in started.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def _one(rank, function, args, processes, timeout, folder):
    torch.set_num_threads(1)
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in names.items()})
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes, timeout=timedelta(seconds=timeout)
        )
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()
