"""Which backend runs, and what attention says no to: bad arguments, unsupported queries, explicit choices."""

import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from attention_truth import RAGGED, make

from hlip_kernels import Layout, attention
from hlip_kernels.backends import BACKENDS, Query


def good(rows=8, heads=2, dim=16, **options):
    return torch.randn(rows, heads, dim, **options)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda q, k, v: (q[:-1], k, v), ["q", "8", "7"]),
        (lambda q, k, v: (q, k[:, :1], v), ["k", "heads"]),
        (lambda q, k, v: (q, k, v[..., :8]), ["v", "head dim"]),
        (lambda q, k, v: (q, k.half(), v), ["k", "float16", "float32"]),
        (lambda q, k, v: (q, k, v.to("meta")), ["v", "meta"]),
        (lambda q, k, v: (q, k, v.flatten(1)), ["v", "dim"]),
        (lambda q, k, v: (q.int(), k.int(), v.int()), ["q", "int32"]),
        (lambda q, k, v: [t.to(torch.float8_e4m3fn) for t in (q, k, v)], ["q", "bfloat16", "float8_e4m3fn"]),
        (lambda q, k, v: (q, good(8, 16, 2).transpose(1, 2), v), ["k", "contiguous"]),
    ],
)
def test_bad_tensors_are_named(change, words):
    layout = Layout.from_lengths([3, 5], levels=("scan",))
    with pytest.raises((ValueError, TypeError)) as caught:
        attention(*change(good(), good(), good()), layout, "scan")
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"level": "voxel"}, ["voxel", "'slice'", "'study'"]),
        ({"level": "slice", "neighbours": -1}, ["neighbours", "-1"]),
        ({"level": "slice", "neighbours": 1.5}, ["neighbours", "1.5"]),
        ({"level": "study", "neighbours": 1}, ["neighbours", "study"]),
        ({"level": "scan", "summary": "slice"}, ["summary", "coarser"]),
        ({"level": "scan", "summary": "moon"}, ["moon"]),
        ({"level": "scan", "backend": "magic"}, ["magic", "'sdpa'"]),
        ({"level": "scan", "scale": torch.tensor(0.3)}, ["scale", "gradient", "multiply q"]),
        ({"level": "scan", "scale": torch.nn.Parameter(torch.tensor(0.3)), "backend": "reference"}, ["scale", "multiply q"]),
        ({"level": "scan", "scale": "0.3"}, ["scale", "'0.3'"]),
        ({"level": "scan", "scale": True}, ["scale", "True"]),
        ({"level": "scan", "scale": 1j}, ["scale", "1j"]),
        ({"level": "scan", "scale": float("nan")}, ["scale", "finite", "nan"]),
        ({"level": "scan", "scale": np.float32("inf")}, ["scale", "finite", "inf"]),
        ({"level": "scan", "scale": 10**400}, ["scale", "finite"]),
    ],
)
def test_bad_options_are_named(options, words):
    layout = make([[[8]]], 0)
    with pytest.raises((ValueError, TypeError)) as caught:
        attention(good(), good(), good(), layout, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_summary_without_prefix_rows_is_refused():
    with pytest.raises(ValueError, match="num_prefix=0"):
        attention(good(), good(), good(), make([[[8]]], 0), "slice", summary="study")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"q": good(68), "k": good(68), "v": good(68)}, ["R = 8", "(68, 2, 16)"]),
        ({"v": good(7)}, ["R = 8", "(7, 2, 16)"]),
        ({"k": good(8, 1)}, ["shape", "(8, 1, 16)"]),
        ({"k": good().half()}, ["dtype", "float16"]),
        ({"v": good(8, 16, 2).transpose(1, 2)}, ["contiguous", "strides (32, 1, 2)"]),
        ({"q": good(8, 2, 0)}, ["shape", "(8, 2, 0)"]),
    ],
)
def test_the_ops_themselves_refuse_what_kernels_would_read_beyond(change, words):
    pattern = make([[[8]]], 0).pattern("scan")
    rows = {name: good() for name in "qkv"}
    out, lse = torch.ops.hlip.attention(*rows.values(), pattern, 0.25, "auto")
    backward = torch.ops.hlip.attention_backward
    with pytest.raises(ValueError) as caught:
        torch.ops.hlip.attention(*(rows | change).values(), pattern, 0.25, "auto")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    with pytest.raises(ValueError) as caught:
        backward(out, None, *(rows | change).values(), out, lse, pattern, 0.25, "auto")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    for bad in ({"grad_out": good(9)}, {"out": good(9)}, {"lse": lse[:, 1:]}, {"grad_lse": lse.double()}):
        given = {"grad_out": out, "grad_lse": None, **rows, "out": out, "lse": lse} | bad
        with pytest.raises(ValueError, match=r"\(2, 7\)|\(9, 2, 16\)|float64 \(2, 8\)"):
            backward(*given.values(), pattern, 0.25, "auto")


def test_strides_of_nothing_mean_nothing():
    """Those of an expanded gradient are 0, also after contiguous()."""
    q = good(0).requires_grad_()
    attention(q, q, q, make([[[0]]], 0), "scan").sum().backward()
    assert q.grad.shape == q.shape


def test_a_layout_is_needed():
    with pytest.raises((ValueError, TypeError), match="layout"):
        attention(good(), good(), good(), [3, 5], "scan")


def test_a_named_backend_never_falls_back():
    q = good(dtype=torch.float64)
    with pytest.raises(NotImplementedError) as caught:
        attention(q, q, q, Layout.from_lengths([8], levels=("scan",)), "scan", backend="triton")
    for name in BACKENDS:
        assert f"  {name}: " in str(caught.value)
    assert "float64" in str(caught.value)


def test_every_refusal_has_a_reason():
    for device, capability in (("cpu", None), ("cuda", (7, 5)), ("cuda", (9, 0)), ("mps", None), ("xpu", None)):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.float8_e5m2):
            for head_dim in (8, 64, 512):
                for backend in BACKENDS.values():
                    support = backend.supports(Query(device, capability, dtype, head_dim))
                    assert bool(support) == (not support.reason)
                if dtype in (torch.int32, torch.float8_e5m2):
                    assert not any(
                        backend.supports(Query(device, capability, dtype, head_dim)) for backend in BACKENDS.values()
                    )


def test_auto_on_a_cpu_is_sdpa_and_its_answer():
    layout = make(RAGGED, 1)
    q, k, v = (good(layout.num_rows) for _ in range(3))
    assert torch.equal(attention(q, k, v, layout, "scan"), attention(q, k, v, layout, "scan", backend="sdpa"))


def test_scale():
    layout = make(RAGGED, 1)
    q, k, v = (good(layout.num_rows) for _ in range(3))
    expected = attention(q * 0.5, k, v, layout, "scan", scale=1.0)
    for half in (0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        torch.testing.assert_close(attention(q, k, v, layout, "scan", scale=half), expected)
    assert torch.equal(attention(q, k, v, layout, "scan", scale=np.int8(1)), attention(q, k, v, layout, "scan", scale=1.0))
    torch.testing.assert_close(attention(q, k, v, layout, "scan"), attention(q, k, v, layout, "scan", scale=16**-0.5))


def test_backends_can_be_done_without():
    code = "from hlip_kernels.backends import BACKENDS; print(*BACKENDS)"
    environment = os.environ | {"HLIP_KERNELS_WITHOUT": "hopper flash cuda_halves nonsense"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        name for name in BACKENDS if name not in ("hopper", "hopper_ordered", "flash", "cuda_halves")
    ]
    assert "names no backend with nonsense" in done.stderr


def test_without_any_that_could_run_it_auto_says_why():
    code = """
import torch
from hlip_kernels import Layout, attention
x = torch.ones(3, 1, 16)
attention(x, x, x, Layout.from_lengths([3]), "segment")
"""
    environment = os.environ | {"HLIP_KERNELS_WITHOUT": "reference sdpa triton"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "NotImplementedError: no backend can run" in done.stderr and "KeyError" not in done.stderr
