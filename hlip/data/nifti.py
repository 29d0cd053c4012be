"""What the NIfTI reader of ITK does not check or tell: truncated files, missing geometry, voxels that are not numbers.

ITK fills the missing end of a truncated file without a word, and turns NaN and infinity into 0, which is water in a
CT. So the header and, where needed, the bytes are looked at here first; the image itself still comes from ITK.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_CHUNK = 1 << 20
_FLOATS = {16: "f4", 64: "f8"}  # datatype codes
_NO_SLOPE = 2.220446049250313e-16  # below, ITK takes it for 1


class NiftiError(ValueError):
    """A NIfTI file that cannot be read; the message says why."""


@dataclass(frozen=True)
class NiftiHeader:
    """The part of a header that ITK keeps to itself."""

    offset: int  # where the voxels begin
    file_bytes: int  # length of the whole file, uncompressed, according to the header
    floats: np.dtype | None  # the stored type, if it can hold NaN
    has_sizes: bool
    negative: tuple[bool, ...]  # which of the three voxel sizes are below 0, where the standard wants none
    has_orientation: bool
    slope: float  # as ITK applies it: with the intercept, values are stored ones times this
    intercept: float

    @property
    def rescaled(self) -> bool:
        """Whether ITK gives other values than those stored."""
        return (self.slope, self.intercept) != (1, 0)


def read_nifti_header(path: Path) -> NiftiHeader:
    """Header of a single-file NIfTI-1 or NIfTI-2 image, gzip-compressed or not, in either byte order.

    Raises:
        NiftiError: another format, a header that cannot be, or voxels kept in another file.
    """
    with open(path, "rb") as file:
        head = file.read(_CHUNK)
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 540)
        except zlib.error:
            raise NiftiError("damaged gzip file") from None
    for order in "<>":
        version = {348: 1, 540: 2}.get(struct.unpack_from(order + "i", head)[0] if len(head) >= 348 else 0)
        if version:
            break
    else:
        raise NiftiError("not a NIfTI file (empty, damaged, or another format)")
    if version == 2 and len(head) < 540:
        raise NiftiError("damaged NIfTI header: cut short")
    at = {
        1: ("8h", 40, 70, "8f", 76, "f", 108, "2h", 252, "2f", 112),
        2: ("8q", 16, 12, "8d", 104, "q", 168, "2i", 344, "2d", 176),
    }[version]
    dim = struct.unpack_from(order + at[0], head, at[1])
    kind, bits = struct.unpack_from(order + "2h", head, at[2])
    sizes = struct.unpack_from(order + at[3], head, at[4])[1:4]
    offset = struct.unpack_from(order + at[5], head, at[6])[0]
    codes = struct.unpack_from(order + at[7], head, at[8])
    slope, intercept = (n if math.isfinite(n) else 0.0 for n in struct.unpack_from(order + at[9], head, at[10]))
    if abs(slope) < _NO_SLOPE:
        slope = 1.0
    if (head[344:347] if version == 1 else head[4:7]) != f"n+{version}".encode():
        raise NiftiError("a NIfTI or Analyze header whose voxels are in another file: convert to a single .nii.gz")
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1 or bits < 1 or not math.isfinite(offset) or offset < 0:
        raise NiftiError("damaged NIfTI header: sizes that cannot be")
    return NiftiHeader(
        offset=int(offset),
        file_bytes=int(offset) + math.prod(dim[1 : dim[0] + 1]) * bits // 8,
        floats=np.dtype(order + _FLOATS[kind]) if kind in _FLOATS else None,
        has_sizes=all(math.isfinite(mm) and mm != 0 for mm in sizes),
        negative=tuple(mm < 0 for mm in sizes),
        has_orientation=any(code > 0 for code in codes),
        slope=slope,
        intercept=intercept,
    )


def check_content(path: Path, header: NiftiHeader, voxels: int) -> np.ndarray:
    """Read the file through once, in constant memory, without keeping it.

    Args:
        voxels: how many of the first voxels to look at.

    Returns:
        The places, in stored order, among those voxels that are not finite: (n,) int64.

    Raises:
        NiftiError: the file is shorter than its header says, or its compression is damaged.
    """
    if header.floats is None and not _is_gzip(path):
        found, bad = path.stat().st_size, np.empty(0, np.int64)
    else:
        found, bad = _look_through(path, header, voxels)
    if found < header.file_bytes:
        raise NiftiError(f"cut short or damaged: {found} of {header.file_bytes} bytes")
    return bad


def _look_through(path: Path, header: NiftiHeader, voxels: int) -> tuple[int, np.ndarray]:
    found, seen, bad, rest = 0, 0, [], b""
    for chunk in _content(path):
        before = max(header.offset - found, 0)
        found += len(chunk)
        if header.floats is not None and seen < voxels and len(chunk) > before:
            data = rest + chunk[before:]
            values = np.frombuffer(data, header.floats, len(data) // header.floats.itemsize)
            rest = data[values.nbytes :]
            bad.append(seen + np.flatnonzero(~np.isfinite(values[: voxels - seen])))
            seen += len(values)
        if found >= header.file_bytes:
            break
    return found, np.concatenate(bad) if bad else np.empty(0, np.int64)


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _content(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed (gzip, one or several members), up to the first damage."""
    packed = _is_gzip(path)
    inflate = zlib.decompressobj(wbits=31)
    with open(path, "rb") as file:
        while data := file.read(_CHUNK):
            if not packed:
                yield data
                continue
            while data:
                try:
                    yield inflate.decompress(data, 16 * _CHUNK)
                except zlib.error:
                    return
                data = inflate.unconsumed_tail
                if inflate.eof:
                    data, inflate = inflate.unused_data, zlib.decompressobj(wbits=31)
