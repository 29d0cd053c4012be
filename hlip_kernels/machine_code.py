"""Machine code as the compilers' tools print it, taken apart into blocks and loops. Reads NVIDIA's SASS and AMD's assembly."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its name with modifiers, its operands, and whether a predicate guards it."""

    name: str
    operands: str
    guarded: bool

    @property
    def kind(self) -> str:
        """What it is to the order of things; empty for most."""
        if self.name.startswith("HGMMA"):
            return "product"
        if self.name.startswith("WARPGROUP.DEPBAR"):
            return f"wait {int(re.search(r'0x[0-9a-f]+', self.operands).group(), 16)}"
        if self.name.startswith(("STL", "LDL")):
            return "spill"
        if self.name in ("MUFU.EX2", "v_exp_f32", "v_exp_f32_e32", "v_exp_f32_e64"):
            return "exp2"
        return "barrier" if self.name == "BAR.SYNC.DEFER_BLOCKING" else ""

    @property
    def targets(self) -> list[str]:
        """Labels it may jump to."""
        jumps = self.name.startswith(("BRA", "BRX", "JMP", "s_branch", "s_cbranch"))
        return re.findall(r"\.L\w+", self.operands) if jumps else []

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        if self.name in ("EXIT", "RET.REL.NODEC", "BRX", "JMP"):
            return self.guarded and self.name != "BRX"
        if self.name.startswith("s_"):
            return self.name not in ("s_branch", "s_endpgm", "s_setpc_b64")
        return self.name != "BRA" or self.guarded or not self.operands.startswith("`")


@dataclass
class Block:
    """Instructions that run one after the other, and the numbers of the blocks that may follow."""

    instructions: list[Instruction]
    next: list[int]


def parse(code: str) -> list[Block]:
    """The blocks, by address, of what ``nvdisasm -c`` prints or of the assembly that Triton keeps for AMD."""
    sass = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9_.]*)\s*(?P<operands>[^;]*;.*)")
    amd = re.compile(r"\t(?P<guard>)(?P<name>[a-z]\w*)[ \t]*(?P<operands>[^;]*)")
    blocks, starts = [[]], {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            if blocks[-1]:
                blocks.append([])
            starts[label[1]] = len(blocks) - 1
        elif found := sass.match(line) or amd.match(line):
            blocks[-1].append(Instruction(found["name"], found["operands"], bool(found["guard"])))
            if blocks[-1][-1].targets or not blocks[-1][-1].falls_through:
                blocks.append([])
    linked = []
    for i, block in enumerate(blocks):
        after = [starts[t] for t in block[-1].targets if t in starts] if block else []
        if i + 1 < len(blocks) and (not block or block[-1].falls_through):
            after.append(i + 1)
        linked.append(Block(block, after))
    return linked


def _dominators(blocks: list[Block]) -> list[int]:
    """For every block, as bits: the blocks that every path from the start to it goes through."""
    everything = (1 << len(blocks)) - 1
    before = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for after in block.next:
            before[after].append(i)
    found = [1] + [everything] * (len(blocks) - 1)
    changed = True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            common = everything
            for j in before[i]:
                common &= found[j]
            if common | 1 << i != found[i]:
                found[i], changed = common | 1 << i, True
    return found


def _reachable(blocks: list[Block]) -> set[int]:
    """Blocks that some path from the start leads to; padding is not among them."""
    found, todo = set(), [0]
    while todo:
        if (i := todo.pop()) not in found:
            found.add(i)
            todo += blocks[i].next
    return found


def _natural_loops(blocks: list[Block]) -> dict[int, set[int]]:
    """By first block, the blocks of every loop."""
    dominators, reachable = _dominators(blocks), _reachable(blocks)
    before = [[] for _ in blocks]
    for i in reachable:
        for after in blocks[i].next:
            before[after].append(i)
    loops: dict[int, set[int]] = {}
    for i in sorted(reachable):
        for head in blocks[i].next:
            if dominators[i] >> head & 1:
                body, todo = loops.setdefault(head, {head}), [i]
                while todo:
                    j = todo.pop()
                    if j not in body:
                        body.add(j)
                        todo += before[j]
    return loops


def _innermost(blocks: list[Block], wanted: Callable[[Instruction], bool]) -> list[tuple[int, set[int]]]:
    """The innermost of the loops with a wanted instruction: first block and all blocks, by address."""
    has = [any(map(wanted, block.instructions)) for block in blocks]
    loops = {head: body for head, body in _natural_loops(blocks).items() if any(has[b] for b in body)}
    return sorted((head, body) for head, body in loops.items() if not any(other < body for other in loops.values()))


def innermost_loops(blocks: list[Block], kind: str) -> list[list[Instruction]]:
    """The innermost of the loops with an instruction of this kind: their instructions, by address from the first block on."""
    return [
        [i for b in sorted(body, key=lambda b: (b < head, b)) for i in blocks[b].instructions]
        for head, body in _innermost(blocks, lambda i: i.kind == kind)
    ]


def fullest_turns(blocks: list[Block], worth: Callable[[Instruction], int]) -> list[tuple[int, int]]:
    """Of the innermost loops with instructions that are worth something, by address: the most that a turn is worth, and the
    fewest instructions of a turn worth that. What only some turns do, such as masking, is left out so; loops inside without an
    instruction of worth are gone through once."""
    found = []
    for head, body in _innermost(blocks, lambda i: worth(i) > 0):
        weights = {b: (sum(map(worth, blocks[b].instructions)), -len(blocks[b].instructions)) for b in body}
        best, ends = {head: weights[head]}, []
        for i in _forward_order(blocks, head, body):
            if head in blocks[i].next:
                ends.append(best[i])
            for after in body.intersection(blocks[i].next) - {head}:
                sums = best[i][0] + weights[after][0], best[i][1] + weights[after][1]
                best[after] = max(best.get(after, sums), sums)
        most, fewest = max(ends)
        found.append((most, -fewest))
    return found


def _forward_order(blocks: list[Block], head: int, body: set[int]) -> list[int]:
    """Blocks of a loop, each before those that it leads to, but for the ways back in loops inside."""
    done, order = set(), []

    def visit(i: int) -> None:
        todo = [(i, iter(blocks[i].next))]
        done.add(i)
        while todo:
            at, nexts = todo[-1]
            for after in nexts:
                if after in body and after not in done:
                    done.add(after)
                    todo.append((after, iter(blocks[after].next)))
                    break
            else:
                order.append(at)
                todo.pop()

    visit(head)
    return order[::-1]
