"""Reads PTX text: entries, their parameters, registers and shared variables, and instructions in basic blocks."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

# Bytes of a value of each type. Predicates have no size in memory.
SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4,
         "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16, "pred": 0}  # fmt: skip
SHARED_BASE = 1024  # where a block's shared memory begins in its window: what lies below is the system's

_NAME = r"[A-Za-z_$%][\w$]*"
_ENTRY = re.compile(rf"(?:\.visible\s+|\.weak\s+)*\.entry\s+({_NAME})\s*\(([^)]*)\)([^{{]*)\{{")
_PARAMETER = re.compile(
    rf"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?({_NAME})(?:\[(\d+)\])?"
)
_SHARED = re.compile(rf"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+({_NAME})(\[(\d*)\])?")
_REGISTERS = re.compile(rf"({_NAME})(?:<(\d+)>)?")
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)


class PtxError(RuntimeError):
    """PTX that cannot be read or executed here, or that does what it must not; says where."""


class Register(NamedTuple):
    """A place in the register file. ``type``: as declared (``"pred"``, ``"b32"``, ...)."""

    index: int
    type: str


class Special(NamedTuple):
    """``%tid.x`` and the like."""

    name: str


class Immediate(NamedTuple):
    """A literal: the number, or (``bits``) the bits of a floating one; ``size`` of those in bytes, 0: an integer."""

    value: int
    size: int = 0


class Symbol(NamedTuple):
    """The address of a variable: ``space`` is ``"param"`` or ``"shared"``, ``offset`` in bytes from where that begins."""

    space: str
    offset: int


class Not(NamedTuple):
    """``!p``."""

    register: Register


class Jump(NamedTuple):
    """The blocks a branch may go to: one, or those of a table."""

    blocks: tuple[int, ...]


class Address(NamedTuple):
    """``[base + offset]``."""

    base: Register | Immediate | Symbol
    offset: int


class Parameter(NamedTuple):
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Instruction:
    """``parts``: the opcode, split at its dots. ``guard``: the predicate, and whether it must be false.

    An operand in braces is a tuple; ``None`` is the sink ``_``."""

    parts: tuple[str, ...]
    operands: tuple
    guard: tuple[Register, bool] | None
    text: str
    pair: Register | None = None  # the second destination of setp p|q and shfl r|p

    @property
    def name(self) -> str:
        return self.parts[0]


@dataclass
class Block:
    """Instructions that run one after the other: only the last may branch or wait."""

    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Kernel:
    """An entry. ``labels``: block numbers by label. ``registers``: the type of each."""

    name: str
    parameters: list[Parameter]
    parameter_bytes: int
    registers: list[str]
    blocks: list[Block]
    labels: dict[str, int]
    static_shared: int
    threads: tuple[int, ...]  # at most, from .maxntid or .reqntid; empty: not said
    target: str = ""
    fences_copies: bool = True  # as it must; false: its compiler is known to leave out fences between cp.async and wgmma
    compiled: dict = field(default_factory=dict)  # what machine.py makes of the blocks

    @functools.cached_property
    def has_async_proxy(self) -> bool:
        """Whether some instruction reads or writes shared memory by it."""
        return self.has_warpgroups or any("bulk" in i.parts for block in self.blocks for i in block.instructions)

    @functools.cached_property
    def has_warpgroups(self) -> bool:
        """Whether some instruction is for a warpgroup."""
        return any(i.name == "wgmma" for block in self.blocks for i in block.instructions)


# What ends a block beside branches: instructions that may make a thread wait, or let it go on elsewhere.
ENDING = {"bra", "brx", "ret", "exit", "trap", "bar", "barrier"}
WAITING = {"mbarrier.try_wait", "mbarrier.test_wait"}  # these stand alone
# What all threads of a warp must do together: a block with one of these begins with the first.
COLLECTIVE = {"shfl", "mma", "ldmatrix", "stmatrix", "vote", "match", "redux", "wgmma", "elect", "activemask"}


def parse(text: str) -> dict[str, Kernel]:
    """The entries of a PTX module, by name."""
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"(?m)^\s*\.(loc|file)\b[^\n]*$", "", text)
    target = re.search(r"\.target\s+(\w+)", text)
    kernels = {}
    shared = _Shared()
    at = 0
    while found := _ENTRY.search(text, at):
        shared.declare_all(text[at : found.start()])
        body, at = _body(text, found.end())
        kernel = _Reader(found.group(1), found.group(2), found.group(3), body, shared.copy()).kernel()
        kernel.target = target.group(1) if target else ""
        kernels[kernel.name] = kernel
    return kernels


def _body(text: str, start: int) -> tuple[str, int]:
    """What stands before the brace that closes the one before ``start``, and where it ends."""
    depth = 1
    for found in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if found.group() == "{" else -1
        if depth == 0:
            return text[start : found.start()], found.end()
    raise PtxError("an entry has no end")


class _Shared:
    """Shared variables of a module: those with a size first, dynamic memory (all of it at one place) behind them."""

    def __init__(self):
        self.sized: dict[str, int] = {}
        self.dynamic: dict[str, int] = {}
        self.bytes = 0

    def copy(self) -> _Shared:
        made = _Shared()
        made.sized, made.dynamic, made.bytes = dict(self.sized), dict(self.dynamic), self.bytes
        return made

    def declare_all(self, text: str) -> None:
        for statement in re.findall(r"[^;{}]*\.shared\s[^;{}]*;", text):
            self.declare(statement)

    def declare(self, statement: str) -> None:
        align, kind, name, array, count = _SHARED.search(statement).groups()
        align = int(align or SIZES[kind])
        if array and not count:
            self.dynamic[name] = align
            return
        self.bytes = -(-self.bytes // align) * align
        self.sized[name] = self.bytes
        self.bytes += SIZES[kind] * int(count or 1)

    def static_bytes(self) -> int:
        """What comes before dynamic memory."""
        align = max(self.dynamic.values(), default=1)
        return -(-self.bytes // align) * align

    def find(self, name: str) -> int | None:
        return self.static_bytes() if name in self.dynamic else self.sized.get(name)


class _Reader:
    """Reads one entry."""

    def __init__(self, name: str, parameters: str, directives: str, body: str, shared: _Shared):
        self.name = name
        self.shared = shared
        self.parameters, self.parameter_bytes = _parameters(parameters)
        found = re.search(r"\.(?:maxntid|reqntid)\s+([\d,\s]+)", directives)
        self.threads = tuple(int(n) for n in re.findall(r"\d+", found.group(1))) if found else ()
        self.types: list[str] = []
        self.scopes: list[dict[str, Register | int]] = [{}]  # registers, or the number of those of a range
        self.blocks = [Block()]
        self.labels: dict[str, int] = {}
        self.path = [0]  # numbers of the scopes we are in: a label is known where it stands and in the scopes inside
        self.tables: dict[str, list[str]] = {}
        self.has_collective = False
        self.statements = list(_statements(body))

    def kernel(self) -> Kernel:
        label, scopes = "", 0
        for kind, text in self.statements:
            if kind == "statement" and text.startswith(
                ".shared"
            ):  # all of them, before anyone asks where dynamic memory begins
                self.shared.declare(text + ";")
        for kind, text in self.statements:
            if kind == "{":
                self.scopes.append({})
                scopes += 1
                self.path.append(scopes)
            elif kind == "}":
                self.scopes.pop()
                self.path.pop()
            elif kind == "label":
                self._new_block()
                label = self._label(text, self.path[-1])
                self.labels[label] = len(self.blocks) - 1
            elif text.startswith(".branchtargets"):
                self.tables[label] = [self._label(name, 0) for name in re.findall(_NAME, text.removeprefix(".branchtargets"))]
            elif text.startswith(".reg"):
                self._declare_registers(text)
            elif text.startswith("."):
                if text.split()[0] not in (".pragma", ".shared"):
                    raise PtxError(f"{self.name}: directive not known here: {text}")
            else:
                self._add(self._instruction(text))
        self._resolve_jumps()
        return Kernel(self.name, self.parameters, self.parameter_bytes, self.types, self.blocks, self.labels,
                      self.shared.static_bytes(), self.threads)  # fmt: skip

    @staticmethod
    def _label(name: str, scope: int) -> str:
        return f"{name}@{scope}" if scope else name

    def _resolve_jumps(self) -> None:
        """Puts block numbers for labels, now that all are known."""
        for block in self.blocks:
            for n, i in enumerate(block.instructions):
                if i.name not in ("bra", "brx"):
                    continue
                meant = [name for name in i.operands[-1].name.split() if name in self.labels]
                if not meant:
                    raise PtxError(f"{self.name}: {i.text}: there is no such label")
                names = self.tables[meant[0]] if i.name == "brx" else meant[:1]
                jump = Jump(tuple(self.labels[name] for name in names))
                block.instructions[n] = replace(i, operands=(*i.operands[:-1], jump))

    def _find_label(self, word: str) -> Special:
        """A label's name, in each of the scopes it may be of, the innermost first."""
        return Special(" ".join(self._label(word, scope) for scope in reversed(self.path)))

    def _new_block(self) -> None:
        if self.blocks[-1].instructions:
            self.blocks.append(Block())
        self.has_collective = False

    def _add(self, instruction: Instruction) -> None:
        whole = ".".join(instruction.parts[:2])
        waits = whole in WAITING
        if (instruction.name in COLLECTIVE or whole == "bar.warp") and not self.has_collective:
            self._new_block()
            self.has_collective = True
        if waits:
            self._new_block()
        self.blocks[-1].instructions.append(instruction)
        if (instruction.name in ENDING and whole != "bar.warp") or waits:
            self._new_block()

    def _declare_registers(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        for name, count in _REGISTERS.findall(names):
            if count:
                for i in range(int(count)):
                    self.scopes[-1][f"{name}{i}"] = self._register(kind)
            else:
                self.scopes[-1][name] = self._register(kind)

    def _register(self, kind: str) -> Register:
        self.types.append(kind)
        return Register(len(self.types) - 1, kind)

    def _instruction(self, text: str) -> Instruction:
        match = _INSTRUCTION.fullmatch(text)
        if match is None:
            raise PtxError(f"{self.name}: not an instruction: {text}")
        negated, guard, opcode, rest = match.groups()
        predicate = (self._find(guard), bool(negated)) if guard else None
        pair = None
        words = _split(rest)
        if words and "|" in words[0]:
            words[0], second = words[0].split("|")
            pair = self._operand(second.strip())
        operands = tuple(self._operand(w.strip()) for w in words)
        if opcode.split(".")[0] in ("bra", "brx"):
            operands = (*operands[:-1], self._find_label(words[-1].strip()))
        return Instruction(tuple(opcode.replace("::", ".").split(".")), operands, predicate, " ".join(text.split()), pair)

    def _operand(self, word: str):
        if word.startswith("{"):
            return tuple(self._operand(w.strip()) for w in _split(word[1:-1]))
        if word.startswith("["):
            inside = [w.strip() for w in _split(word[1:-1])]
            if len(inside) > 1:  # [map, {coordinates}], [address], [barrier]
                return tuple(self._operand(w) for w in inside)
            return self._address(inside[0])
        if word == "_":
            return None
        if word.startswith("!"):
            return Not(self._find(word[1:]))
        return self._find(word)

    def _address(self, word: str) -> Address:
        base, sign, offset = re.fullmatch(rf"({_NAME}(?:\.\w+)?|-?\w+)\s*(?:([+-])\s*(-?\w+))?", word).groups()
        number = int(offset, 0) if offset else 0
        return Address(self._find(base), -number if sign == "-" else number)

    def _find(self, word: str):
        for scope in reversed(self.scopes):
            if word in scope:
                return scope[word]
        if re.match(r"-?\d", word):
            return _immediate(word)
        if word.startswith("%"):
            return Special(word[1:])
        for parameter in self.parameters:
            if parameter.name == word:
                return Symbol("param", parameter.offset)
        place = self.shared.find(word)
        if place is not None:
            return Symbol("shared", SHARED_BASE + place)
        return Special(word)  # a label, or a word such as WARP_SZ


def _parameters(text: str) -> tuple[list[Parameter], int]:
    """Parameters and where they lie: each at a multiple of its alignment."""
    parameters, end = [], 0
    for align, kind, name, count in _PARAMETER.findall(text):
        step = int(align or SIZES[kind])
        end = -(-end // step) * step
        size = SIZES[kind] * int(count or 1)
        parameters.append(Parameter(name, end, size))
        end += size
    return parameters, end


def _statements(body: str):
    """Pairs of a kind (``{``, ``}``, ``label``, ``statement``) and the text."""
    label = re.compile(rf"\s*({_NAME}):(?!:)")
    at = 0
    while at < len(body):
        if body[at].isspace() or body[at] == ";":
            at += 1
        elif body[at] in "{}":
            yield body[at], ""
            at += 1
        elif found := label.match(body, at):
            yield "label", found.group(1)
            at = found.end()
        else:
            end = body.index(";", at)
            yield "statement", body[at:end].strip()
            at = end + 1


def _split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    words, depth, word = [], 0, ""
    for c in text:
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            words.append(word)
            word = ""
        else:
            word += c
    return [w for w in (*words, word) if w.strip()]


def _immediate(word: str) -> Immediate:
    if word[:2] in ("0f", "0F") and len(word) == 10:
        return Immediate(int(word[2:], 16), 4)
    if word[:2] in ("0d", "0D") and len(word) == 18:
        return Immediate(int(word[2:], 16), 8)
    word = re.sub(r"^(-?)0(?=\d)", r"\g<1>0o", word.rstrip("U"))  # octal
    return Immediate(int(word, 0))
