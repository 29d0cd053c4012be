"""A small run of every kernel, for compute-sanitizer: ragged, with empty segments, prefix rows and dead rows.

python tools/sanitizer_case.py                  # all of it
python tools/sanitizer_case.py triton cuda      # parts
"""

from __future__ import annotations

import argparse

import torch

from hlip_kernels import Layout, attention, patchify, segment_mean, switch_level
from hlip_kernels.backends import BACKENDS, Query
from hlip_kernels.backends.triton import config
from hlip_kernels.pattern import Plan

DTYPES = (torch.bfloat16, torch.float32)


def layout() -> Layout:
    grids = [[(2, 5, 7), (3, 9, 9)], [], [(0, 2, 2), (1, 1, 1), (2, 8, 16)]]
    return Layout.from_grids(grids, num_prefix=2, row_multiple=64).to("cuda")


def inputs(rows: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, 3, 2, head_dim, device="cuda", dtype=dtype, requires_grad=True)


def triton() -> None:
    ragged = layout()
    config.FUSED_FROM = 0  # the fast backward pass on segments as small as these
    for dtype in DTYPES:
        for head_dim in (64, 80):
            qkv = inputs(ragged.num_rows, head_dim, dtype)
            for level, options in (("slice", {}), ("study", {}), ("slice", {"neighbours": 1, "summary": "study"})):
                out, lse = attention(*qkv.unbind(1), ragged, level, backend="triton", return_lse=True, **options)
                (out.float().sum() + lse.sum()).backward()
            attention(*qkv.unbind(1), ragged, "study", backend="triton", deterministic=False).float().sum().backward()


def cuda() -> None:
    """Whole slices in shared memory; 9 x 9 alone, the others in packs. Then so many that a block goes from one to the next."""
    ragged = layout()
    for head_dim in (64, 80):
        qkv = inputs(ragged.num_rows, head_dim, torch.bfloat16)
        query = Query.of(qkv[:, 0], Plan.of(ragged.pattern("slice")))
        for backend in ("cuda", *(["cuda_halves"] if BACKENDS["cuda_halves"].supports(query) else [])):
            out, lse = attention(*qkv.unbind(1), ragged, "slice", backend=backend, return_lse=True)
            (out.float().sum() + lse.sum()).backward()
    count = torch.cuda.get_device_properties("cuda").multi_processor_count + 8
    for lengths in ([66, 90] * count, [140, 66] * (count // 2 + 1)):
        many = Layout.from_lengths(lengths, num_prefix=1, levels=("slice",)).to("cuda")
        qkv = inputs(many.num_rows, 64, torch.bfloat16)
        attention(*qkv.unbind(1), many, "slice", backend="cuda").float().sum().backward()


def long_segments() -> None:
    """The Hopper kernels, for long segments and for whole ones, and the flash delegate, where they can."""
    ragged = layout()
    for head_dim in (64, 128):
        qkv = inputs(ragged.num_rows, head_dim, torch.bfloat16)
        query = Query.of(qkv[:, 0], Plan.of(ragged.pattern("study")))
        for backend in ("hopper", "hopper_ordered", "flash"):
            if backend in BACKENDS and BACKENDS[backend].supports(query):
                for level, fast in (("study", False), ("study", True), ("slice", False)):
                    out = attention(*qkv.unbind(1), ragged, level, backend=backend, deterministic=not fast)
                    out.float().sum().backward()
                print(f"{backend} ran at head dim {head_dim}")


def small() -> None:
    ragged = layout()
    for dtype in DTYPES:
        x = torch.randn(ragged.num_rows, 40, device="cuda", dtype=dtype, requires_grad=True)
        y = switch_level(switch_level(x * 1, ragged, "slice", "scan"), ragged, "scan", "slice")
        (segment_mean(y, ragged, "scan").float().sum() + segment_mean(y, ragged, "study").float().sum()).backward()
    volumes = [torch.rand(5, 17, 33, device="cuda", requires_grad=True), torch.rand(9, 8, 16, device="cuda")]
    patchify(volumes, (2, 8, 8), mean=0.449, std=0.226).sum().backward()


PARTS = {"triton": triton, "cuda": cuda, "long": long_segments, "small": small}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("part", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    args = parser.parse_args(argv)
    if unknown := set(args.part) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for name, run in PARTS.items():
        if name in (args.part or PARTS):
            run()
            torch.cuda.synchronize()
            print(f"{name}: every kernel ran")


if __name__ == "__main__":
    main()
