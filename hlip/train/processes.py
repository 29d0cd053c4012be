"""What several processes (``torchrun``) need to train together, and one alone does without; and signals to stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

from .config import TrainConfig

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal asked to stop, and what was trained has been saved. ``status`` is that of a process the signal had ended."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.status = 128 + number


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The numbers of the signals that came while the block runs, and that do not end it. Outside of the main thread, none."""
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in STOP_SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(_: int) -> None:
    """For a loader's worker: the signals go to all processes of a job, and the last step still needs its studies."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def highest(accelerator, number: int) -> int:
    """The highest of what the processes say, on every process."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


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
