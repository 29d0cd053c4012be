"""What a tensor map says: how TMA finds the tiles of a tensor. Kernels get 128 bytes that only the hardware can read.

On a GPU, ``cuTensorMapEncodeTiled`` makes those bytes. Here they are a magic number and the place of the map in a list that
this process keeps; :func:`decode` finds the map again when an instruction names the address of those bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

BYTES = 128
MAGIC = b"TMA map:"  # so that other bytes are not taken for a map
SWIZZLES = (0, 32, 64, 128)  # bytes, by the number that CUDA has for each mode

_maps: list[TensorMap] = []


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map. Dimensions are in the order of PTX coordinates: the contiguous one first.

    Attributes:
        address: of element 0. element_bytes: of one element.
        shape: elements of the tensor. Loads fill what lies beyond with zeros (or NaN), stores leave it out.
        strides: bytes from one index to the next, of every dimension but the first: one fewer than ``shape``.
        box: elements that one copy moves.
        swizzle: bytes of a row of the box in shared memory, 32, 64 or 128, whose 16-byte pieces are permuted: piece ``j`` of
            row ``i`` lies at ``j ^ (i * swizzle // 128 % (swizzle // 16))``, rows counted from an address that is a multiple
            of ``8 * swizzle``. 0: not permuted.
        fills_nan: whether what lies beyond the tensor is read as NaN.
    """

    address: int
    element_bytes: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    fills_nan: bool = False

    def __post_init__(self):
        """What ``cuTensorMapEncodeTiled`` refuses is refused here too."""
        rank = len(self.shape)
        wrong = {
            "rank": not 1 <= rank <= 5 or len(self.strides) != rank - 1 or len(self.box) != rank,
            "address": self.address % 16 or self.address <= 0,
            "element_bytes": self.element_bytes not in (1, 2, 4, 8),
            "shape": not all(1 <= n <= 2**32 for n in self.shape),
            "strides": not all(0 < n < 2**40 and n % 16 == 0 for n in self.strides),
            "box": not all(1 <= n <= 256 for n in self.box) or self.box[0] * self.element_bytes % 16,
            "swizzle": self.swizzle not in SWIZZLES or 0 < self.swizzle < self.box[0] * self.element_bytes,
        }
        if named := [name for name, is_wrong in wrong.items() if is_wrong]:
            raise ValueError(f"no tensor map can be made, because of its {' and '.join(named)}: {self}")


def encode(tensor_map: TensorMap) -> bytes:
    """The bytes that stand for a map in a kernel's parameters. The same map, the same bytes."""
    if tensor_map not in _maps:
        _maps.append(tensor_map)
    return struct.pack("<8sQ", MAGIC, _maps.index(tensor_map)).ljust(BYTES, b"\xa5")


def decode(blob: bytes) -> TensorMap:
    """The map that :func:`encode` made these bytes of.

    Raises:
        ValueError: it made no such bytes.
    """
    blob = bytes(blob)
    magic, number = struct.unpack_from("<8sQ", blob)
    if magic != MAGIC or number >= len(_maps) or blob != encode(_maps[number]):
        raise ValueError(f"these bytes are no tensor map: {blob[:16].hex()}...")
    return _maps[number]
