"""Small hand-written PTX kernels: what the tests of the PTX machine wrap their instructions in."""

from __future__ import annotations

import struct

import numpy as np

from ptx.machine import launch
from ptx.memory import Memory
from ptx.program import PtxError, parse

HEADER = ".version 8.7\n.target sm_90a\n.address_size 64\n"
_REGISTERS = ".reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>, %t; .reg .f32 %f<16>; .reg .b64 %rd<16>; .reg .f64 %fd<4>;"


def place(arrays) -> tuple[Memory, list[np.ndarray]]:
    """Memory with a copy of each array, at a multiple of 256 and with a gap behind, and the copies."""
    memory, copies = Memory(), []
    for array in arrays:
        room = np.zeros(array.nbytes + 512, np.uint8)
        start = -room.ctypes.data % 256
        copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        memory.allow(copy.ctypes.data, copy.nbytes)
        copies.append(copy)
    return memory, copies


def run(body: str, *arrays, threads=32, grid=(1, 1, 1), shared=0, module="", seed=0) -> list[np.ndarray]:
    """Runs ``body`` and gives back what it made of the arrays.

    It finds in ``%t`` its thread (along x), in ``%a0``, ``%a1``, ... the addresses of the arrays, and in ``%e0``, ... those of
    their rows number ``%t``."""
    arrays = [np.ascontiguousarray(a) for a in arrays]
    memory, copies = place(arrays)
    setup = "".join(
        f"ld.param.u64 %a{n}, [kernel_param_{n}]; mad.wide.u32 %e{n}, %t, {a.strides[0]}, %a{n};\n"
        for n, a in enumerate(arrays)
    )
    parameters = ", ".join(f".param .u64 kernel_param_{n}" for n in range(len(arrays)))
    text = f"""{HEADER}{module}
    .visible .entry kernel({parameters})
    {{
        {_REGISTERS} .reg .b64 %a<{len(arrays) + 1}>, %e<{len(arrays) + 1}>;
        mov.u32 %t, %tid.x;
        {setup}
        {body}
        ret;
    }}"""
    block = threads if isinstance(threads, tuple) else (threads, 1, 1)
    pointers = struct.pack(f"<{len(copies)}Q", *(c.ctypes.data for c in copies))
    launch(parse(text)["kernel"], grid, block, shared, pointers, memory, seed)
    return copies


def calculate(code: str, out, *inputs) -> np.ndarray:
    """What ``code`` leaves in register ``d``, of type ``out``: run with a thread for each element of the inputs.

    These are in registers ``a``, ``b``, ``c`` and ``e``. It may use the predicates ``p``, ``q`` and ``s`` too."""
    inputs = [np.asarray(x) for x in inputs]
    result = np.zeros(len(inputs[0]), out)
    lines = [".reg .pred p, q, s;"]
    for name, array in zip("abce", inputs, strict=False):
        bits = 8 * array.itemsize
        lines.append(f".reg .b{bits} {name}; ld.global.b{bits} {name}, [%e{'abce'.index(name)}];")
    bits = 8 * result.itemsize
    body = f"{' '.join(lines)} .reg .b{bits} d; {code} st.global.b{bits} [%e{len(inputs)}], d;"
    return run(body, *inputs, result, threads=len(result))[-1]


def each(body: str, threads=64, values=None, **options) -> list[int]:
    """What ``body`` leaves in ``%r0`` of each thread. ``values``, one for each or else its number, are in ``%r9``."""
    values = np.arange(threads, dtype=np.int32) if values is None else np.asarray(values)
    body = f"mov.b32 %r0, -1; ld.global.b32 %r9, [%e1]; {body} OUT: st.global.b32 [%e0], %r0;"
    return run(body, np.full(threads, -2, np.int32), values, threads=threads, **options)[0].tolist()


__all__ = ["HEADER", "PtxError", "calculate", "each", "launch", "parse", "place", "run"]
