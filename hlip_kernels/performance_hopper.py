"""The performance model of the Hopper kernels: what their order of products, exponentials and waits makes of a multiprocessor.

    python -m hlip_kernels.performance_hopper        # every kernel, with other numbers of consumers and rows a tile

A step of a consumer is a short list of actions in the order of its machine code (``tests/test_hopper_compile.py`` holds it to
that order). The tensor cores take products one after the other, each as long as its FLOPs or its reads of shared memory take;
consumers share the exponential units and the issue slots of the schedulers evenly; a wait ends when the products it names have.
Simulated for some tens of steps, that gives the clocks in which all consumers do a step: at least what the busiest unit takes.

How many instructions a step has is counted in the machine code (``ISSUED``). Each of the four schedulers has one warp of every
consumer and issues one instruction a clock, so that is the clocks they take of it.

Not modelled: L2, clocks that fall under load. Latencies are guesses in round numbers. Published
figures say how far to trust it: flash-attention 3 keeps the same units busy in much the same order, and at head dim 64 measures
half of what this arithmetic allows (497 of 989 TFLOP/s forward, 474 backward). What it is good for is comparing orders.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from .backends.hopper.config import FUSED, HEAD_DIMS, KERNELS, ROWS, SPLIT, WHOLE, Config, backward_kernels, forward_kernel
from .layout import Layout
from .pattern import K_PATCHES, K_PREFIXES, Q_PATCHES, Q_PREFIXES, Plan
from .performance import LAUNCH, RATES, Rates

PRODUCT_LATENCY, BARRIER = 60, 30  # clocks: from a product's end to its use; of four warps
SHARED_BYTES = 128  # read or written a clock


@dataclass(frozen=True)
class Begin:
    """Queues a product of 64 x tile x D. ``shared``: both sides are in shared memory, not the right one alone."""

    name: str
    shared: bool = False


@dataclass(frozen=True)
class Compute:
    """Keeps this consumer busy, and a share of two units, until it has had both: issue slots for a share of the step's
    instructions, and exponentials of each logit of a tile."""

    issue: float
    exponentials: float = 0


@dataclass(frozen=True)
class Wait:
    """Until the named products have ended."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Pause:
    """Keeps this consumer, and no unit, busy."""

    clocks: float


_ARRIVE = Pause(PRODUCT_LATENCY + BARRIER)  # results arrive, a tile is released
_FINISH = Pause(PRODUCT_LATENCY + 2 * BARRIER)  # two tiles
# Shares of issue slots are those of the machine code, to a twentieth: addresses and descriptors first, or packing of operands,
# then maxima; scaling, exponentials and sums; what follows them.
STEPS = {
    "attention_forward": (
        Compute(issue=0.2), Pause(BARRIER), Begin("logits", shared=True), Begin("values"), Wait(("logits",)), _ARRIVE,
        Compute(issue=0.2), Compute(issue=0.4, exponentials=1), Wait(("values",)), _ARRIVE, Compute(issue=0.2),
    ),
    "attention_backward_dq": (
        Compute(issue=0.15), Pause(BARRIER), Begin("logits", shared=True), Begin("dP", shared=True), Wait(("logits",)),
        Pause(PRODUCT_LATENCY), Compute(issue=0.35, exponentials=1), Wait(("dP",)), Pause(BARRIER), Compute(issue=0.35),
        Begin("dQ"), Wait(("dQ",)), _FINISH, Compute(issue=0.15),
    ),
    "attention_backward_dkdv": (
        Compute(issue=0.15), Pause(BARRIER), Begin("logits", shared=True), Begin("dP", shared=True), Wait(("logits",)),
        Pause(PRODUCT_LATENCY), Compute(issue=0.4, exponentials=1), Begin("dV"), Wait(("dP",)), Compute(issue=0.35),
        Begin("dK"), Wait(("dV", "dK")), _FINISH, Compute(issue=0.1),
    ),
    # The reducer's product, of both consumers' dS, as half of it each: nobody waits for it but the next but one.
    "attention_backward_fused": (
        Compute(issue=0.15), Pause(BARRIER), Begin("logits", shared=True), Begin("dP", shared=True), Wait(("logits",)),
        Pause(PRODUCT_LATENCY), Compute(issue=0.4, exponentials=1), Begin("dV"), Wait(("dP",)), Compute(issue=0.35),
        Pause(BARRIER), Begin("dQ", shared=True), Begin("dK"), Wait(("dV", "dK")), _FINISH, Compute(issue=0.1),
    ),
}  # fmt: skip
# Instructions that a warp of a consumer issues for 64 x 64 logits, and those of the group that makes or adds up dQ for as many,
# by kernel and head dim, from the record of triton 3.6; with 3.8 and 3.9 up to a seventh more or less.
ISSUED = {
    ("attention_forward", 64): (206, 0),
    ("attention_forward", 128): (226, 0),
    ("attention_forward_whole", 64): (261, 0),
    ("attention_backward_dq", 64): (222, 0),
    ("attention_backward_dq", 128): (254, 0),
    ("attention_backward_dkdv", 64): (257, 0),
    ("attention_backward_dkdv", 128): (301, 0),
    ("attention_backward_fused", 64): (328, 153),
    ("attention_backward_whole", 64): (444, 162),
}
# The same steps; backward, one for each block of keys that a consumer owns.
STEPS |= {
    "attention_forward_whole": STEPS["attention_forward"],
    "attention_backward_whole": STEPS["attention_backward_fused"],
}
# What a warp of a consumer issues for an item beside its steps, most of what short items have: rows found and loaded, masks,
# results divided, rearranged and written. Counted by hand in the same machine code, to some tens; those of dQ, dK and dV and of
# the kernel in one were corrected since by how much shorter the code around their loops has become.
OUTSIDE = {
    "attention_forward": 375,
    "attention_forward_whole": 375,
    "attention_backward_dq": 590,
    "attention_backward_dkdv": 390,
    "attention_backward_fused": 440,
    "attention_backward_whole": 780,
}
# Of a step of 64 keys: a first tile of so many, forward, where tiles are longer. Of 16 by its instructions; of 64 a guess, for
# nothing overlaps with it.
FIRST = {16: 0.4, 64: 1.2}
OWN_ROWS = 1000  # clocks in which consumers wait for rows of their own, where there is room for those of one item alone
# Tensors of q's size that are read or written; 6 where nothing is said.
TENSORS = {"attention_forward": 4, "attention_forward_whole": 4, "attention_backward_whole": 8}


def units(kernel: str, config: Config, head_dim: int, rates: Rates) -> dict[str, float]:
    """Clocks that a step of all consumers takes of each unit."""
    logits = ROWS * config.block
    issued, of_third_group = ISSUED[kernel, head_dim]
    clocks = dict.fromkeys(("matrix", "shared memory", "exponentials"), 0.0)
    clocks["issue"] = (issued + of_third_group) * logits / 64**2
    for action in STEPS[kernel]:
        if isinstance(action, Begin):
            clocks["matrix"] += 2.0 * logits * head_dim / rates.matrix[2]
            clocks["shared memory"] += _reads(action, config.block, head_dim)
        elif isinstance(action, Compute):
            clocks["exponentials"] += action.exponentials * logits / rates.exponentials
    clocks = {unit: config.consumers * count for unit, count in clocks.items()}
    clocks["shared memory"] += 2 * config.block * head_dim * 2 / SHARED_BYTES  # the two tiles that come in
    return clocks


def _reads(product: Begin, block: int, head_dim: int) -> float:
    """Clocks of shared memory for what a product reads."""
    return (block + (ROWS if product.shared else 0)) * head_dim * 2 / SHARED_BYTES


def clocks_per_step(kernel: str, config: Config, head_dim: int, rates: Rates, steps: int = 40) -> float:
    """Clocks in which every consumer of a multiprocessor does one step, simulated; the first steps do not count."""
    simulated = _Simulation(kernel, config, head_dim, rates)
    warm = steps // 4
    while min(map(len, simulated.finished)) <= steps:
        simulated.advance()
    return (max(f[steps] for f in simulated.finished) - max(f[warm] for f in simulated.finished)) / (steps - warm)


class _Simulation:
    """Consumers, the queue of the tensor cores and the shared units, from event to event."""

    def __init__(self, kernel: str, config: Config, head_dim: int, rates: Rates):
        self.actions = STEPS[kernel]
        logits = ROWS * config.block
        matrix = 2.0 * logits * head_dim / rates.matrix[2]
        begins = [action for action in self.actions if isinstance(action, Begin)]
        self.product = {action.name: max(matrix, _reads(action, config.block, head_dim)) for action in begins}
        self.issue = ISSUED[kernel, head_dim][0] * logits / 64**2
        self.exponentials = logits / rates.exponentials
        count = config.consumers
        self.now = 0.0
        self.at = [0] * count  # the next action of each consumer
        self.ready = [97.0 * c for c in range(count)]  # they do not start together
        self.working: list[dict[str, float]] = [{} for _ in range(count)]  # clocks left, by unit
        self.open: list[set] = [set() for _ in range(count)]  # products begun and not ended
        self.queue: list[tuple[int, str, float]] = []
        self.finished: list[list[float]] = [[] for _ in range(count)]
        self.ends = 0.0  # when the first of the queue has ended

    def advance(self) -> None:
        while any([self._act(c) for c in range(len(self.at))]):
            pass
        sharing = Counter(unit for work in self.working for unit in work)
        events = [t for t in self.ready if t > self.now] + ([self.ends] if self.queue else [])
        events += [self.now + left * sharing[unit] for work in self.working for unit, left in work.items()]
        passed = min(events) - self.now
        self.now += passed
        for c, work in enumerate(self.working):
            left = {unit: clocks - passed / sharing[unit] for unit, clocks in work.items()}
            self.working[c] = {unit: clocks for unit, clocks in left.items() if clocks > 1e-6}
        if self.queue and self.ends <= self.now:
            consumer, name, _ = self.queue.pop(0)
            self.open[consumer].discard(name)
            if self.queue:
                self.ends = self.now + self.queue[0][2]

    def _act(self, c: int) -> bool:
        """Does consumer ``c``'s next action if it can."""
        if self.working[c] or self.ready[c] > self.now:
            return False
        action = self.actions[self.at[c]]
        if isinstance(action, Wait) and self.open[c].intersection(action.names):
            return False
        if isinstance(action, Begin):
            if not self.queue:
                self.ends = self.now + self.product[action.name]
            self.queue.append((c, action.name, self.product[action.name]))
            self.open[c].add(action.name)
        elif isinstance(action, Compute):
            work = {"issue": self.issue * action.issue, "exponentials": self.exponentials * action.exponentials}
            self.working[c] = {unit: clocks for unit, clocks in work.items() if clocks}
        elif isinstance(action, Pause):
            self.ready[c] = self.now + action.clocks
        self.at[c] = (self.at[c] + 1) % len(self.actions)
        if self.at[c] == 0:
            self.finished[c].append(self.now)
        return True


@dataclass(frozen=True)
class Simulated:
    """Seconds of one kernel, or of several one after the other.

    Attributes:
        seconds: with the order of the kernels simulated. overlapped: with the busiest unit busy all the time.
        serial: with the units one after the other (shared memory is read by the products themselves).
        binds: the busiest unit, or ``"memory"``. balance: mean busy time of a multiprocessor over that of the last to finish.
        useful: real logits over computed ones.
    """

    seconds: float
    overlapped: float
    serial: float
    binds: str
    balance: float
    useful: float

    def __add__(self, other: Simulated) -> Simulated:
        longer = max(self, other, key=lambda p: p.seconds)
        return Simulated(
            self.seconds + other.seconds, self.overlapped + other.overlapped, self.serial + other.serial,
            longer.binds, longer.balance, longer.useful,
        )  # fmt: skip


def predict_hopper(
    layout: Layout, level: str, *, heads: int, head_dim: int, dtype: torch.dtype, rates: Rates, backward: bool = False,
    fused: bool = False, neighbours: int = 0, summary: str | None = None,
) -> Simulated:  # fmt: skip
    """The time of ``attention`` with the ``hopper`` backend, forward or backward.

    Args:
        layout, level, neighbours, summary: as in :func:`hlip_kernels.attention`. heads, head_dim, dtype: of q, k and v.
        rates: of the GPU. backward: the backward pass instead of the forward one. fused: in one kernel where there
            is one for the head dim, without the passes that prepare and convert dQ.

    Raises:
        ValueError: no kernels for this head dim, no such level or pattern.
    """
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"there are no Hopper kernels for head dim {head_dim}")
    plan = Plan.of(layout.pattern(level, neighbours=neighbours, summary=summary))
    names = backward_kernels(plan, head_dim, fused) if backward else (forward_kernel(plan, head_dim),)
    first, *rest = (_predict_kernel(name, plan, heads, head_dim, dtype, rates) for name in names)
    return sum(rest, first)


def _predict_kernel(kernel: str, plan: Plan, heads: int, head_dim: int, dtype: torch.dtype, rates: Rates) -> Simulated:
    config = KERNELS[kernel][head_dim]
    tiles, records = plan.tiles(
        config.rows, torch.device("cpu"), transposed=kernel in ("attention_backward_dkdv", "attention_backward_fused")
    )
    rows = records.numpy().astype(np.int64)[tiles.numpy()[:, 0]]
    met = rows[:, K_PATCHES] + rows[:, K_PREFIXES]
    own = np.minimum(rows[:, Q_PATCHES] + rows[:, Q_PREFIXES] - tiles.numpy()[:, 1], config.rows)
    whole = rows[:, K_PATCHES] // config.block
    steps = (whole + -(-(met - whole * config.block) // config.block)).astype(float)
    columns = steps * config.block
    if kernel.startswith("attention_forward"):
        left = (met - 1) % config.block + 1
        for keys, least in ((config.part, 0), (ROWS, config.part)):
            first = (met > config.block) & (left > least) & (left <= keys) & (keys < config.block)
            steps -= first * (1 - FIRST[keys] * ROWS / config.block)
            columns -= first * (config.block - keys)
    blocks = (-(-own // (ROWS * config.consumers))).clip(1, config.own_blocks)  # that a consumer has rows for
    steps, columns = steps * blocks, columns * blocks
    busy = np.full(len(own), config.consumers)
    if kernel not in (*FUSED, *WHOLE):  # consumers without rows let tiles of the ring pass by
        busy = (-(-own // ROWS)).clip(1, config.consumers)

    def dealt(clocks: dict[int, float], outside: float = 0.0, waiting: float = 0.0) -> np.ndarray:
        """Clocks of every multiprocessor, given those of a step by how many consumers are busy, and of an item beside them:
        for each busy consumer, and for all together."""
        by_busy = np.array([clocks.get(n, 0.0) for n in range(config.consumers + 1)])
        items = np.repeat(steps * by_busy[busy] + outside * busy + waiting, heads)
        programs = np.arange(len(items)) % rates.multiprocessors  # all heads of a tile one after the other, dealt in turn
        return np.bincount(programs, weights=items, minlength=rates.multiprocessors)

    configs = {int(n): replace(config, consumers=int(n)) for n in np.unique(busy)}
    by_unit = {n: units(kernel, c, head_dim, rates) for n, c in configs.items()}
    names = list(next(iter(by_unit.values()), {"matrix": 0.0}))
    outside = OUTSIDE[kernel]
    clocks = {
        unit: dealt({n: found[unit] for n, found in by_unit.items()}, outside * (unit == "issue")).max() for unit in names
    }
    binds = max(clocks, key=clocks.__getitem__)
    waiting = 0.0 if config.own_stages > 1 else OWN_ROWS
    simulated = dealt({n: clocks_per_step(kernel, c, head_dim, rates) for n, c in configs.items()}, outside, waiting)
    serial = sum(count for unit, count in clocks.items() if unit != "shared memory")
    serial += waiting * -(-len(own) * heads // rates.multiprocessors)
    memory = TENSORS.get(kernel, 6) * plan.num_rows * heads * head_dim * dtype.itemsize / rates.bandwidth
    overlapped = clocks[binds] / rates.clock
    seconds = (simulated.max() / rates.clock, overlapped, serial / rates.clock)
    computed = ROWS * float((columns * busy).sum())
    return Simulated(
        *(float(max(time, memory)) + LAUNCH for time in seconds),
        binds if overlapped > memory else "memory",
        balance=float(simulated.mean() / simulated.max()) if simulated.any() else 1.0,
        useful=float((own * met).sum()) / computed if computed else 1.0,
    )


def main() -> int:
    rates = RATES["H200"]
    print("consumers by rows of a tile: busiest unit, its clocks a step, simulated, TFLOP/s (H200, D = 64; predicted)")
    for kernel, by_head_dim in KERNELS.items():
        shipped = by_head_dim[64]
        for consumers in (1, 2, 3, 4):
            for block in (32, 64, 128):
                config = replace(shipped, consumers=consumers, block=block)
                busy = units(kernel, config, 64, rates)
                busiest = max(busy, key=busy.__getitem__)
                clocks = clocks_per_step(kernel, config, 64, rates)
                products = sum(isinstance(action, Begin) for action in STEPS[kernel])
                useful = products * (5 / 7 if kernel in SPLIT else 1)  # backward's FLOPs are those of 5 products
                flops = useful * 2 * ROWS * consumers * block * 64 * rates.multiprocessors * rates.clock / clocks
                mark = "  <- shipped" if config == shipped else ""
                line = f"{kernel:24} {consumers} x 64 by {block:>3}: {busiest:13} {busy[busiest]:5.0f} {clocks:6.0f} "
                print(f"{line}{flops / 1e12:5.0f}{mark}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
