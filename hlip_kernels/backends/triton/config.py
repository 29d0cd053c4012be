"""Tile sizes of the Triton kernels: a readable table, no autotuning, no dependence on sequence length.

Keyed on family of GPUs, kernel, kind of product (bytes per element, or TF32) and columns of a tile. Predicted from registers,
shared memory and instructions (``python -m hlip_kernels.resources`` prints them, for any triton), not yet measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Config:
    """``block_m`` query rows and ``block_n`` key rows a tile, ``num_warps`` warps, ``num_stages`` of loads in flight; and which
    of :data:`WIDTHS` the columns of a tile are (``None``: the least that hold a head)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    columns: tuple[int, int] | None = None

    def on(self, head_dim: int) -> Config:
        """The same with its columns."""
        return self if self.columns else replace(self, columns=next(c for c in WIDTHS if sum(c) >= head_dim))


KERNELS = (
    "attention_forward",
    "attention_backward_dq",
    "attention_backward_dkdv",
    "attention_backward_delta",
    "attention_backward_fused",
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256

# The columns of a tile are one block or two (else 0), each a power of two from 16 on, the least that ``tl.dot`` takes.
WIDTHS = ((16, 0), (32, 0), (64, 0), (64, 16), (64, 32), (128, 0), (128, 64), (256, 0))
# In place of tiles: those of the next larger width do, since all worth having spill at this one.
WIDER = "wider"

# The fast backward pass moves dQ through memory in float32, which its fewer products make up for when rows see many keys:
# predicted, from 300 (if nothing overlaps) to 1000 (if all does) at head dim 64, 16 bit, on an H200. Where the longest segment
# sees fewer than this, the two other kernels run.
FUSED_FROM = 512

# Families: "hopper" has warpgroup MMAs (sm_90, sm_100, sm_103), "ampere" those of one warp and as little as 99 KB of
# shared memory (sm_80, sm_86, sm_89, sm_120), "amd" 64 threads a warp and 64 KB.
FAMILIES = ("hopper", "ampere", "amd")

# (kernel, bytes per element or "tf32") -> {columns: Config, WIDER, or None where the kernel is not used}. No entry spills a
# register with triton 3.6, 3.8 or 3.9; tests/test_triton_compile.py holds them to that.
_HOPPER = {
    ("attention_forward", 2): {
        16: Config(128, 64, 4, 3),
        32: Config(128, 64, 4, 3),
        64: Config(128, 64, 4, 3),
        80: Config(128, 64, 4, 3),
        96: Config(128, 64, 8, 3),
        128: Config(128, 64, 8, 3),
        192: Config(128, 64, 8, 2),
        256: Config(128, 32, 8, 2),
    },
    ("attention_backward_dq", 2): {
        16: Config(128, 32, 4, 2),
        32: Config(128, 32, 4, 2),
        64: Config(128, 64, 8, 2),
        80: Config(128, 64, 8, 2),
        96: Config(128, 64, 8, 2),
        128: Config(128, 64, 8, 2),
        192: Config(128, 32, 8, 2),
        256: Config(128, 32, 8, 2),
    },
    ("attention_backward_dkdv", 2): {
        16: Config(64, 128, 8, 2),
        32: Config(64, 128, 8, 2),
        64: Config(64, 128, 8, 2),
        80: Config(64, 128, 8, 2),
        96: Config(64, 128, 8, 2),
        128: Config(32, 64, 4, 2),
        192: Config(32, 32, 4, 1),
        256: Config(32, 32, 8, 1),
    },
    ("attention_forward", 4): {
        16: Config(32, 32, 4, 1),
        32: Config(64, 32, 4, 1),
        64: Config(64, 32, 8, 1),
        80: Config(32, 16, 8, 1),
        96: Config(64, 32, 8, 1),
        128: Config(32, 16, 8, 1),
        192: Config(32, 16, 8, 1),
        256: Config(16, 16, 8, 1),
    },
    ("attention_backward_dq", 4): {
        16: Config(32, 32, 4, 2),
        32: Config(32, 32, 4, 1),
        64: Config(32, 32, 4, 2),
        80: Config(32, 32, 4, 3),
        96: Config(32, 32, 4, 3),
        128: Config(16, 16, 8, 3),
        192: Config(16, 16, 8, 3),
        256: Config(16, 16, 16, 2),
    },
    ("attention_backward_dkdv", 4): {
        16: Config(32, 32, 4, 1),
        32: Config(32, 32, 4, 1),
        64: Config(32, 32, 8, 1),
        80: Config(16, 32, 8, 1),
        96: Config(16, 32, 8, 1),
        128: Config(16, 32, 8, 1),
        192: WIDER,
        256: Config(16, 16, 8, 1),
    },
    ("attention_forward", "tf32"): {
        16: Config(128, 64, 8, 2),
        32: Config(128, 64, 8, 2),
        64: Config(128, 32, 8, 2),
        80: Config(64, 64, 8, 2),
        96: Config(128, 32, 8, 2),
        128: Config(128, 32, 8, 2),
        192: Config(32, 32, 4, 2),
        256: Config(32, 32, 4, 1),
    },
    ("attention_backward_dq", "tf32"): {
        16: Config(128, 64, 8, 2),
        32: Config(128, 64, 8, 2),
        64: Config(128, 32, 8, 2),
        80: Config(128, 32, 8, 2),
        96: Config(128, 32, 8, 2),
        128: Config(32, 32, 4, 2),
        192: Config(32, 32, 8, 2),
        256: Config(32, 32, 8, 1),
    },
    ("attention_backward_dkdv", "tf32"): {
        16: Config(64, 128, 8, 2),
        32: Config(64, 128, 8, 2),
        64: Config(32, 128, 8, 2),
        80: Config(16, 128, 8, 2),
        96: Config(16, 64, 4, 1),
        128: Config(32, 32, 4, 1),
        192: Config(32, 32, 8, 2),
        256: Config(16, 32, 8, 1),
    },
    # The fast backward pass. A tile of keys adds D floats to dQ for every query row it meets: with fewer than some 100 keys (50
    # in TF32) Hopper would be busier adding them than the two other kernels are with their products (predicted), so there is
    # no entry where tiles of that size spill. Nor for float32 without TF32, whose probabilities are made to sum to 1.
    ("attention_backward_fused", 2): {
        16: Config(64, 128, 8, 2),
        32: Config(64, 128, 8, 2),
        64: Config(64, 128, 8, 2),
        80: WIDER,
        96: WIDER,
        128: Config(32, 128, 8, 2),
        192: WIDER,
        256: None,
    },
    ("attention_backward_fused", "tf32"): {
        16: Config(64, 128, 8, 2),
        32: Config(32, 128, 8, 2),
        64: Config(32, 128, 8, 2),
        80: WIDER,
        96: WIDER,
        128: None,
        192: WIDER,
        256: None,
    },
    # No products: block_n is nothing.
    ("attention_backward_delta", 2): {
        16: Config(128, 0, 4, 1),
        32: Config(128, 0, 4, 1),
        64: Config(64, 0, 4, 1),
        80: Config(32, 0, 4, 1),
        96: Config(32, 0, 4, 1),
        128: Config(32, 0, 4, 1),
        192: Config(16, 0, 4, 1),
        256: Config(16, 0, 4, 1),
    },
    ("attention_backward_delta", "tf32"): {
        16: Config(128, 0, 4, 1),
        32: Config(128, 0, 4, 1),
        64: Config(64, 0, 4, 1),
        80: Config(32, 0, 4, 1),
        96: Config(32, 0, 4, 1),
        128: Config(32, 0, 4, 1),
        192: Config(16, 0, 8, 1),
        256: Config(16, 0, 8, 1),
    },
}

# Where the others want something else.
_AMPERE = {
    ("attention_forward", 2): {
        64: Config(128, 64, 8, 3),
        80: Config(128, 64, 8, 3),
        96: Config(128, 64, 8, 2),
        128: Config(128, 32, 8, 2),
        192: Config(32, 64, 4, 2),
        256: Config(32, 64, 4, 2),
    },
    ("attention_backward_dq", 2): {
        80: Config(128, 32, 8, 2),
        96: Config(128, 32, 8, 2),
        128: Config(64, 32, 4, 2),
        192: Config(32, 32, 4, 2),
        256: Config(32, 32, 4, 2),
    },
    ("attention_backward_dq", 4): {
        80: Config(32, 32, 8, 3),
    },
    ("attention_backward_dkdv", 4): {
        80: Config(32, 32, 8, 1),
    },
    ("attention_backward_dkdv", 2): {
        64: Config(32, 128, 8, 2),
        80: Config(32, 128, 8, 2),
        96: WIDER,
        128: Config(16, 128, 8, 2),
        256: Config(32, 32, 4, 1),
    },
    ("attention_forward", 4): {
        80: Config(32, 32, 8, 1),
        96: Config(64, 16, 8, 1),
        256: Config(16, 32, 8, 1),
    },
    ("attention_forward", "tf32"): {
        64: Config(128, 64, 8, 2),
        80: Config(128, 32, 8, 2),
        128: Config(64, 32, 4, 1),
        192: Config(32, 32, 4, 1),
    },
    ("attention_backward_dq", "tf32"): {
        32: Config(64, 32, 4, 2),
        64: Config(32, 32, 4, 2),
        80: Config(64, 16, 4, 2),
        96: Config(64, 16, 4, 2),
        128: Config(32, 32, 4, 1),
        192: Config(32, 32, 4, 1),
        256: Config(32, 16, 4, 1),
    },
    ("attention_backward_dkdv", "tf32"): {
        16: Config(32, 64, 4, 2),
        32: Config(32, 64, 4, 2),
        64: Config(32, 32, 4, 2),
        80: WIDER,
        96: WIDER,
    },
    ("attention_backward_fused", 2): {
        64: Config(32, 128, 8, 2),
        128: Config(32, 64, 8, 2),
    },
    ("attention_backward_fused", "tf32"): {
        16: Config(32, 128, 8, 2),
        64: Config(16, 64, 4, 1),
        128: Config(32, 32, 8, 1),
    },
}
_AMD = {
    ("attention_forward", 2): {
        96: Config(128, 64, 4, 3),
        128: Config(128, 32, 4, 1),
        192: Config(128, 64, 4, 1),
        256: Config(128, 32, 4, 1),
    },
    ("attention_backward_dq", 2): {
        64: Config(128, 32, 4, 1),
        80: Config(128, 64, 4, 2),
        96: Config(128, 64, 4, 2),
        128: Config(128, 32, 4, 1),
        192: Config(128, 32, 4, 1),
        256: Config(64, 16, 4, 1),
    },
    ("attention_backward_dkdv", 2): {
        16: Config(32, 128, 4, 1),
        32: Config(32, 128, 4, 1),
        64: Config(32, 128, 4, 1),
        80: Config(16, 128, 4, 1),
        96: Config(16, 128, 4, 1),
        128: Config(32, 128, 4, 1),
        192: Config(16, 64, 4, 1),
        256: Config(16, 64, 4, 1),
    },
    ("attention_forward", 4): {
        80: Config(64, 32, 8, 1),
        256: Config(16, 16, 4, 1),
    },
    ("attention_backward_dq", 4): {
        64: Config(32, 32, 8, 2),
        80: Config(16, 32, 8, 2),
        96: Config(16, 32, 8, 2),
        128: Config(16, 32, 8, 2),
        192: Config(32, 16, 4, 2),
        256: Config(32, 16, 4, 2),
    },
    ("attention_backward_dkdv", 4): {
        64: Config(16, 32, 4, 1),
        80: Config(16, 32, 4, 1),
        96: Config(16, 32, 4, 1),
        128: Config(16, 16, 4, 1),
        192: Config(16, 16, 4, 1),
        256: Config(16, 16, 4, 1),
    },
    ("attention_forward", "tf32"): {
        16: Config(64, 64, 4, 1),
        32: Config(64, 64, 4, 1),
        64: Config(64, 64, 4, 1),
        80: Config(64, 64, 4, 1),
        96: Config(64, 64, 4, 1),
        128: Config(64, 32, 8, 1),
        192: Config(64, 16, 8, 1),
        256: Config(32, 16, 8, 1),
    },
    ("attention_backward_dq", "tf32"): {
        16: Config(64, 32, 4, 1),
        32: Config(64, 32, 4, 1),
        64: Config(32, 32, 4, 1),
        80: Config(32, 32, 4, 1),
        96: Config(32, 32, 4, 1),
        128: Config(32, 16, 4, 1),
        192: Config(32, 16, 4, 1),
        256: Config(16, 16, 4, 1),
    },
    ("attention_backward_dkdv", "tf32"): {
        16: Config(32, 64, 4, 1),
        32: Config(32, 64, 4, 1),
        64: Config(32, 32, 4, 1),
        80: Config(32, 32, 4, 1),
        96: Config(32, 32, 4, 1),
        128: Config(16, 32, 4, 1),
        192: Config(16, 32, 4, 1),
        256: Config(16, 32, 4, 1),
    },
    ("attention_backward_fused", 2): {
        16: Config(16, 128, 4, 1),
        32: Config(16, 128, 4, 1),
        64: Config(16, 128, 4, 1),
        80: Config(16, 128, 4, 1),
        96: Config(16, 128, 4, 1),
        128: Config(16, 128, 4, 1),
    },
    ("attention_backward_fused", "tf32"): {
        16: Config(32, 64, 4, 1),
        32: Config(32, 64, 4, 1),
        64: Config(32, 32, 4, 1),
    },
}

# In place of the above where a tile has more columns than the head: looking where the head ends takes registers.
# (family, kernel, bytes per element or "tf32", columns). 16-bit heads that leave columns over are on record for every triton;
# float32 and TF32 were looked at once, with 3.8.
_PARTLY = {
    ("hopper", "attention_forward", 2, 96): Config(128, 64, 8, 2),
    ("hopper", "attention_backward_dq", 2, 32): Config(128, 32, 8, 2),
    ("hopper", "attention_backward_dq", 2, 96): Config(128, 32, 8, 2),
    ("hopper", "attention_forward", 4, 80): Config(32, 32, 8, 1),
    ("hopper", "attention_backward_dq", 4, 96): Config(32, 32, 4, 2),
    ("ampere", "attention_forward", 2, 128): Config(32, 64, 4, 2),
    ("ampere", "attention_backward_dq", 4, 192): Config(16, 16, 4, 2),
    ("ampere", "attention_backward_dkdv", 2, 80): Config(32, 128, 8, 1),
    ("ampere", "attention_backward_fused", 2, 64): Config(32, 64, 8, 2),
}


@cache
def tile_family(device: torch.device) -> str:
    """The family of a device; the CPU, where kernels are interpreted, counts as ``"hopper"``."""
    if torch.version.hip is not None:
        return "amd"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10, 11):
        return "ampere"
    return "hopper"


@cache
def has_tf32(device: torch.device) -> bool:
    """Whether triton makes TF32 products there: on NVIDIA and, as "xf32", on gfx942. It refuses them for other AMD GPUs."""
    if torch.version.hip is None:
        return True
    return device.type == "cuda" and torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942")


def kind_of(dtype: torch.dtype, allow_tf32: bool = False) -> int | str:
    """The second key of the tables: bytes per element, or ``"tf32"``."""
    return "tf32" if allow_tf32 and dtype == torch.float32 else dtype.itemsize


@cache
def config_for(kernel: str, dtype: torch.dtype, head_dim: int, family: str, allow_tf32: bool = False) -> Config | None:
    """The tile sizes of one kernel for one of :data:`FAMILIES`; ``None`` where the kernel is not used."""
    key = (kernel, kind_of(dtype, allow_tf32))
    own, common = {"hopper": {}, "ampere": _AMPERE, "amd": _AMD}[family].get(key, {}), _HOPPER.get(key, {})
    for columns in WIDTHS:
        width = sum(columns)
        found = own.get(width, common.get(width))
        if head_dim < width:
            found = _PARTLY.get((family, *key, width), found)
        if width >= head_dim and found != WIDER:
            return found and replace(found, columns=columns)
    raise ValueError(f"head dim {head_dim} is larger than {MAX_HEAD_DIM}")
