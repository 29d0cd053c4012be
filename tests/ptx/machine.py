"""Runs a grid of thread blocks of a PTX kernel, one block after the other.

The threads of a block that stand at the earliest place of the code go first, all at once. So they come together again after a
branch, and a warp is whole where it must be. A block in which nobody can go on is an error that says where everyone waits.

All warps keep pace with one another then, and a barrier that is missing would not show. :func:`warps_apart` is for that: one
warp runs as far as it can, then another, drawn at random.
"""

from __future__ import annotations

import collections
import contextlib
import random

import numpy as np

from . import operations, operations_hopper, operations_memory  # noqa: F401  what instructions do
from .block_hopper import BlockHopper
from .block_memory import BlockMemory, Copy
from .block_proxies import BlockProxies
from .block_warps import WARP, BlockWarps
from .instructions import Emitter
from .memory import Memory
from .program import COLLECTIVE, SHARED_BASE, Kernel, PtxError

_RUNNING, _AT_BARRIER, _AT_COLLECTIVE, _AT_PHASE, _DONE = range(5)
_STATES = ("running", "waiting at a barrier", "waiting for their warp", "waiting for an mbarrier", "ended")


def launch(
    kernel: Kernel, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int, parameters: bytes,
    memory: Memory, seed: int = 0,
) -> None:  # fmt: skip
    """Runs a kernel, as a launch would.

    Args:
        kernel: of :func:`ptx.program.parse`. grid, block: numbers of thread blocks and of threads, along x, y and z.
        shared_bytes: of dynamic shared memory. parameters: the bytes of all the kernel's parameters.
        memory: what it may use. seed: of the order of the thread blocks; 0 is the natural one.

    Raises:
        PtxError: it does what it must not, or what is not known here; says where.
    """
    threads = int(np.prod(block))
    if kernel.threads and threads > np.prod(kernel.threads):
        raise PtxError(f"{kernel.name} is made for blocks of {kernel.threads} threads at most, got {block}")
    if len(parameters) != kernel.parameter_bytes:
        raise PtxError(f"{kernel.name} takes {kernel.parameter_bytes} bytes of parameters, got {len(parameters)}")
    places = list(np.ndindex(*reversed(grid)))
    order = random.Random(seed)
    if seed:
        order.shuffle(places)
    with np.errstate(all="ignore"):
        waiting: collections.deque[ThreadBlock] = collections.deque()  # for what other blocks write
        turns = 0
        while places or waiting:
            if places:
                z, y, x = places.pop(0)
                current = ThreadBlock(kernel, grid, block, (x, y, z), shared_bytes, parameters, memory)
                current.order = order if _apart else None
            else:
                current = waiting.popleft()
            if current.run():
                turns = 0
                continue
            waiting.append(current)
            turns += 1
            if turns > 1000 * (len(waiting) + 1):
                raise PtxError(f"{kernel.name}: {len(waiting)} thread blocks wait for what none of them writes")


_apart = False


@contextlib.contextmanager
def warps_apart():
    """Meanwhile one warp at a time runs (or warpgroup, where a kernel has instructions for those), drawn at random."""
    global _apart
    _apart = True
    try:
        yield
    finally:
        _apart = False


class ThreadBlock(BlockMemory, BlockWarps, BlockHopper, BlockProxies):
    """One thread block. What compiled instructions call ``run``."""

    def __init__(self, kernel: Kernel, grid, block, index, shared_bytes: int, parameters: bytes, memory: Memory):
        self.kernel, self.memory, self.index = kernel, memory, index
        self.END = len(kernel.blocks)
        self.threads = int(np.prod(block))
        self.padded = -(-self.threads // WARP) * WARP  # lanes beyond the last thread are there, and never run
        self.everyone = np.arange(self.padded) < self.threads
        self.shared = np.full(kernel.static_shared + shared_bytes + 16, 0xFF, np.uint8)
        self.shared_end = SHARED_BASE + kernel.static_shared + shared_bytes
        self.parameters = np.frombuffer(parameters + bytes(-len(parameters) % 8), np.uint8)
        self.state = np.full(self.padded, _RUNNING, np.int8)
        self.state[self.threads :] = _DONE
        self.at = np.zeros(self.padded, np.int64)
        self.barriers: dict[int, _Barrier] = {}
        self.copies: list[Copy] = []
        self.groups = np.zeros(self.padded, np.int64)  # of copies that a thread has closed
        self.looked = False
        self.whole: np.ndarray | None = None  # a guard that was seen to be of whole warps, while a block runs
        self.order: random.Random | None = None  # of warps; None: together
        self.units, self.unit = np.arange(self.padded) // (4 * WARP if kernel.has_warpgroups else WARP), -1
        self.start_hopper()
        self.start_proxies()
        self.places = _specials(grid, block, index, self.padded)
        empty = {name: np.full(self.padded, 0xDEADBEEFDEADBEEF, np.uint64).astype(kind) for name, kind in
                 (("b16", np.uint16), ("b32", np.uint32), ("b64", np.uint64), ("pred", np.bool_))}  # fmt: skip
        size = {"16": "b16", "32": "b32", "64": "b64", "red": "pred"}
        self.registers = [empty[size[kind[-3:] if kind == "pred" else kind[-2:]]] for kind in kernel.registers]

    def run(self) -> bool:
        """Until all threads have ended (true), or the block has looked at what another block may write (false)."""
        self.looked = False
        while not self.looked:
            running = self.state == _RUNNING
            if not running.any():
                if self._release() or self.land():
                    continue
                if (self.state == _DONE).all():
                    break
                raise PtxError(self._where("nobody can go on"))
            ended = running & (self.at == self.END)
            if ended.any():
                self.state[ended] = _DONE
                for name in list(self.barriers):
                    self._complete(name)
                continue
            if self.order is not None:
                running = self._of_one_unit(running)
            number = int(self.at[running].min())
            mask = running & (self.at == number)
            if self._collective(number) and not self._warps_whole(mask, number):
                continue
            whole = bool((mask == self.everyone).all())
            self.whole = None
            function = self._compiled(number, not whole)
            try:
                following = function(self, self.registers, None if whole else mask)
            except PtxError as error:
                raise PtxError(self._where(str(error), number, mask)) from None
            self.at[mask] = following[mask] if isinstance(following, np.ndarray) else following
        else:
            return False
        if self.copies or self.tiles:
            raise PtxError(self._where("ends with copies nobody waited for"))
        return True

    def _of_one_unit(self, running: np.ndarray) -> np.ndarray:
        """Those of the warp that runs, or, when it cannot go on, of another."""
        if not (running & (self.units == self.unit)).any():
            self.unit = self.order.choice(np.unique(self.units[running]).tolist())
        return running & (self.units == self.unit)

    def _compiled(self, number: int, masked: bool):
        found = self.kernel.compiled.get((number, masked))
        if found is None:
            found = Emitter(self.kernel, number, masked).function(self.kernel.blocks[number])
            self.kernel.compiled[number, masked] = found
        return found

    # ------------------------------------------------------------ threads that wait

    def _collective(self, number: int) -> bool:
        block = self.kernel.blocks[number]
        first = block.instructions[0].parts if block.instructions else ("",)
        return first[0] in COLLECTIVE or first[:2] == ("bar", "warp")

    def _warps_whole(self, mask: np.ndarray, number: int) -> bool:
        """Whether whole warps stand before this collective; threads of the others wait for their neighbours, who may come."""
        warps, alive = mask.reshape(-1, WARP), (self.state != _DONE).reshape(-1, WARP)
        missing = (warps.any(1) & (warps != alive).any(1))[:, None] & warps
        if not missing.any():
            return True
        self.state[missing.reshape(-1)] = _AT_COLLECTIVE
        return False

    def _release(self) -> bool:
        """Lets go on who has waited for a warp long enough: when nobody else can, and all of the warp stand there."""
        waiting = (self.state == _AT_COLLECTIVE).reshape(-1, WARP)
        places, alive = self.at.reshape(-1, WARP), (self.state != _DONE).reshape(-1, WARP)
        first = np.where(alive, places, self.END + 1).min(1, keepdims=True)
        together = (waiting == alive).all(1) & (np.where(alive, places, first) == first).all(1) & waiting.any(1)
        self.state.reshape(-1, WARP)[together[:, None] & waiting] = _RUNNING
        return bool(together.any())

    def whole_warps(self, guard) -> None:
        """A collective under a predicate: for whole warps or none."""
        if guard is None or guard is self.whole:
            return
        warps, alive = guard.reshape(-1, WARP), (self.state != _DONE).reshape(-1, WARP)
        if (warps.any(1) & (warps != alive).any(1)).any():
            raise PtxError("a warp is divided at an instruction that all of it must execute")
        self.whole = guard

    def barrier(self, name, count, mask, kind: str, source=None, destination=None) -> None:
        mask = self._alive() if mask is None else mask
        number = self._one(name, mask)
        expected = None if count is None else self._one(count, mask)
        barrier = self.barriers.setdefault(number, _Barrier(np.zeros(self.padded, bool), np.zeros(self.padded, bool)))
        if (barrier.arrived & mask).any():
            raise PtxError(f"a thread comes to barrier {number} twice")
        if barrier.arrived.any() and (barrier.expected, barrier.destination) != (expected, destination):
            raise PtxError(f"threads come to barrier {number} with different counts or results")
        barrier.expected, barrier.destination = expected, destination
        barrier.arrived |= mask
        if self.watched:
            barrier.gathered = np.maximum(barrier.gathered, self.known_by(np.flatnonzero(mask)))
        if source is not None:
            barrier.votes = np.where(mask, source, barrier.votes)
        if kind != "arrive":
            barrier.waiting |= mask
            self.state[mask] = _AT_BARRIER
        barrier.kind = kind if source is not None else ""
        self._complete(number)

    def _complete(self, number: int) -> None:
        """Lets the threads at a barrier go on if they are all there: as many as it says, or all that have not ended."""
        barrier = self.barriers[number]
        arrived = int(barrier.arrived.sum())
        needed = int((self.state != _DONE).sum()) if barrier.expected is None else barrier.expected
        if arrived > needed:
            raise PtxError(f"{arrived} threads at barrier {number} of {needed}")
        if arrived == needed:
            self.state[barrier.waiting] = _RUNNING
            if self.watched:
                self.knows(barrier.waiting, barrier.gathered)
            if barrier.kind:
                votes = barrier.votes[barrier.arrived]
                result = {"or": votes.any(), "and": votes.all(), "popc": votes.sum()}[barrier.kind]
                old = self.registers[barrier.destination]
                self.registers[barrier.destination] = np.where(barrier.arrived, old.dtype.type(result), old)
            del self.barriers[number]

    def _alive(self) -> np.ndarray:
        return self.state != _DONE

    @staticmethod
    def _one(values, mask) -> int:
        chosen = np.asarray(values)[mask]
        if (chosen != chosen[0]).any():
            raise PtxError("threads name different barriers or counts in one instruction")
        return int(chosen[0])

    # ------------------------------------------------------------ registers

    def wait(self, waits: np.ndarray) -> None:
        """Puts threads to sleep until wake() is told that phases have changed."""
        self.state[waits] = _AT_PHASE

    def wake(self) -> None:
        self.state[self.state == _AT_PHASE] = _RUNNING

    def special(self, name: str) -> np.ndarray:
        if name not in self.places:
            raise PtxError(f"{name} is not known here")
        return self.places[name]

    def all(self, value) -> np.ndarray:
        return np.full(self.padded, value)

    def branch(self, condition, target: int, otherwise: int, mask):
        if mask is None:
            alive = condition[: self.threads]
            if alive.all():
                return target
            if not alive.any():
                return otherwise
        return np.where(condition, target, otherwise)

    def branch_by_table(self, index, blocks, mask):
        chosen = index[: self.threads] if mask is None else index[mask]
        if (chosen >= len(blocks)).any():
            raise PtxError(f"a branch to place {chosen.max()} of a table of {len(blocks)}")
        return np.asarray(blocks)[np.minimum(index, len(blocks) - 1)]

    def trap(self, guard, following: int) -> int:
        if guard is None or guard.any():
            raise PtxError("trap: the kernel gave up")
        return following

    # ------------------------------------------------------------ errors

    def _where(self, what: str, number: int | None = None, mask=None) -> str:
        text = f"{self.kernel.name}, thread block {self.index}: {what}"
        if number is not None:
            names = [label for label, at in self.kernel.labels.items() if at == number]
            shown = "; ".join(i.text for i in self.kernel.blocks[number].instructions[:6])
            count, first = int(mask.sum()), int(np.flatnonzero(mask)[0])
            return f"{text}; {count} threads from {first} on, at {', '.join(names) or number}: {shown} ..."
        told = []
        places = zip(self.state[: self.threads].tolist(), self.at[: self.threads].tolist(), strict=True)
        for (state, at), count in sorted(collections.Counter(places).items()):
            before = self.kernel.blocks[at - 1].instructions[-1:] if 0 < at <= len(self.kernel.blocks) else []
            told.append(
                f"{count} threads {_STATES[state]} before block {at}" + (f" (after {before[0].text})" if before else "")
            )
        return f"{text}: {', '.join(told)}"


class _Barrier:
    def __init__(self, arrived, waiting):
        self.arrived, self.waiting = arrived, waiting
        self.votes = np.zeros_like(arrived)
        self.expected = self.destination = None
        self.kind = ""  # of the reduction, if it is one
        self.gathered = 0  # what those who came know: see block_proxies.py


def _specials(grid, block, index, padded: int) -> dict[str, np.ndarray]:
    """The special registers."""
    thread = np.arange(padded)
    made = {
        "tid.x": thread % block[0],
        "tid.y": thread // block[0] % block[1],
        "tid.z": thread // (block[0] * block[1]),
        "laneid": thread % WARP,
        "warpid": thread // WARP,
    }
    for n, axis in enumerate("xyz"):
        made |= {f"ntid.{axis}": block[n], f"nctaid.{axis}": grid[n], f"ctaid.{axis}": index[n]}
        made |= {f"cluster_ctaid.{axis}": 0, f"cluster_nctaid.{axis}": 1}
    made |= {"cluster_ctarank": 0, "cluster_nctarank": 1}
    return {name: np.broadcast_to(value, padded).astype(np.uint32) for name, value in made.items()}
