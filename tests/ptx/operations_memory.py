"""What PTX instructions do, as lines of numpy (see instructions.py): memory, warps and control.

The PTX ISA manual, 9.7, is the source.
"""

from __future__ import annotations

from .instructions import Emitter, handles, kind_of, space_of
from .program import SIZES, Instruction, PtxError

# ---------------------------------------------------------------- memory


@handles("ld", "ldu")
def _load(e: Emitter, i: Instruction) -> None:
    kind, space = kind_of(i), space_of(i)
    if space not in ("global", "shared", "param"):
        raise PtxError(f"{i.text}: {space} addresses are not known here")
    d, source = i.operands
    size, registers = SIZES[kind], d if type(d) is tuple else (d,)
    e.lines.append(f"loaded = run.load_{space}({e.address(source)}, {size}, {len(registers)}, {e.guard})")
    if "acquire" in i.parts or "volatile" in i.parts:
        e.lines.append(f"run.look({e.guard})")
    raw = kind if kind[0] == "s" else f"b{8 * size}"
    for n, register in enumerate(registers):
        e.write(register, f"loaded[{n}]" + (f".view(_{kind})" if kind[0] == "s" else ""), raw)


@handles("st")
def _store(e: Emitter, i: Instruction) -> None:
    size, space = SIZES[kind_of(i)], space_of(i)
    if space not in ("global", "shared"):
        raise PtxError(f"{i.text}: {space} addresses are not known here")
    to, values = i.operands
    values = values if type(values) is tuple else (values,)
    texts = ", ".join(e.array(v, f"b{8 * size}") for v in values)
    e.lines.append(f"run.store_{space}({e.address(to)}, {size}, [{texts}], {e.guard})")


@handles("atom", "red")
def _atomic(e: Emitter, i: Instruction) -> None:
    kind, space = kind_of(i), space_of(i)
    operation = next(p for p in i.parts[1:] if p in ("add", "min", "max", "exch", "cas", "and", "or", "xor"))
    operands = list(i.operands)
    d = operands.pop(0) if i.name == "atom" else None
    to, *values = operands
    lists = [v if type(v) is tuple else (v,) for v in values]
    d = d if type(d) is tuple else (d,)
    for n in range(len(lists[0])):
        place = e.address(to) + (f" + {n * SIZES[kind]}" if n else "")
        texts = ", ".join(e.array(v[n], kind) for v in lists)
        e.lines.append(f"before = run.atomic({space!r}, {operation!r}, {place}, [{texts}], {e.guard})")
        if i.name == "atom":
            e.write(d[n], "before", kind)


@handles("cp.async.cg", "cp.async.ca")
def _copy(e: Emitter, i: Instruction) -> None:
    to, source, size, *really = i.operands
    count = f"{e.array(really[0], 'b32')}" if really else "None"
    e.lines.append(f"run.copy_async({e.address(to)}, {e.address(source)}, {size.value}, {count}, {e.guard})")


@handles("cp.async.commit_group")
def _commit(e: Emitter, i: Instruction) -> None:
    e.lines.append(f"run.copy_commit({e.guard})")


@handles("cp.async.wait_group")
def _wait_group(e: Emitter, i: Instruction) -> None:
    e.lines.append(f"run.copy_wait({i.operands[0].value}, {e.guard})")


@handles("cp.async.wait_all")
def _wait_all(e: Emitter, i: Instruction) -> None:
    e.lines.append(f"run.copy_wait(None, {e.guard})")


@handles("membar", "fence", "prefetch", "prefetchu", "discard", "applypriority", "griddepcontrol", "nanosleep", "createpolicy")
def _nothing(e: Emitter, i: Instruction) -> None:
    """Memory is in order here, and there is no cache."""


# ---------------------------------------------------------------- warps


@handles("shfl.sync")
def _shuffle(e: Emitter, i: Instruction) -> None:
    d, a, b, c, members = i.operands
    texts = [e.array(x, "b32") for x in (a, b, c, members)]
    e.lines.append(f"moved, inside = run.shuffle({i.parts[2]!r}, {', '.join(texts)}, {e.guard})")
    e.keep(d, "moved")
    e.keep(i.pair, "inside")


@handles("vote.sync")
def _vote(e: Emitter, i: Instruction) -> None:
    d, a, members = i.operands
    kind = "b32" if i.parts[2] == "ballot" else "pred"
    e.write(d, f"run.vote({i.parts[2]!r}, {e.array(a, 'pred')}, {e.array(members, 'b32')}, {e.guard})", kind)


@handles("redux.sync")
def _reduce(e: Emitter, i: Instruction) -> None:
    d, a, members = i.operands
    e.write(d, f"run.reduce({i.parts[2]!r}, {e.array(a, kind_of(i))}, {e.array(members, 'b32')}, {e.guard})", kind_of(i))


@handles("bar.warp")
def _warp_barrier(e: Emitter, i: Instruction) -> None:
    e.lines.append(f"run.whole_warps({e.guard})")
    e.lines.append(f"run.warps_meet({e.guard})")


@handles("ldmatrix")
def _load_matrices(e: Emitter, i: Instruction) -> None:
    d, source = i.operands
    d = d if type(d) is tuple else (d,)
    e.lines.append(f"loaded = run.load_matrices({e.address(source)}, {len(d)}, {'trans' in i.parts}, {e.guard})")
    for n, register in enumerate(d):
        e.keep(register, f"loaded[{n}]")


@handles("stmatrix")
def _store_matrices(e: Emitter, i: Instruction) -> None:
    to, values = i.operands
    values = values if type(values) is tuple else (values,)
    texts = ", ".join(e.array(v, "b32") for v in values)
    e.lines.append(f"run.store_matrices({e.address(to)}, [{texts}], {'trans' in i.parts}, {e.guard})")


@handles("mma.sync")
def _matrix_product(e: Emitter, i: Instruction) -> None:
    shape = next(p for p in i.parts if p.startswith("m16"))
    to, a_kind, b_kind, c_kind = i.parts[-4:]
    if (to, c_kind) != ("f32", "f32") or i.parts[4:6] != ("row", "col"):
        raise PtxError(f"{i.text}: not known here")
    d, a, b, c = i.operands
    lists = [", ".join(e.array(x, kind) for x in part) for part, kind in ((a, "b32"), (b, "b32"), (c, "f32"))]
    e.lines.append(
        f"made = run.multiply_add({shape!r}, {(a_kind, b_kind)!r}, [{lists[0]}], [{lists[1]}], [{lists[2]}], {e.guard})"
    )
    for n, register in enumerate(d):
        e.write(register, f"made[{n}]", "f32")


# ---------------------------------------------------------------- control


@handles("bra")
def _branch(e: Emitter, i: Instruction) -> None:
    (target,) = i.operands[0].blocks
    if i.guard is None:
        e.lines.append(f"return {target}")
    else:
        e.lines.append(f"return run.branch(G, {target}, {e.number + 1}, M)")


@handles("brx.idx")
def _branch_by_table(e: Emitter, i: Instruction) -> None:
    if i.guard is not None:
        raise PtxError(f"{i.text}: not known here")
    index, jump = i.operands
    e.lines.append(f"return run.branch_by_table({e.array(index, 'b32')}, {jump.blocks}, M)")


@handles("ret", "exit")
def _leave(e: Emitter, i: Instruction) -> None:
    if i.guard is None:
        e.lines.append("return run.END")
    else:
        e.lines.append(f"return run.branch(G, run.END, {e.number + 1}, M)")


@handles("trap")
def _trap(e: Emitter, i: Instruction) -> None:
    e.lines.append(f"return run.trap({e.guard}, {e.number + 1})")


@handles("bar", "barrier")
def _barrier(e: Emitter, i: Instruction) -> None:
    kind = next(p for p in i.parts if p in ("sync", "red", "arrive"))
    if i.guard is not None:
        raise PtxError(f"{i.text}: a barrier under a predicate is not known here")
    operands = list(i.operands)
    source = d = None
    if kind == "red":
        d, operands = operands[0], operands[1:]
        source = operands.pop()
    name = e.array(operands[0], "b32")
    count = e.array(operands[1], "b32") if len(operands) > 1 else "None"
    if kind == "red":
        operation = next(p for p in i.parts if p in ("or", "and", "popc"))
        e.lines.append(f"run.barrier({name}, {count}, M, {operation!r}, {e.array(source, 'pred')}, {d.index})")
    else:
        e.lines.append(f"run.barrier({name}, {count}, M, {kind!r})")
    e.lines.append(f"return {e.number + 1}")
