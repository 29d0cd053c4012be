"""What a thread block does with Hopper's asynchronous units: mbarriers, copies by TMA, products of warpgroups.

A tile that TMA copies lands when nobody in the block can go on without it; until then NaN is where it will be. A product of a
warpgroup is done when it is issued, and what it read, in shared memory or registers, must still be there when it is waited for.
Until then NaN is in its accumulators; only products that go on with them know better.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from . import wgmma
from .memory import UNSIGNED
from .program import SHARED_BASE, PtxError
from .tensor_map import BYTES, decode

PARAMETERS = 1 << 60  # where kernel parameters lie among generic addresses
_MANY = 1 << 20  # of an mbarrier: counts and bytes must be below
_NOT_YET = np.uint32(0xFFFFFFFF)  # what is in accumulators until they are waited for: NaN
_OPAQUE = np.frombuffer(b"mbarrier", np.uint8)  # what lies where an mbarrier is: nothing else may be written there


@dataclass
class _Phases:
    """An mbarrier: arrivals a phase needs, those and the bytes that the present one still waits for, phases completed.

    What those know that arrived (see block_proxies.py): in the present phase too, and in those completed."""

    count: int
    pending: int
    bytes: int = 0
    completed: int = 0
    gathered: np.ndarray | int = 0
    told: np.ndarray | int = 0


@dataclass
class _Tile:
    """A copy on the way: bytes, where they go, and the mbarrier that is told."""

    places: np.ndarray
    data: np.ndarray
    barrier: int


@dataclass
class _Product:
    """Issued and not waited for: threads, the group it is in, the registers of its accumulators, and what it read: places in
    shared memory, or registers, and what was there."""

    threads: np.ndarray
    group: np.ndarray
    sums: list[int]
    reads: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    fragments: list[tuple[int, np.ndarray]] = field(default_factory=list)
    text: str = ""


class BlockHopper:
    """The part of :class:`ptx.machine.ThreadBlock` that knows Hopper."""

    def start_hopper(self) -> None:
        self.phases: dict[int, _Phases] = {}
        self.tiles: list[_Tile] = []
        self.products: list[_Product] = []
        self.product_groups = np.zeros(self.padded, np.int64)
        self.sums: dict[tuple[int, int], np.ndarray] = {}  # what is not in the accumulators yet: by first thread and register

    # ------------------------------------------------------------ mbarriers

    def _barriers(self, addresses, guard):
        """Pairs of a thread and the address of the mbarrier it names."""
        active = self._active(guard)
        named = addresses[active]
        self._shared_index(named, 8, 1)
        for place in np.unique(named) - SHARED_BASE:
            if int(place) + SHARED_BASE in self.phases and (self.shared[place : place + 8] != _OPAQUE).any():
                raise PtxError(f"the mbarrier at {place} of shared memory was overwritten")
        return zip(active.tolist(), named.tolist(), strict=True)

    def _phases(self, address: int) -> _Phases:
        if address not in self.phases:
            raise PtxError(f"no mbarrier was made at {address - SHARED_BASE} of shared memory")
        return self.phases[address]

    def barrier_init(self, addresses, counts, guard) -> None:
        for thread, address in self._barriers(addresses, guard):
            count = int(counts[thread])
            if not 0 < count < _MANY:
                raise PtxError(f"an mbarrier for {count} arrivals")
            if address in self.phases:
                raise PtxError(f"an mbarrier is made again at {address - SHARED_BASE} of shared memory, where one is")
            self.phases[address] = _Phases(count, count)
            self.shared[address - SHARED_BASE :][:8] = _OPAQUE

    def barrier_invalidate(self, addresses, guard) -> None:
        for _, address in self._barriers(addresses, guard):
            self._phases(address)
            del self.phases[address]
            self.shared[address - SHARED_BASE :][:8] = 0xFF

    def barrier_arrive(self, addresses, arrivals, expected, guard) -> None:
        for thread, address in self._barriers(addresses, guard):
            phases = self._phases(address)
            phases.bytes += int(expected[thread]) if expected is not None else 0
            count = int(arrivals[thread]) if arrivals is not None else 1
            if count > phases.pending:
                raise PtxError(
                    f"more arrivals at the mbarrier at {address - SHARED_BASE} than the {phases.count} it is made for"
                )
            phases.pending -= count
            if self.watched:
                phases.gathered = np.maximum(phases.gathered, self.known_by(np.array([thread])))
            self._turn(phases)

    def _turn(self, phases: _Phases) -> None:
        if not -_MANY < phases.bytes < _MANY:
            raise PtxError(f"an mbarrier is told of {phases.bytes} bytes")
        if phases.pending == 0 and phases.bytes == 0:
            phases.pending = phases.count
            phases.completed += 1
            phases.told = phases.gathered
            self.wake()

    def barrier_wait(self, addresses, parities, register: int, mask, number: int):
        """Who finds the phase of this parity completed goes on; the others try again when a phase is."""
        done = np.zeros(self.padded, bool)
        guard = self._alive() if mask is None else mask
        for thread, address in self._barriers(addresses, guard):
            done[thread] = self._phases(address).completed % 2 != int(parities[thread])
        self.registers[register] = np.where(guard, done, self.registers[register])
        self.wait(guard & ~done)
        if self.watched:
            for address in np.unique(addresses[done]).tolist():
                self.learns(np.flatnonzero(done & (addresses == address)), self._phases(address).told)
        return np.where(done, number + 1, number)

    # ------------------------------------------------------------ TMA

    def copy_tile(self, to, tensor_map, coordinates, barriers, guard) -> None:
        active = self._active(guard)
        for thread in active:
            found = self._tensor_map(int(tensor_map[thread]) - PARAMETERS, len(coordinates))
            data = self._tile(found, [int(c.view(np.int32)[thread]) for c in coordinates])
            start = int(to[thread])
            if start % 128:
                raise PtxError("a tile must begin at a multiple of 128 bytes of shared memory")
            self._shared_index(np.array([start, start + data.size - 1]), 1, 1)
            places = wgmma.swizzled(start + np.arange(data.size), found.swizzle) - SHARED_BASE
            self.seen_by_async(np.array([thread]), places, 1, "a tile is copied over")
            self.shared[places] = 0xFF
            self._phases(int(barriers[thread]))
            self.tiles.append(_Tile(places, data, int(barriers[thread])))

    def _tensor_map(self, place: int, rank: int):
        """The tensor map at a place among the parameters."""
        if not 0 <= place <= len(self.parameters) - BYTES:
            raise PtxError("a tensor map that is not among the parameters")
        if place % 64:
            raise PtxError(f"a tensor map at {place} of the parameters, which is not a multiple of 64")
        try:
            found = decode(self.parameters[place : place + BYTES].tobytes())
        except ValueError as error:
            raise PtxError(str(error)) from None
        if len(found.box) != rank:
            raise PtxError(f"{rank} coordinates of a tensor with {len(found.box)}")
        if found.swizzle and found.box[0] * found.element_bytes != found.swizzle:
            raise PtxError("boxes whose rows are shorter than those of the swizzle pattern are not known here")
        return found

    def _tile(self, found, coordinates) -> np.ndarray:
        """The bytes of a box, those outside of the tensor 0; the first coordinate is that of neighbours in memory."""
        index = [c + np.arange(b) for c, b in zip(coordinates, found.box, strict=True)]
        grid = np.meshgrid(*reversed(index), indexing="ij")[::-1]
        inside = np.logical_and.reduce([(g >= 0) & (g < n) for g, n in zip(grid, found.shape, strict=True)])
        steps = (found.element_bytes, *found.strides)
        addresses = found.address + sum(g * s for g, s in zip(grid, steps, strict=True))
        size = found.element_bytes
        made = np.zeros(inside.shape, UNSIGNED[size])
        if found.fills_nan:
            raise PtxError("tensor maps that fill with NaN are not known here")
        made[inside] = self.memory.load(addresses[inside].astype(np.int64), size, 1)[0]
        return made.reshape(-1).view(np.uint8)

    def land(self) -> bool:
        """Lets the oldest tile land. False: there is none, or nobody left to see it."""
        if not self.tiles or not self._alive().any():
            return False
        tile = self.tiles.pop(0)
        self.shared[tile.places] = tile.data
        self.written_by_async(tile.places)
        phases = self._phases(tile.barrier)
        phases.bytes -= tile.data.size
        self._turn(phases)
        return True

    # ------------------------------------------------------------ products

    def elect(self, members, guard):
        """The first lane of each warp."""
        self._warp_check(members, guard)
        lane = np.arange(self.padded) % 32
        return np.zeros(self.padded, np.uint32), lane == 0

    def product(self, shape, kinds, d, a, b, keep, transposed, guard, text) -> None:
        """``d`` (numbers of registers) + a b; without ``d`` where ``keep`` is false. a: registers, or as b is a descriptor."""
        active = self._active(guard)
        groups = np.zeros(self.padded, bool)
        groups[active] = True
        groups = groups.reshape(-1, 128)
        if (groups.any(1) & ~groups.all(1)).any():
            raise PtxError("a warpgroup is divided at a product of all of it")
        for n in np.flatnonzero(groups.any(1)):
            threads = slice(128 * n, 128 * n + 128)
            product = _Product(np.arange(self.padded)[threads], self.product_groups[threads].copy(), d, text=text)
            if isinstance(a, list):
                product.fragments = [(register, self.registers[register][threads].copy()) for register in a]
                left = wgmma.left(shape, kinds[0], [values for _, values in product.fragments])
            else:
                left = self._at_descriptor(a[threads], shape, "a", kinds[0], transposed[0], product)
            right = self._at_descriptor(b[threads], shape, "b", kinds[1], transposed[1], product)
            total = left.astype(np.float64) @ right
            sums = wgmma.accumulators(shape, [self._sums(register, threads, text) for register in d])
            if self._same(keep[threads]):
                total = total + sums
            for register, values in zip(d, wgmma.registers(shape, total.astype(np.float32)), strict=True):
                self.sums[threads.start, register] = values
                self._put(register, threads, _NOT_YET)
            self.products.append(product)

    def _sums(self, register: int, threads: slice, text: str) -> np.ndarray:
        """What is in an accumulator, or will be when the products before are over."""
        held = self.registers[register][threads]
        if (threads.start, register) not in self.sums:
            return held.view(np.float32)
        if (held != _NOT_YET).any():
            raise PtxError(f"an accumulator of a product was written before the product was waited for: {text[:60]}")
        return self.sums[threads.start, register]

    def _put(self, register: int, threads: slice, values) -> None:
        """Into a register of some threads. Its array may be another's too, after a ``mov``."""
        made = self.registers[register].copy()
        made[threads] = values
        self.registers[register] = made

    @staticmethod
    def _same(values):
        if (values != values[0]).any():
            raise PtxError("the threads of a warpgroup do not say the same of a product")
        return values[0]

    def _at_descriptor(self, descriptors, shape, which, kind, transposed, product) -> np.ndarray:
        addresses = wgmma.addresses(int(self._same(descriptors)), shape, which, kind, transposed)
        size = 4 if kind == "tf32" else 2
        first = self._shared_index(addresses.reshape(-1), size, 1)
        self.seen_by_async(product.threads, first, size, "a product reads", product.text)
        view = self._shared_as(UNSIGNED[size])
        product.reads.append((first, view[first].copy()))
        return wgmma.values(view[first].reshape(addresses.shape), kind)

    def product_commit(self, guard) -> None:
        self.product_groups[self._active(guard)] += 1

    def product_wait(self, pending: int, guard) -> None:
        """Products of all but the ``pending`` newest groups of these threads are over."""
        waits = np.zeros(self.padded, bool)
        waits[self._active(guard)] = True
        over, kept = [], []
        for product in self.products:
            done = waits[product.threads].all() and (product.group < self.product_groups[product.threads] - pending).all()
            (over if done else kept).append(product)
        self.products = kept
        for product in over:
            threads, what = slice(product.threads[0], product.threads[-1] + 1), product.text[:60]
            changed = any((self.registers[register][threads] != before).any() for register, before in product.fragments)
            for first, before in product.reads:
                changed |= (self._shared_as(before.dtype)[first] != before).any()
            if changed:
                raise PtxError(f"what a product reads was overwritten before the product was waited for: {what}")
            going_on = {register for other in kept if other.threads[0] == threads.start for register in other.sums}
            for register in product.sums:
                if register not in going_on and (threads.start, register) in self.sums:
                    values = self._sums(register, threads, what)
                    del self.sums[threads.start, register]
                    self._put(register, threads, values.view(np.uint32))
