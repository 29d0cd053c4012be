"""Global memory of an emulated launch: every address checked, every element written once. See :mod:`gluon_emulation`."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from gluon_emulation_machine import Clock, check, fail, machine, running
from gluon_emulation_values import DTYPES, DType, Scalar, Tile, assert_, binary, common_layout, dtype_of, int64, plain


class Storage:
    """What one launch does to the memory behind one or more tensors."""

    def __init__(self, tensor: torch.Tensor):
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.flat = tensor.detach().as_strided((size,), (1,), 0)
        self.stored = torch.zeros(size, dtype=torch.int32)
        self.read = torch.zeros(size, dtype=torch.bool)
        self.added = torch.zeros(size, dtype=torch.int32)
        self.last_added = torch.zeros(size, dtype=torch.int64)  # which event did: a partition's number and its time
        self.released: dict[int, Clock] = {}  # by place: what those who released there knew


class Buffer:
    """A tensor argument.

    Args:
        far: row and head stride that the kernel is told instead of the real ones, so that addresses beyond 32 bits can be
            tried with little memory; for ``(R, H, D)`` tensors.
        ordered: additions to an element must know of each other, so that the sum is the same bits in every order of things.
    """

    def __init__(self, name: str, tensor: torch.Tensor, storage: Storage, far=None, ordered: bool = False):
        self.name, self.tensor, self.storage, self.far, self.ordered = name, tensor.detach(), storage, far, ordered
        self.dtype = DTYPES[tensor.dtype]
        self.inside = torch.zeros(len(storage.flat), dtype=torch.bool)
        if tensor.numel():
            self.inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)

    def locate(self, address: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Places in the storage of the addresses (elements after the tensor's first) that the mask lets through."""
        address = address[mask]
        place, outside = address + self.tensor.storage_offset(), None
        if self.far is not None:
            rows, heads, dim = self.tensor.shape
            row, rest = address // self.far[0], address % self.far[0]
            head, d = rest // self.far[1], rest % self.far[1]
            outside = (address < 0) | (row >= rows) | (head >= heads) | (d >= dim)
            place = self.tensor.storage_offset() + row * self.tensor.stride(0) + head * self.tensor.stride(1) + d
        else:
            outside = (place < 0) | (place >= len(self.inside))
            outside |= ~self.inside[place.clamp(0, max(len(self.inside) - 1, 0))] if len(self.inside) else True
        if outside.any():
            fail(f"accesses {self.name} {tuple(self.tensor.shape)} outside its elements, at offset {int(address[outside][0])}")
        return place

    def get(self, place: torch.Tensor) -> torch.Tensor:
        check(not self._written(place), f"reads {self.name} where this launch writes it")
        self.storage.read[place] = True
        return self.storage.flat[place]

    def put(self, place: torch.Tensor, values: torch.Tensor) -> None:
        check(not self.storage.read[place].any(), f"writes {self.name} where this launch reads it")
        check(not self._written(place), f"writes {self.name} a second time")
        self.storage.stored.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))
        check(not (self.storage.stored[place] > 1).any(), f"writes {self.name} twice at once")
        self.storage.flat[place] = values

    def add(self, place: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Adds and returns what was there. Additions do not race with one another, only with reads and writes."""
        me, s = running(), self.storage
        check(
            not s.read[place].any() and not s.stored[place].any(), f"adds to {self.name} where this launch reads or writes it"
        )
        if self.ordered:
            for event in s.last_added[place].unique().tolist():
                known = me.clock.knows((event >> 32, event & (2**32 - 1)))
                check(known, f"adds to {self.name} in no fixed order")
        number, time = me.tick()
        before = s.flat[place]
        s.flat.index_add_(0, place, values)
        s.added.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))
        s.last_added[place] = (number << 32) + time
        return before

    def _written(self, place: torch.Tensor) -> bool:
        return bool(self.storage.stored[place].any() or self.storage.added[place].any())

    def times_stored(self) -> torch.Tensor:
        """How often the launch wrote or added to each element, in the tensor's shape."""
        times = self.storage.stored + self.storage.added
        return times.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset())


@dataclass(eq=False)
class Pointer:
    """An address, or a tile of addresses, in a buffer."""

    buffer: Buffer
    offset: Scalar | Tile

    @property
    def dtype(self) -> DType:
        return self.buffer.dtype

    def __add__(self, other):
        if isinstance(self.offset, Scalar) and not isinstance(other, Tile):
            # The compiler extends each addend to 64 bits on its own, after the addend's own arithmetic.
            return Pointer(self.buffer, Scalar(self.offset.value + operator.index(other), int64))
        assert_(dtype_of(other).kind == 1, "an address plus what is no integer")
        return Pointer(self.buffer, binary(operator.add, self.offset, other))

    __radd__ = __add__


def _places(pointer: Pointer, mask, *others):
    """(address, mask as booleans, layout), all of the shape of the whole access."""
    assert_(isinstance(pointer, Pointer), f"{type(pointer).__name__} where a pointer is wanted")
    layout = common_layout(pointer.offset, mask, *others)
    tile = isinstance(pointer.offset, Tile)
    assert_(tile or layout is None, "one address for a tile")
    address = pointer.offset.data if tile else torch.tensor(pointer.offset.value)
    if mask is None:
        mask = True
    assert_(dtype_of(mask).kind == 0, "a mask that is not boolean")
    mask = mask.data if isinstance(mask, Tile) else torch.tensor(bool(mask))
    assert_(torch.broadcast_shapes(mask.shape, address.shape) == address.shape, "a mask larger than the addresses")
    return address.to(torch.int64), mask.expand(address.shape), layout


def load(pointer: Pointer, mask=None, other=None):
    address, mask, layout = _places(pointer, mask, other)
    dtype = pointer.dtype
    nothing = float("nan") if dtype.kind == 2 else torch.iinfo(dtype.torch).max
    result = torch.full(address.shape, nothing if other is None else plain(other), dtype=dtype.torch)
    result[mask] = pointer.buffer.get(pointer.buffer.locate(address, mask))
    return Tile(result, dtype, layout) if layout is not None else Scalar(result.item(), dtype)


def store(pointer: Pointer, value, mask=None) -> None:
    address, mask, _ = _places(pointer, mask, value)
    dtype = pointer.dtype
    values = value.data if isinstance(value, Tile) else torch.tensor(plain(value))
    values = values.to(dtype.torch).expand(address.shape)
    running().together = False
    pointer.buffer.put(pointer.buffer.locate(address, mask), values[mask])


def atomic_add(pointer: Pointer, value, mask=None, sem="acq_rel", scope=None):
    """One place with ``acquire`` or ``release``, or a tile of places, ``relaxed``.

    Adding 0 where the same partition found the same before is taken for a spin: the partition waits until that has changed.
    """
    machine().point()
    me = running()
    address, mask, layout = _places(pointer, mask, value)
    place = pointer.buffer.locate(address, mask)
    values = value.data if isinstance(value, Tile) else torch.tensor(plain(value))
    values = values.to(pointer.dtype.torch).expand(address.shape)[mask]
    if layout is not None:
        check(sem == "relaxed", f"adds to a tile of {pointer.buffer.name} with order {sem}, which is not emulated")
        me.together = False
        result = torch.full(address.shape, 0, dtype=pointer.dtype.torch)
        result[mask] = pointer.buffer.add(place, values)
        return Tile(result, pointer.dtype, layout)
    storage, at = pointer.buffer.storage, int(place)
    if not values.any() and at in me.polled:
        found = me.polled[at]
        machine().wait_until(
            lambda: storage.flat[at].item() != found, lambda: f"spins while {pointer.buffer.name} is {found} at {at}"
        )
    if sem in ("release", "acq_rel"):
        check(me.together, f"releases at {pointer.buffer.name} with no barrier() after what its warps wrote")
        storage.released.setdefault(at, Clock()).join(me.clock)
    if sem in ("acquire", "acq_rel"):
        me.clock.join(storage.released.get(at, {}))
    before = pointer.buffer.add(place.reshape(1), values.reshape(1)).item()
    me.polled[at] = before
    return Scalar(before, pointer.dtype)


@dataclass
class BlockType:
    """Of the tiles that a descriptor loads."""

    shape: list[int]
    nbytes: int


class Descriptor:
    """What TMA loads by: a matrix of rows, and the size of the tiles.

    Args:
        shape: rows and columns of the matrix. block_shape: of a tile. layout: of the tile in shared memory.
    """

    def __init__(self, buffer: Buffer, shape, block_shape, layout):
        tensor, size = buffer.tensor, buffer.tensor.element_size()
        aligned = tensor.data_ptr() % 16 == 0 and tensor.stride(0) * size % 16 == 0 and tensor.stride(0) > 0
        assert aligned, f"TMA cannot load {buffer.name}: {tensor.shape}, strides {tensor.stride()}"
        assert max(shape) < 2**31 and max(block_shape) <= 256, (shape, block_shape)
        self.buffer, self.shape, self.block_shape, self.layout = buffer, list(shape), list(block_shape), layout
        self.dtype = buffer.dtype

    @property
    def block_type(self) -> BlockType:
        return BlockType(self.block_shape, self.block_shape[0] * self.block_shape[1] * self.dtype.primitive_bitwidth // 8)

    def tile(self, row: int, column: int) -> torch.Tensor:
        """The tile at ``row`` and ``column``, zeros beyond the matrix."""
        rows = row + torch.arange(self.block_shape[0])[:, None]
        columns = column + torch.arange(self.block_shape[1])[None]
        there = (rows >= 0) & (rows < self.shape[0]) & (columns >= 0) & (columns < self.shape[1])
        stride = self.buffer.tensor.stride(0) if self.buffer.far is None else self.buffer.far[0]
        result = torch.zeros(self.block_shape, dtype=self.dtype.torch)
        result[there] = self.buffer.get(self.buffer.locate(rows * stride + columns, there))
        return result
