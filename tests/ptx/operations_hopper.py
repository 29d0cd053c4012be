"""What Hopper's PTX instructions do, as lines of numpy (see instructions.py): mbarriers, TMA, products of warpgroups."""

from __future__ import annotations

from .block_hopper import PARAMETERS
from .instructions import Emitter, handles
from .program import Instruction, PtxError, Symbol


@handles("cvta.param")
def _to_generic(e: Emitter, i: Instruction) -> None:
    d, a = i.operands
    e.write(d, f"({e.array(a, 'b64')} + _u64({PARAMETERS}))", "b64")


@handles("mbarrier.init")
def _init(e: Emitter, i: Instruction) -> None:
    at, count = i.operands
    e.lines.append(f"run.barrier_init({e.address(at)}, {e.array(count, 'b32')}, {e.guard})")


@handles("mbarrier.inval")
def _invalidate(e: Emitter, i: Instruction) -> None:
    e.lines.append(f"run.barrier_invalidate({e.address(i.operands[0])}, {e.guard})")


@handles("mbarrier.arrive")
def _arrive(e: Emitter, i: Instruction) -> None:
    sink, at, *number = i.operands
    if sink is not None:
        raise PtxError(f"{i.text}: the state of an mbarrier is not known here")
    value = e.array(number[0], "b32") if number else "None"
    expects = "expect_tx" in i.parts
    e.lines.append(
        f"run.barrier_arrive({e.address(at)}, {'None' if expects else value}, {value if expects else 'None'}, {e.guard})"
    )


@handles("mbarrier.try_wait", "mbarrier.test_wait")
def _wait(e: Emitter, i: Instruction) -> None:
    if "parity" not in i.parts or i.guard is not None:
        raise PtxError(f"{i.text}: not known here")
    d, at, parity, *_ = i.operands
    e.lines.append(f"return run.barrier_wait({e.address(at)}, {e.array(parity, 'b32')}, {d.index}, M, {e.number})")


@handles("cp.async.bulk.tensor")
def _copy_tile(e: Emitter, i: Instruction) -> None:
    if "complete_tx" not in i.parts or {"multicast", "im2col"}.intersection(i.parts) or len(i.operands) != 3:
        raise PtxError(f"{i.text}: not known here")
    to, (tensor_map, coordinates), barrier = i.operands
    if f"{len(coordinates)}d" not in i.parts:
        raise PtxError(f"{i.text}: not so many coordinates")
    places = ", ".join(e.array(c, "b32") for c in coordinates)
    if isinstance(tensor_map, Symbol):
        raise PtxError(f"{i.text}: a tensor map must be named by a generic address")
    e.lines.append(f"run.copy_tile({e.address(to)}, {e.array(tensor_map, 'b64')}, [{places}], {e.address(barrier)}, {e.guard})")


@handles("elect.sync")
def _elect(e: Emitter, i: Instruction) -> None:
    d, members = i.operands
    e.lines.append(f"lane, chosen = run.elect({e.array(members, 'b32')}, {e.guard})")
    e.keep(d, "lane")
    e.keep(i.pair, "chosen")


@handles("fence.proxy.async")
def _proxy_fence(e: Emitter, i: Instruction) -> None:
    where = i.parts[3:]
    if where not in ((), ("shared", "cta"), ("shared", "cluster"), ("global",)):
        raise PtxError(f"{i.text}: not known here")
    if where != ("global",):
        e.lines.append(f"run.fence_proxies({e.guard})")


@handles("setmaxnreg", "wgmma.fence", "cp.async.bulk.commit_group")
def _nothing(e: Emitter, i: Instruction) -> None:
    """Registers are not counted here, and their writes are in order."""


@handles("wgmma.mma_async")
def _product(e: Emitter, i: Instruction) -> None:
    shape = next(p for p in i.parts if p.startswith("m64"))
    to, a_kind, b_kind = i.parts[-3:]
    d, a, b, keep, *signs = i.operands
    known = a_kind == b_kind and a_kind in ("bf16", "f16", "tf32") and shape.endswith("k8" if a_kind == "tf32" else "k16")
    if to != "f32" or not known or any(s.value != 1 for s in signs[:2]):
        raise PtxError(f"{i.text}: not known here")
    ways = [bool(s.value) for s in signs[2:]]
    in_registers = type(a) is tuple
    transposed = ((False, *ways) if in_registers else tuple(ways)) if ways else (False, False)
    if len({register.index for register in d}) != len(d):
        raise PtxError(f"{i.text}: two accumulators in one register")
    left = [x.index for x in a] if in_registers else e.array(a, "b64")
    e.lines.append(
        f"run.product({shape!r}, {(a_kind, b_kind)!r}, {[x.index for x in d]}, {left}, {e.array(b, 'b64')}, "
        f"{e.array(keep, 'pred')}, {transposed!r}, {e.guard}, {i.text!r})"
    )


@handles("wgmma.commit_group")
def _commit(e: Emitter, i: Instruction) -> None:
    e.lines.append(f"run.product_commit({e.guard})")


@handles("wgmma.wait_group")
def _wait_group(e: Emitter, i: Instruction) -> None:
    e.lines.append(f"run.product_wait({i.operands[0].value}, {e.guard})")
