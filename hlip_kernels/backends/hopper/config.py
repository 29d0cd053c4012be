"""Sizes of the Hopper kernels, by head dim: a readable table. Predicted, not yet measured on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
        reducer_registers: of the group that adds up dQ, if there is one. reducer_stages: tiles handed to it.
    """

    consumers: int
    block: int
    stages: int
    part: int
    consumer_registers: int
    producer_registers: int
    reducer_registers: int = 0
    reducer_stages: int = 0

    @property
    def rows(self) -> int:
        """Rows of a program's tile."""
        return ROWS * self.consumers

    @property
    def max_registers(self) -> int:
        """Registers a thread starts with: an equal share."""
        groups = self.consumers + 1 + (self.reducer_registers > 0)
        return REGISTERS // (128 * groups) // 8 * 8


# Three consumers share each tile of keys and values: 192 rows a tile keep what a multiprocessor asks of L2 at 21 bytes a
# clock if products bind. Tiles of 64 rows leave room for the logits of two tiles, which is what overlaps.
FORWARD = {
    64: Config(consumers=3, block=64, stages=4, part=16, consumer_registers=160, producer_registers=32),
    128: Config(consumers=2, block=64, stages=3, part=16, consumer_registers=224, producer_registers=56),
}
BACKWARD_DQ = {
    64: Config(consumers=3, block=64, stages=4, part=16, consumer_registers=152, producer_registers=56),
    128: Config(consumers=2, block=64, stages=3, part=16, consumer_registers=216, producer_registers=72),
}
BACKWARD_DKDV = {
    64: Config(consumers=2, block=64, stages=3, part=16, consumer_registers=224, producer_registers=56),
    # Two accumulators of 64 x 128 and two sets of logits: with 224 registers the loop spills.
    128: Config(consumers=2, block=64, stages=3, part=16, consumer_registers=232, producer_registers=40),
}
# Beside those accumulators there are no registers for one that adds up dQ.
BACKWARD_FUSED = {
    64: Config(
        consumers=2, block=64, stages=3, part=16, consumer_registers=184, producer_registers=48,
        reducer_registers=96, reducer_stages=2,
    ),
}  # fmt: skip
KERNELS = {
    "attention_forward": FORWARD,
    "attention_backward_dq": BACKWARD_DQ,
    "attention_backward_dkdv": BACKWARD_DKDV,
    "attention_backward_fused": BACKWARD_FUSED,
}
HEAD_DIMS = tuple(FORWARD)
