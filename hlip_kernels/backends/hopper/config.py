"""Sizes of the Hopper kernels, by head dim: a readable table. Predicted, not yet measured on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...pattern import Plan

DTYPES = (torch.float16, torch.bfloat16)
ROWS = 64  # of one consumer
REGISTERS = 65536  # of a multiprocessor, all for one program


@dataclass(frozen=True)
class Config:
    """One kernel's sizes.

    Attributes:
        consumers: groups of four warps that multiply, 64 rows each; one more group loads.
        block: rows of a tile of the ring. stages: tiles of the ring.
        part: rows that the loading group takes at a time where it loads by address.
        consumer_registers, producer_registers: of a thread, multiples of 8; together at most what the card has.
        reducer_registers: of the group that makes or adds up dQ, if there is one. reducer_stages: tiles handed to it.
        own_blocks: blocks of 64 rows that a consumer owns. own_stages: how many tiles of its own rows a program has room for:
            with 2 the next come while it is busy, with 1 while it writes results.
        own_in_registers: forward, whether its rows are multiplied from registers or from shared memory; ``None`` for the
            other kernels.
    """

    consumers: int
    block: int
    stages: int
    part: int
    consumer_registers: int
    producer_registers: int
    reducer_registers: int = 0
    reducer_stages: int = 0
    own_stages: int = 1
    own_blocks: int = 1
    own_in_registers: bool | None = None

    @property
    def rows(self) -> int:
        """Rows of a program's tile."""
        return ROWS * self.consumers * self.own_blocks

    @property
    def box(self) -> int:
        """Rows that TMA brings at a time, of the ring as of what a program owns."""
        return min(self.block, ROWS)

    @property
    def max_registers(self) -> int:
        """Registers a thread starts with: an equal share."""
        groups = self.consumers + 1 + (self.reducer_registers > 0)
        return REGISTERS // (128 * groups) // 8 * 8


# Three consumers share each tile of keys and values: 192 rows a tile keep what a multiprocessor asks of L2 at 21 bytes a
# clock if products bind. With 128 keys a tile, what a step issues beside its arithmetic is shared by twice as many logits as
# with 64. For that, queries are multiplied from shared memory: registers hold logits, and the probabilities before them.
FORWARD = {
    64: Config(
        consumers=3, block=128, stages=4, part=16, consumer_registers=160, producer_registers=32,
        own_stages=2, own_in_registers=False,
    ),
    128: Config(
        consumers=2, block=128, stages=2, part=16, consumer_registers=224, producer_registers=56,
        own_stages=2, own_in_registers=False,
    ),
}  # fmt: skip
BACKWARD_DQ = {
    64: Config(consumers=3, block=64, stages=3, part=16, consumer_registers=152, producer_registers=56, own_stages=2),
    128: Config(consumers=2, block=64, stages=3, part=16, consumer_registers=216, producer_registers=72, own_stages=1),
}
BACKWARD_DKDV = {
    64: Config(consumers=2, block=64, stages=3, part=16, consumer_registers=216, producer_registers=72, own_stages=2),
    # Two accumulators of 64 x 128 and two sets of logits: with 224 registers the loop spills.
    128: Config(consumers=2, block=64, stages=3, part=16, consumer_registers=232, producer_registers=40, own_stages=1),
}
# Beside those accumulators there are no registers for one that adds up dQ.
BACKWARD_FUSED = {
    64: Config(
        consumers=2, block=64, stages=3, part=16, consumer_registers=184, producer_registers=48,
        reducer_registers=96, reducer_stages=2, own_stages=2,
    ),
}  # fmt: skip
# Segments of up to 256 rows. Four consumers, each with few registers.
FORWARD_WHOLE = {
    64: Config(
        consumers=4, block=64, stages=8, part=16, consumer_registers=112, producer_registers=32,
        own_stages=2, own_in_registers=False,
    ),
}  # fmt: skip
# Segments of up to 256 rows. Four accumulators of 64 x 64 a consumer leave room for the logits of 32 queries.
BACKWARD_WHOLE = {
    64: Config(
        consumers=2, block=32, stages=5, part=16, consumer_registers=200, producer_registers=32,
        reducer_registers=80, reducer_stages=2, own_stages=2, own_blocks=2,
    ),
}  # fmt: skip
KERNELS = {
    "attention_forward": FORWARD,
    "attention_forward_whole": FORWARD_WHOLE,
    "attention_backward_dq": BACKWARD_DQ,
    "attention_backward_dkdv": BACKWARD_DKDV,
    "attention_backward_fused": BACKWARD_FUSED,
    "attention_backward_whole": BACKWARD_WHOLE,
}
HEAD_DIMS = tuple(FORWARD)
SPLIT = ("attention_backward_dq", "attention_backward_dkdv")
FUSED = ("attention_backward_fused",)
WHOLE = ("attention_backward_whole",)


def function_of(kernel: str) -> str:
    """Name of the function of a kernel: short segments have sizes of their own forward, and otherwise the same."""
    return {"attention_forward_whole": "attention_forward"}.get(kernel, kernel)


def _fit(plan: Plan, head_dim: int, table: dict[int, Config]) -> bool:
    """Whether a kernel of that table can hold every segment of the plan whole."""
    return plan.sees_itself and head_dim in table and plan.longest <= table[head_dim].rows


def forward_kernel(plan: Plan, head_dim: int, whole: bool = True) -> str:
    """Name of the kernel of a forward pass. ``whole``: where segments are short enough, the one that holds them whole."""
    return "attention_forward_whole" if whole and _fit(plan, head_dim, FORWARD_WHOLE) else "attention_forward"


def backward_kernels(plan: Plan, head_dim: int, in_one: bool, whole: bool = True) -> tuple[str, ...]:
    """Names of the kernels of a backward pass.

    Args:
        in_one: rather one that adds dQ up in memory than two. whole: where segments are short enough, the one that holds
            them whole.
    """
    if whole and _fit(plan, head_dim, BACKWARD_WHOLE):
        return WHOLE
    return FUSED if plan.sees_itself and head_dim in BACKWARD_FUSED and in_one else SPLIT
