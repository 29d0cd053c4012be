"""What several processes (``torchrun``) need to train together, and one alone does without."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from .config import TrainConfig


def make_accelerator(config: TrainConfig):
    """The ``accelerate.Accelerator`` of this process: on the GPU if there is one, joined with the others it was started with.

    Raises:
        ValueError: started as one of several processes, which would not train together.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    # Without a GPU, accelerate joins processes only when told to stay on the CPU.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision="bf16" if config.precision == "bf16" else "no"
    )
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if accelerator.num_processes != started:
        raise ValueError(
            f"started as {started} processes, but they cannot train together on {accelerator.device.type}: start one process"
        )
    return accelerator


def patient_group(accelerator) -> torch.distributed.ProcessGroup | None:
    """A group to wait in while the main process evaluates or writes; ``None`` for one process.

    Collectives of the group that exchanges gradients give up after minutes, as they should: 10 with NCCL, 30 with gloo.
    """
    if accelerator.num_processes == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))


def main_says(accelerator, answer: bool) -> bool:
    """The main process's answer, on every process: clocks differ, and all must do the same at the same step."""
    from accelerate.utils import broadcast

    return bool(broadcast(torch.tensor([float(answer)], device=accelerator.device)))


@contextmanager
def said_once(accelerator) -> Iterator[None]:
    """What every process finds while the block runs, only the main one says."""
    before = logging.root.manager.disable
    if not accelerator.is_main_process:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
