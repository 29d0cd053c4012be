"""A performance model of the Triton attention kernels: how long a pattern should take, counted from its tiles.

    python -m benchmarks.predict                  # the benchmarks' workloads on an H200, before anything is measured

Each tile's work is counted as the kernel issues it, padding included: matrix FLOPs, exponentials, and the float32 operations
that scale, compare, subtract, sum and convert the logits. Divided by what one multiprocessor does in a clock, they give three
times. If the compiler overlapped the three perfectly, a tile would take the longest of them; if not at all, their sum. Tiles
are dealt to the multiprocessors in the order of the schedule, each to the one that is free first, so an uneven batch
shows as imbalance. A kernel also moves its tensors once through device memory, and starts in a few microseconds.

The fast backward kernel also adds to dQ in the L2 cache: what its tiles of keys add, 8 bytes a float (read and written), is
divided by the bandwidth of that cache. How fast it adds is not known here: see ``Rates.l2``.

What binds at head dim 64 on Hopper: 128 x 64 logits take 512 clocks of the tensor cores, 512 of the exponential unit and about
320 of the float32 units. Perfect overlap would be 990 TFLOP/s; none is 377, and published plain Triton kernels measure
340 to 403. Not modelled: other traffic of L2, shared memory, the clock falling under load, the tail of a tile's prologue.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import numpy as np
import torch

from .backends.triton.config import config_for, kind_of
from .layout import Layout
from .pattern import K_PATCHES, K_PREFIXES, Plan

# Matrix products per logit, and other float32 operations, and matrices of logits that are operands of a product.
_PRODUCTS = {"attention_forward": 2, "attention_backward_dq": 3, "attention_backward_dkdv": 4, "attention_backward_fused": 5}
_FLOATS = {"attention_forward": 5, "attention_backward_dq": 5, "attention_backward_dkdv": 5, "attention_backward_fused": 6}
_OPERANDS = {"attention_forward": 1, "attention_backward_dq": 1, "attention_backward_dkdv": 2, "attention_backward_fused": 2}
_ROUNDING = 3  # float32 operations that round an operand to TF32
# Tensors read or written once: in the dtype of the input, and in float32 (dQ while it is summed).
_TENSORS = {
    "attention_forward": (4, 0),
    "attention_backward_dq": (6, 0),
    "attention_backward_dkdv": (6, 0),
    "attention_backward_delta": (2, 1),
    "attention_backward_fused": (6, 2),
    "cast of dq": (1, 1),
}
_SPLIT = ("attention_backward_dq", "attention_backward_dkdv")
_FUSED = ("attention_backward_delta", "attention_backward_fused", "cast of dq")
LAUNCH = 3e-6  # seconds a kernel takes to start and drain


@dataclass(frozen=True)
class Rates:
    """What a GPU does: per multiprocessor and clock, and its memory. From the vendors' data sheets and programming guides.

    Attributes:
        multiprocessors: how many. clock: Hz at which ``matrix`` gives the data sheet's peak.
        matrix: FLOPs per clock, by bytes per element (2: tensor cores; 4: float32 units, since float32 means float32), or of
            "tf32".
        exponentials: base-2 exponentials per clock. floats: float32 operations per clock, a fused multiply-add being one.
        bandwidth: of device memory, bytes/s.
        l2: bytes/s of the L2 cache for floats that are added to. Assumed, round figures near what is reported for reading. An
            H100 has 3.4e12 at least: flash-attention 3 adds to dQ in the same way at some 550 TFLOP/s (head dim 128).
        family: whose tile sizes it takes.
    """

    multiprocessors: int
    clock: float
    matrix: dict[int | str, int]
    exponentials: int
    floats: int
    bandwidth: float
    l2: float
    family: str = "hopper"

    def measured(self, matrix_flops: float, bandwidth: float) -> Rates:
        """These rates at the clock and bandwidth that a card was seen to reach (``matrix_flops`` per second, 16-bit)."""
        return replace(self, clock=matrix_flops / (self.multiprocessors * self.matrix[2]), bandwidth=bandwidth)


RATES = {
    "A100": Rates(108, 1.41e9, {2: 2048, "tf32": 1024, 4: 128}, 16, 64, 2.0e12, 4.0e12, "ampere"),
    "H100": Rates(132, 1.83e9, {2: 4096, "tf32": 2048, 4: 256}, 16, 128, 3.35e12, 5.5e12),
    "H200": Rates(132, 1.83e9, {2: 4096, "tf32": 2048, 4: 256}, 16, 128, 4.8e12, 5.5e12),
    "B200": Rates(148, 1.85e9, {2: 8192, "tf32": 4096, 4: 256}, 16, 128, 8.0e12, 9.0e12),
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of one kernel, or of several one after the other.

    Attributes:
        overlapped, serial: with the units of a multiprocessor perfectly overlapped, and not at all.
        memory: the bytes of device memory alone; both of the above are at least this.
        binds: ``"matrix"``, ``"exponentials"``, ``"floats"``, ``"memory"`` or ``"l2"``: what would bind if all overlapped.
        useful: real logits as a share of those computed; the rest is padding of tiles.
        balance: mean busy time of a multiprocessor over that of the last to finish.
    """

    overlapped: float
    serial: float
    memory: float
    binds: str
    useful: float
    balance: float

    def __add__(self, other: Prediction) -> Prediction:
        longer = max(self, other, key=lambda p: p.overlapped)
        return Prediction(
            self.overlapped + other.overlapped, self.serial + other.serial, self.memory + other.memory,
            longer.binds, longer.useful, longer.balance,
        )  # fmt: skip


def predict_kernel(
    kernel: str, plan: Plan, heads: int, head_dim: int, dtype: torch.dtype, rates: Rates, allow_tf32: bool = False
) -> Prediction:
    """The time of one kernel over a plan's tiles.

    Args:
        kernel: a name of ``config.KERNELS``, or ``"cast of dq"``, torch's own. plan: of a pattern.
        heads, head_dim, dtype: of q, k and v. rates: of the GPU. allow_tf32: as in :func:`hlip_kernels.attention`.
    """
    tensors, sums = _TENSORS[kernel]
    memory = (tensors * dtype.itemsize + sums * 4) * plan.num_rows * heads * head_dim / rates.bandwidth
    if kernel not in _PRODUCTS:
        return Prediction(memory + LAUNCH, memory + LAUNCH, memory, "memory", 1.0, 1.0)
    kind = kind_of(dtype, allow_tf32)
    config = config_for(kernel, dtype, head_dim, rates.family, allow_tf32)
    transposed = kernel in ("attention_backward_dkdv", "attention_backward_fused")
    block, step = (config.block_n, config.block_m) if transposed else (config.block_m, config.block_n)
    tiles, records = (t.numpy().astype(np.int64) for t in plan.tiles(block, torch.device("cpu"), transposed=transposed))
    rows = records[tiles[:, 0]]
    patches, seen = rows[:, K_PATCHES], rows[:, K_PATCHES] + rows[:, K_PREFIXES]
    whole = patches // step * step
    steps = whole // step + -(-(seen - whole) // step)
    logits = steps * float(block * step)
    real = np.minimum(block, rows[:, 1] + rows[:, 3] - tiles[:, 1]) * seen.astype(float)
    width = sum(config.columns)
    floats = _FLOATS[kernel] + (_ROUNDING * (_OPERANDS[kernel] + 2 * width / block) if kind == "tf32" else 0)
    times = {
        "matrix": logits * 2 * _PRODUCTS[kernel] * width / rates.matrix[kind],
        "exponentials": logits / rates.exponentials,
        "floats": logits * floats / rates.floats,
    }
    l2 = 8 * float(seen.sum()) * heads * head_dim / rates.l2 if kernel == "attention_backward_fused" else 0.0
    overlapped, balance = _makespan(np.max(list(times.values()), axis=0), heads, rates.multiprocessors)
    serial, _ = _makespan(np.sum(list(times.values()), axis=0), heads, rates.multiprocessors)
    seconds = {"memory": memory, "l2": l2, max(times, key=lambda unit: times[unit].sum()): overlapped / rates.clock}
    return Prediction(
        max(seconds.values()) + LAUNCH,
        max(serial / rates.clock, memory, l2) + LAUNCH,
        memory,
        max(reversed(seconds), key=seconds.__getitem__),
        float(real.sum() / max(logits.sum(), 1.0)),
        balance,
    )


def _makespan(clocks: np.ndarray, heads: int, workers: int) -> tuple[float, float]:
    """Clocks until the last worker is done when each takes the next tile as soon as it is free, and the balance."""
    total = float(clocks.sum()) * heads
    if total == 0:
        return 0.0, 1.0
    free = [0.0] * workers
    for _ in range(heads):  # heads are the slower launch dimension
        for clock in clocks:
            heapq.heapreplace(free, free[0] + clock)
    return max(free), total / workers / max(free)


def predict(
    layout: Layout, level: str, *, heads: int, head_dim: int, dtype: torch.dtype, rates: Rates, backward: bool = False,
    neighbours: int = 0, summary: str | None = None, deterministic: bool = True, allow_tf32: bool = False,
) -> Prediction:  # fmt: skip
    """The time of ``attention`` forward, or of its backward pass (all of its kernels), with the Triton backend.

    Args:
        layout, level, neighbours, summary, deterministic, allow_tf32: as in :func:`hlip_kernels.attention`.
        heads, head_dim, dtype: of q, k and v. rates: of the GPU, e.g. ``RATES["H200"]``.
        backward: the backward pass instead of the forward one.

    Raises:
        ValueError: no such level or pattern.
    """
    plan = Plan.of(layout.pattern(level, neighbours=neighbours, summary=summary))
    kernels: tuple[str, ...] = _SPLIT if backward else ("attention_forward",)
    fused = config_for("attention_backward_fused", dtype, head_dim, rates.family, allow_tf32)
    if backward and not deterministic and fused is not None:
        kernels = _FUSED if dtype != torch.float32 else _FUSED[:-1]  # float32 sums are dQ itself
    first, *rest = (predict_kernel(kernel, plan, heads, head_dim, dtype, rates, allow_tf32) for kernel in kernels)
    for prediction in rest:
        first = first + prediction
    return first
