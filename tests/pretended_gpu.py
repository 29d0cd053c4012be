"""A pretended GPU: torch says of tensors on the CPU that they are on an H200, and every backend computes there with torch.

For code that is for GPUs alone, the GPU tests, the benchmarks, the tools, to be run where there is none: whether it runs at
all, names that are there, arguments that fit, paths that nobody has gone before. Nothing is learnt of kernels: they do not run.

    python -m pytest -p pretended_gpu tests/test_gpu.py
    python -m pretended_gpu tools/sanitizer_case.py        # any script or module, with its arguments

Where a tensor is supposed to be is known of those made on the CPU by name or by default, or copied there; results of operations
are always "on the GPU". So is what nobody said otherwise of, which is why some tests cannot run (``CANNOT``).
"""

from __future__ import annotations

import contextlib
import functools
import runpy
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # what they import must see torch as it is
import torch.nn.attention.flex_attention
import torch.nn.attention.varlen

GPU = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=8, total_memory=150 << 30,
    shared_memory_per_block_optin=227 << 10,
)  # fmt: skip
SMALLER = {  # constants of the modules with GPU tests
    "GRIDS": [[(2, 3, 4), (3, 4, 5), (2, 6, 6)], [], [(0, 2, 2), (1, 1, 1), (2, 5, 8)]],
    "SEGMENTS": 70,
    "LONGEST": 208,
    "REPEATS": 2,
}
CANNOT = {
    "graph": "no graph is captured", "tf32": "no product is in TF32",
    "equals_the_cpu": "what is on the CPU is not always known",
    "FlexAttention": "not compiled, it takes too long", "cuDNN": "an operation of CUDA alone", "same_bits": "takes too long",
    "roundings_at_most": "takes too long", "hlip flash": "its delegate is an operation of CUDA alone",
}  # fmt: skip


# --- where tensors are

_memory_of_host: dict[int, torch.UntypedStorage] = {}  # by address, kept so that no other tensor gets it
_pretending = True


def _on_host(t: torch.Tensor) -> torch.Tensor:
    _memory_of_host[t.untyped_storage().data_ptr()] = t.untyped_storage()
    if t.numel() == 0:
        t.is_on_host = True
    return t


def _is_on_host(t: torch.Tensor) -> bool:
    place = t.untyped_storage().data_ptr()
    return getattr(t, "is_on_host", False) or (place != 0 and place in _memory_of_host)


def _device(t: torch.Tensor) -> torch.device:
    real = torch._C.TensorBase.device.__get__(t)
    return real if not _pretending or real.type != "cpu" or _is_on_host(t) else GPU


@contextlib.contextmanager
def as_it_is():
    """While the block runs, tensors say where they are."""
    global _pretending
    _pretending = False
    try:
        yield
    finally:
        _pretending = True


def _real(x):
    """An argument that may be a device, for torch."""
    if isinstance(x, (str, torch.device)) and str(x).startswith("cuda"):
        return torch.device("cpu")
    return x


def _wanted(arguments) -> str | None:
    """The kind of device that one of the arguments names."""
    for x in arguments:
        if isinstance(x, torch.Tensor):
            return x.device.type
        if isinstance(x, (str, torch.device)) and str(x).split(":")[0] in ("cuda", "cpu"):
            return str(x).split(":")[0]
    return None


def _move(t: torch.Tensor, *args, _to=torch.Tensor.to, **options) -> torch.Tensor:
    """``Tensor.to``."""
    made = _to(t, *map(_real, args), **{name: _real(x) for name, x in options.items()})
    if not _pretending:
        return made
    wanted = _wanted([*args, *options.values()]) or t.device.type
    if wanted == t.device.type:
        return _on_host(made) if wanted == "cpu" else made
    return _on_host(made.clone()) if wanted == "cpu" else made.clone()


def _made(factory):
    """A function that makes tensors: on the CPU, unless it is told the GPU or has one there to go by."""
    goes_by = factory.__name__.endswith("_like") or factory.__name__.startswith("new_")

    @functools.wraps(factory)
    def make(*args, **options):
        device = options.get("device")
        if device is not None:
            options["device"] = _real(device)
        on_gpu = str(device).startswith("cuda") or (device is None and goes_by and args[0].device.type == "cuda")
        t = factory(*args, **options)
        return t if on_gpu or not _pretending else _on_host(t)

    return make


class _Generator(torch.Generator):
    def __new__(cls, device="cpu", _made=torch.Generator):
        return _made(_real(device))


# --- torch.cuda


class Event:
    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self, stream=None):
        self.at = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)

    def synchronize(self): ...


class Stream:
    cuda_stream = 0

    def wait_stream(self, stream): ...

    def wait_event(self, event): ...

    def record_event(self, event=None):
        return event or Event()


_CUDA = dict(
    is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, is_initialized=lambda: True,
    get_device_capability=lambda device=None: (9, 0), get_device_name=lambda device=None: PROPERTIES.name,
    get_device_properties=lambda device=None: PROPERTIES, is_bf16_supported=lambda *_: True,
    device=lambda device: contextlib.nullcontext(), set_device=lambda device: None, synchronize=lambda device=None: None,
    Event=Event, Stream=Stream, stream=lambda stream: contextlib.nullcontext(), current_stream=lambda device=None: Stream(),
    is_current_stream_capturing=lambda: False, set_sync_debug_mode=lambda mode: None, _sleep=lambda cycles: None,
    empty_cache=lambda: None, mem_get_info=lambda device=None: (1 << 30, 150 << 30), memory_allocated=lambda device=None: 0,
    max_memory_allocated=lambda device=None: 0, reset_peak_memory_stats=lambda device=None: None,
)  # fmt: skip
_FACTORIES = (
    "empty zeros ones full rand randn randint randperm arange linspace eye tensor as_tensor empty_like zeros_like ones_like "
    "full_like rand_like randn_like from_numpy"
).split()


def install() -> None:
    """From here on this process has a GPU, to all appearances."""
    for name in _FACTORIES:
        setattr(torch, name, _made(getattr(torch, name)))
    for name in ("new_zeros", "new_empty", "new_full", "new_tensor", "new_ones"):
        setattr(torch.Tensor, name, _made(getattr(torch.Tensor, name)))
    torch.Generator = _Generator
    torch.Tensor.device = property(_device)
    torch.Tensor.is_cuda = property(lambda t: t.device.type == "cuda")
    torch.Tensor.is_cpu = property(lambda t: t.device.type == "cpu")
    torch.Tensor.to = _move
    torch.Tensor.cuda = lambda t, *args, **options: _move(t, "cuda")
    torch.Tensor.cpu = lambda t: _move(t, "cpu")
    torch.Tensor.record_stream = lambda t, stream: None
    for name, value in _CUDA.items():
        setattr(torch.cuda, name, value)
    torch.compile = lambda function=None, **_: function if function is not None else (lambda f: f)
    torch.nn.attention.varlen.varlen_attn = _varlen
    _install_backends()


def _varlen(q, k, v, cu_seq_q, cu_seq_k, *_):
    places = cu_seq_q.tolist()
    parts = [[t[a:b].transpose(0, 1)[None] for t in (q, k, v)] for a, b in zip(places, places[1:], strict=False)]
    return torch.cat([torch.nn.functional.scaled_dot_product_attention(*p)[0].transpose(0, 1) for p in parts])


def _install_backends() -> None:
    """Every backend but the reference answers as on an H200 and computes as sdpa does on a CPU, in float32."""
    from hlip_kernels import native
    from hlip_kernels.backends import BACKENDS
    from hlip_kernels.backends.sdpa import SdpaBackend

    cpu = SdpaBackend()

    def forward(self, q, k, v, plan, scale, numerics):
        with as_it_is():
            out, lse = cpu.forward(*(t.float() for t in (q, k, v)), plan, scale, numerics)
            return out.to(q.dtype), lse

    def backward(self, grad_out, grad_lse, q, k, v, out, lse, plan, scale, numerics):
        with as_it_is():
            exact = [t.float() for t in (q, k, v)]
            out, lse = cpu.forward(*exact, plan, scale, numerics)
            grads = cpu.backward(grad_out.float(), grad_lse, *exact, out, lse, plan, scale, numerics)
            return tuple(t.to(q.dtype) for t in grads)

    for name, backend in BACKENDS.items():
        if name != "reference":
            kind = type(backend)
            backend.__class__ = type(f"Pretended{kind.__name__}", (kind,), {"forward": forward, "backward": backward})
    if not native.why_missing():  # the small operations run on the CPU, from the same source
        native._target = lambda x: contextlib.nullcontext(native._C.Target(True, 0))


# --- as a plugin of pytest, and from the command line


def pytest_configure(config):
    install()
    from benchmarks import measure, workloads

    full = workloads.make
    workloads.make = lambda name, *, full, make=full: make(name, full=False)
    measure.full_size = lambda: False
    measure.ENOUGH = {"cuda": 0.05, "cpu": 0.1}
    measure._flush = lambda: None  # there is no cache to empty
    measure.ceilings = lambda: (9e14, 4e12)


def pytest_addoption(parser):
    parser.addoption("--each", type=int, help="run so many cases of each test function, from the first to the last of them")


def pytest_collection_modifyitems(config, items):
    each = config.getoption("--each")
    if each:
        cases = {}
        for item in items:
            if not any(part in item.name for part in CANNOT):
                cases.setdefault(item.function, []).append(item)
        items[:] = [
            found[place]
            for found in cases.values()
            for place in sorted({i * (len(found) - 1) // max(each - 1, 1) for i in range(each)})
        ]
    for item in items:
        for name in SMALLER.keys() & vars(item.module).keys():
            setattr(item.module, name, SMALLER[name])
        for part, reason in CANNOT.items():
            if part in item.name:
                item.add_marker(pytest.mark.skip(reason=f"on a pretended GPU: {reason}"))


if __name__ == "__main__":
    import pretended_gpu  # this module under its own name, by which others know it

    pretended_gpu.install()
    sys.argv = sys.argv[1:]
    run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
    run(sys.argv[0], run_name="__main__")
