"""Turns a block of PTX instructions into a Python function over numpy arrays: one element for each thread.

A register is an array of the unsigned type of its size (predicates: bool); a function looks at it as the type an instruction
names. Arithmetic is done for all threads, results are kept where the instruction is executed: ``G`` is ``None`` when that is
everywhere, else an array of bool.
"""

from __future__ import annotations

import numpy as np

from . import numbers
from .numbers import DTYPES, RAW
from .program import SIZES, WAITING, Address, Block, Immediate, Instruction, Kernel, Not, PtxError, Register, Special, Symbol

COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
UNORDERED = {"equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}
REFUSED = {"sat", "satfinite", "relu", "xorsign", "cc", "rz", "rm", "rp", "rs"}  # what would change a result
_SPACES = ("global", "shared", "param", "local", "const")


class Emitter:
    """Writes the function of one block. ``masked``: for when only some threads run it."""

    def __init__(self, kernel: Kernel, number: int, masked: bool):
        self.kernel, self.number, self.masked = kernel, number, masked
        self.lines: list[str] = []
        self.constants: dict[str, object] = {}
        self.guard = "None"
        self.flushes = False

    def function(self, block: Block):
        """``f(run, R, M) -> next block``: a number, or an array of one for each thread."""
        for instruction in block.instructions:
            try:
                self.emit(instruction)
            except (KeyError, ValueError, IndexError, TypeError, AttributeError, StopIteration) as error:
                raise PtxError(
                    f"{self.kernel.name}: not understood: {instruction.text} ({type(error).__name__}: {error})"
                ) from error
        last = block.instructions[-1] if block.instructions else None
        if last is None or not self._leaves(last):
            self.lines.append(f"return {self.number + 1}")
        source = "def f(run, R, M):\n" + "".join(f"    {line}\n" for line in self.lines)
        names = {"np": np, "nb": numbers, **{f"_{k}": v for k, v in DTYPES.items()}, **self.constants}
        exec(compile(source, f"<{self.kernel.name} block {self.number}>", "exec"), names)
        return names["f"]

    @staticmethod
    def _leaves(instruction: Instruction) -> bool:
        name = instruction.name
        if ".".join(instruction.parts[:2]) in WAITING:
            return True
        return name in ("bra", "brx", "ret", "exit", "trap") or (name in ("bar", "barrier") and instruction.parts[1] != "warp")

    # ------------------------------------------------------------ operands

    def constant(self, value) -> str:
        name = f"K{len(self.constants)}"
        self.constants[name] = value
        return name

    def read(self, operand, kind: str) -> str:
        """An expression of the operand's value as ``kind``: an array, or a numpy scalar for a literal. ``.ftz`` flushes."""
        text = self._read(operand, kind)
        return f"nb.flush({text})" if self.flushes and kind == "f32" else text

    def _read(self, operand, kind: str) -> str:
        size = SIZES[kind]
        if isinstance(operand, Register):
            text, have = f"R[{operand.index}]", SIZES[operand.type]
            if operand.type == "pred":
                return text
            if have != size:
                text = f"{text}.astype(_b{8 * size})"
            return text if kind[0] in "bu" else f"{text}.view(_{kind})" if kind in DTYPES else text
        if isinstance(operand, Immediate):
            if kind == "pred":
                return self.constant(np.bool_(operand.value))
            if operand.size:
                value = np.array(operand.value, RAW[operand.size]).view(DTYPES[f"f{8 * operand.size}"])[()]
                return self.constant(DTYPES[kind](value) if kind[0] == "f" else np.array(value).view(RAW[size])[()])
            raw = np.array(operand.value & ((1 << 8 * size) - 1), RAW[size])
            return self.constant(raw.view(DTYPES.get(kind, RAW[size]))[()])
        if isinstance(operand, Special):
            return f"run.special({operand.name!r})" + ("" if size == 4 else f".astype(_b{8 * size})")
        if isinstance(operand, Symbol):
            return self.constant(RAW[size](operand.offset))
        if isinstance(operand, Not):
            return f"(~{self.read(operand.register, kind)})"
        raise PtxError(f"an operand that is not understood: {operand}")

    def array(self, operand, kind: str) -> str:
        """The same, surely an array."""
        text = self.read(operand, kind)
        return f"run.all({text})" if isinstance(operand, (Immediate, Symbol)) else text

    def write(self, register: Register | None, text: str, kind: str) -> None:
        """Puts the value of an expression of type ``kind`` into a register."""
        if register is None:
            return
        size, have = SIZES[kind], SIZES[register.type]
        if kind == "pred":
            made = text
        elif size == have:
            made = f"({text}).view(_b{8 * have})" if kind in DTYPES and kind[0] not in "bu" else text
        elif kind[0] == "s" and size < have:
            made = f"({text}).astype(_s{8 * have}).view(_b{8 * have})"
        elif kind[0] == "f":
            made = f"({text}).view(_b{8 * size}).astype(_b{8 * have})"
        else:
            made = f"({text}).astype(_b{8 * have})"
        self.keep(register, made)

    def keep(self, register: Register | None, raw: str) -> None:
        if register is None:
            return
        if not isinstance(register, Register):
            raise PtxError(f"{register} is no register")
        at = f"R[{register.index}]"
        self.lines.append(f"{at} = {raw}" if self.guard == "None" else f"{at} = np.where({self.guard}, {raw}, {at})")

    def address(self, operand: Address) -> str:
        """An int64 array of addresses."""
        base = operand.base
        wide = self.array(base, "b64" if SIZES.get(getattr(base, "type", "b64")) == 8 else "b32")
        if not (isinstance(base, Register) and SIZES[base.type] == 8):
            wide = f"{wide}.astype(_s64)"
        else:
            wide = f"{wide}.view(_s64)"
        return f"({wide} + {operand.offset})" if operand.offset else wide

    # ------------------------------------------------------------ dispatch

    def emit(self, instruction: Instruction) -> None:
        self.guard = "M" if self.masked else "None"
        self.flushes = "ftz" in instruction.parts
        refused = REFUSED.intersection(instruction.parts)
        if refused:
            raise PtxError(f"{instruction.text}: .{min(refused)} is not known here")
        if instruction.guard is not None:
            register, negated = instruction.guard
            if not isinstance(register, Register):
                raise PtxError(f"{instruction.text}: its predicate is not declared")
            condition = f"{'~' if negated else ''}R[{register.index}]"
            self.lines.append(f"G = {condition} & {'M' if self.masked else 'run.everyone'}")
            self.guard = "G"
        find(instruction.parts)(self, instruction)


def space_of(instruction: Instruction) -> str:
    """The state space an instruction names."""
    return next((p for p in instruction.parts if p in _SPACES), "generic")


def kind_of(instruction: Instruction) -> str:
    """The type an instruction names last."""
    return instruction.parts[-1]


_HANDLERS: dict[str, object] = {}


def handles(*names: str):
    """Registers the function for opcodes that begin so; the longest beginning wins."""

    def add(function):
        for name in names:
            _HANDLERS[name] = function
        return function

    return add


def find(parts: tuple[str, ...]):
    for length in range(len(parts), 0, -1):
        handler = _HANDLERS.get(".".join(parts[:length]))
        if handler:
            return handler
    raise PtxError(f"{'.'.join(parts)} is not known here")
