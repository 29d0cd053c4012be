"""The CUDA attention kernels on the CPU: their own source, run by the emulator (csrc/device/emulated.h), as a backend."""

import ctypes
import functools
import hashlib
import os
import tempfile
import time
from pathlib import Path

import emulation
import torch
from attention_truth import make
from emulation import CSRC, build, compiler, cuda_include

from hlip_kernels.backends.cuda import CudaBackend
from hlip_kernels.native import LOG2_E
from hlip_kernels.pattern import Plan

SOURCE = Path(__file__).parent / "emulator" / "short_attention.cpp"
SANITIZED = bool(os.environ.get("HLIP_EMULATE_SANITIZED"))  # then libasan must be preloaded: tests/test_short_attention.py


class View(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("row", ctypes.c_int64), ("head", ctypes.c_int64)]


class Tables(ctypes.Structure):
    _fields_ = [("packs", ctypes.c_void_p), ("starts", ctypes.c_void_p), ("records", ctypes.c_void_p)]


class Extent(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("packs", "alone", "rows", "shared")]
    _fields_ += [("large", 3 * ctypes.c_int64), ("small", 3 * ctypes.c_int64)]


class ForwardArguments(ctypes.Structure):
    _fields_ = [("q", View), ("k", View), ("v", View), ("out", ctypes.c_void_p), ("lse", ctypes.c_void_p), ("tables", Tables),
                ("heads", ctypes.c_int64), ("num_rows", ctypes.c_int64), ("scale_log2", ctypes.c_float)]  # fmt: skip


class BackwardArguments(ctypes.Structure):
    _fields_ = [("q", View), ("k", View), ("v", View), ("out", View), ("grad_out", View), ("lse", ctypes.c_void_p),
                ("grad_lse", ctypes.c_void_p), ("grad_lse_head", ctypes.c_int64), ("grad_lse_row", ctypes.c_int64),
                ("dq", ctypes.c_void_p), ("dk", ctypes.c_void_p), ("dv", ctypes.c_void_p), ("tables", Tables),
                ("heads", ctypes.c_int64), ("num_rows", ctypes.c_int64), ("scale", ctypes.c_float),
                ("scale_log2", ctypes.c_float)]  # fmt: skip


@functools.cache
def library(head_dim: int) -> ctypes.CDLL:
    """The kernels of one head dim."""
    return ctypes.CDLL(str(compiled(head_dim, SANITIZED)))


def compiled(head_dim: int, sanitized: bool) -> Path:
    """Compiles them, once for all processes: the file stays in the temporary folder, named by all it was made of."""
    folder = Path(tempfile.gettempdir(), f"hlip-emulated-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # somebody else's code must not be loaded
        folder = Path(tempfile.mkdtemp(prefix="hlip-emulated-"))
    kept = folder / f"{_made_of(head_dim, sanitized)}.so"
    if not kept.exists():
        for old in folder.glob("*.so"):  # of other sources; a process that still has it loaded keeps it
            if time.time() - old.stat().st_mtime > 24 * 3600:
                old.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:  # two workers may both be here: neither sees half a file
            made = build(SOURCE, Path(own, kept.name), f"HLIP_HEAD_DIM={head_dim}", shared=True, sanitized=sanitized)
            if _made_of(head_dim, sanitized) != kept.stem:  # somebody is editing
                return compiled(head_dim, sanitized)
            os.replace(made, kept)
    return kept


def _made_of(head_dim: int, sanitized: bool) -> str:
    """A digest of everything that decides what is compiled."""
    sources = [SOURCE, Path(emulation.__file__), *sorted(CSRC.glob("*.*h")), *sorted(CSRC.glob("*/*.*h"))]
    facts = [str(head_dim), str(sanitized), compiler(), str(Path(compiler()).stat().st_mtime_ns), str(cuda_include())]
    digest = hashlib.sha256("\0".join(facts).encode())
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


class Kernels:
    """Stands in for hlip_kernels.native. ``seed``: of the order in which threads run. ``blocks``: how many have run."""

    def __init__(self):
        self.seed = 1
        self.blocks = 0

    def short_attention_forward(self, q, k, v, packs, scale):
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        arguments = ForwardArguments(
            *map(_view, (q, k, v)), out.data_ptr(), lse.data_ptr(), _tables(packs), q.shape[1], q.shape[0], scale * LOG2_E
        )
        self._run("short_forward", q, packs, arguments)
        return out, lse

    def short_attention_backward(self, grad_out, grad_lse, q, k, v, out, lse, packs, scale, whole):
        grads = [torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v)]
        lse_gradient = (None, 0, 0) if grad_lse is None else (grad_lse.data_ptr(), *grad_lse.stride())
        arguments = BackwardArguments(
            *map(_view, (q, k, v, out, grad_out)), lse.data_ptr(), *lse_gradient, *(g.data_ptr() for g in grads),
            _tables(packs), q.shape[1], q.shape[0], scale, scale * LOG2_E,
        )  # fmt: skip
        self._run("short_backward", q, packs, arguments, whole)
        return tuple(grads)

    def _run(self, name, q, packs, arguments, whole=(0, (0, 0, 0), (0, 0, 0))):
        reason = ctypes.create_string_buffer(2000)
        shared, large, small = whole
        extent = Extent(len(packs.packs), len(packs.alone), packs.rows, shared, tuple(large), tuple(small))
        self.seed += 1
        self.blocks += len(packs.packs) * q.shape[1]
        failed = getattr(library(q.shape[2]), name)(
            int(q.dtype == torch.float16), ctypes.byref(arguments), ctypes.byref(extent), ctypes.c_uint64(self.seed), reason,
            ctypes.c_size_t(len(reason)),
        )  # fmt: skip
        if failed:
            raise RuntimeError(f"emulator: {reason.value.decode()}")


def _view(x):
    return View(x.data_ptr(), x.stride(0), x.stride(1))


def _tables(packs):
    return Tables(packs.packs.data_ptr(), packs.starts.data_ptr(), packs.records.data_ptr())


class EmulatedCudaBackend(CudaBackend):
    """The cuda backend as it is on an sm_90, but on CPU tensors."""

    def __init__(self, halves=False):
        super().__init__(halves)
        self.kernels = Kernels()

    def _why_not_here(self, query):
        return "" if query.device_type == "cpu" else "emulated: on the CPU only"


# Lengths of segments: tiny ones, which share packs, and those around the edges of tiles.
TINY = tuple(range(9))
EDGES = tuple(16 * n + d for n in (1, 2, 3, 4, 5, 8) for d in (-1, 0, 1))


def plan_of(lengths, num_prefix=0, row_multiple=1):
    """The plan of slices of these lengths, all in one scan."""
    return Plan.of(make([[lengths]], num_prefix, row_multiple).pattern("slice"))
