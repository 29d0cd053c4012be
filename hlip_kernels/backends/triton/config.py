"""Tile sizes of the Triton kernels: a readable table, no autotuning, no dependence on sequence length.

Keyed on kernel, element size and padded head dim. Predicted from registers and shared memory
(``python -m hlip_kernels.resources`` prints both), not yet measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """``block_m`` query rows and ``block_n`` key rows a tile, ``num_warps`` warps, ``num_stages`` of loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


KERNELS = ("attention_forward", "attention_backward_dq", "attention_backward_dkdv")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 128

# (kernel, bytes per element) -> {padded head dim: Config}. No entry spills a register on sm_80, sm_90 or sm_100, and each
# fits the 99 KB of shared memory of sm_86, sm_89 and sm_120; tests/test_triton_compile.py holds them to that.
_NVIDIA = {
    ("attention_forward", 2): {
        16: Config(128, 64, 4, 3),
        32: Config(128, 64, 4, 3),
        64: Config(128, 64, 4, 3),
        128: Config(64, 64, 4, 2),
    },
    ("attention_backward_dq", 2): {
        16: Config(128, 32, 4, 2),
        32: Config(128, 32, 4, 2),
        64: Config(128, 64, 8, 2),
        128: Config(64, 32, 4, 2),
    },
    ("attention_backward_dkdv", 2): {
        16: Config(64, 128, 8, 2),
        32: Config(64, 128, 8, 2),
        64: Config(64, 128, 8, 2),
        128: Config(32, 64, 8, 2),
    },
    ("attention_forward", 4): {
        16: Config(64, 32, 8, 1),
        32: Config(64, 32, 4, 1),
        64: Config(64, 32, 8, 1),
        128: Config(32, 32, 8, 1),
    },
    ("attention_backward_dq", 4): {
        16: Config(32, 32, 4, 1),
        32: Config(32, 32, 4, 1),
        64: Config(32, 32, 4, 2),
        128: Config(32, 16, 8, 2),
    },
    ("attention_backward_dkdv", 4): {
        16: Config(32, 32, 4, 1),
        32: Config(32, 32, 4, 1),
        64: Config(32, 32, 8, 1),
        128: Config(16, 32, 8, 1),
    },
}

# Where AMD (64 threads a warp, 64 KB of shared memory) wants something else.
_AMD = {
    ("attention_backward_dq", 4): {
        16: Config(32, 32, 4, 1),
        32: Config(32, 32, 4, 1),
        64: Config(32, 32, 8, 2),
        128: Config(16, 32, 8, 2),
    },
    ("attention_backward_dkdv", 2): {
        16: Config(64, 64, 4, 1),
        32: Config(64, 64, 4, 1),
        64: Config(32, 64, 4, 1),
        128: Config(32, 64, 4, 1),
    },
    ("attention_backward_dkdv", 4): {
        16: Config(32, 32, 4, 1),
        32: Config(32, 32, 4, 1),
        64: Config(16, 32, 4, 1),
        128: Config(16, 16, 4, 1),
    },
}


def padded_head_dim(head_dim: int) -> int:
    """The power of two a tile of ``head_dim`` columns is padded to (at least 16, the smallest ``tl.dot`` takes)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def config_for(kernel: str, dtype: torch.dtype, head_dim: int, *, amd: bool | None = None) -> Config:
    """The tile sizes of one kernel; ``amd`` defaults to what this torch was built for."""
    if amd is None:
        amd = torch.version.hip is not None
    key = kernel, dtype.itemsize
    table = _AMD[key] if amd and key in _AMD else _NVIDIA[key]
    return table[padded_head_dim(head_dim)]
