"""The memory-bound ops: share of the copy bandwidth each reaches."""

import pytest
import torch

from benchmarks.measure import device, dtype, full_size, run
from hlip_kernels import patchify, segment_mean, switch_level


@pytest.fixture
def rows(workload):
    w = workload("brain_mri_h3")
    dim = 768 if full_size() else 128
    return w.layout.to(device()), torch.randn(w.layout.num_rows, dim, device=device(), dtype=dtype())


@pytest.mark.parametrize("level", ["slice", "scan", "study"])
def test_segment_mean(benchmark, rows, level):
    layout, x = rows
    benchmark.group = "segment_mean"
    with torch.no_grad():
        run(
            benchmark, lambda: segment_mean(x, layout, level), nbytes=x[: layout.num_tokens].nbytes,
            what="segment_mean", part="forward", workload="brain_mri_h3", level=level, implementation="hlip",
        )  # fmt: skip


@pytest.mark.parametrize("old, new", [("slice", "scan"), ("scan", "study"), ("study", "slice")])
def test_switch_level(benchmark, rows, old, new):
    layout, x = rows
    tail = x[layout.num_tokens :].nbytes
    benchmark.group = "switch_level"
    with torch.no_grad():
        run(
            benchmark, lambda: switch_level(x, layout, old, new), nbytes=2.0 * tail,
            what="switch_level", part="forward", workload="brain_mri_h3", level=f"{old} to {new}", implementation="hlip",
        )  # fmt: skip


@pytest.mark.parametrize("stored", [torch.uint8, torch.int16, torch.float32])
def test_patchify(benchmark, workload, stored):
    w = workload("uncurated_mri")
    patch = (4, 16, 16)
    shapes = [tuple(n * p for n, p in zip(grid, patch, strict=True)) for study in w.layout.grids for grid in study]
    voxels = torch.randint(0, 255, (sum(a * b * c for a, b, c in shapes),), device=device()).to(stored)
    benchmark.group = "patchify"
    run(
        benchmark, lambda: patchify(voxels, patch, shapes=shapes, mean=0.449, std=0.226, max_value=255, dtype=dtype()),
        nbytes=voxels.nbytes + float(voxels.numel() * dtype().itemsize),
        what="patchify", part="forward", workload="uncurated_mri", level=str(stored).split(".")[1], implementation="hlip",
    )  # fmt: skip
