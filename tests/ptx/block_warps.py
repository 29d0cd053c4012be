"""What the threads of a warp do together."""

from __future__ import annotations

import numpy as np

from . import matrices
from .program import PtxError

WARP = 32


class BlockWarps:
    """The part of :class:`ptx.machine.ThreadBlock` that knows collectives."""

    def _warp_check(self, members, guard) -> None:
        active = self._active(guard)
        if (members[active] != np.uint32(0xFFFFFFFF)).any():
            raise PtxError("collectives of some lanes are not known here")
        self.whole_warps(guard)

    def shuffle(self, mode, values, by, clamp, members, guard):
        self._warp_check(members, guard)
        lane = np.arange(self.padded) % WARP
        clamp = clamp.astype(np.int64)
        segment, limit = (clamp >> 8) & 31, clamp & 31
        by = by.astype(np.int64) & 31
        highest, lowest = (lane & segment) | (limit & ~segment), lane & segment
        if mode == "up":
            source, inside = lane - by, lane - by >= highest
        elif mode == "down":
            source, inside = lane + by, lane + by <= highest
        elif mode == "bfly":
            source, inside = lane ^ by, (lane ^ by) <= highest
        else:
            source = lowest | (by & ~segment)
            inside = source <= highest
        source = np.where(inside, source, lane) + np.arange(self.padded) // WARP * WARP
        return values[source], inside

    def _lanes(self, guard) -> np.ndarray:
        return (self.everyone if guard is None else guard).reshape(-1, WARP)

    def vote(self, mode, values, members, guard):
        self._warp_check(members, guard)
        lanes = self._lanes(guard)
        votes = values.reshape(-1, WARP) & lanes
        if mode == "ballot":
            return np.repeat((votes.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32), WARP)
        some, every = votes.any(1), (votes == lanes).all(1)
        result = {"any": some, "all": every, "uni": every | ~some}[mode]
        return np.repeat(result, WARP)

    def reduce(self, mode, values, members, guard):
        self._warp_check(members, guard)
        function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                    "xor": np.bitwise_xor}[mode]  # fmt: skip
        lanes, values = self._lanes(guard), values.reshape(-1, WARP)
        first = np.take_along_axis(values, lanes.argmax(1)[:, None], 1)  # what lanes that are not there may repeat
        values = np.where(lanes, values, 0 if mode in ("add", "xor") else first).astype(values.dtype)
        return np.repeat(function.reduce(values, axis=1, dtype=values.dtype), WARP)

    def load_matrices(self, addresses, count, transposed, guard):
        self.whole_warps(guard)
        rows = matrices.rows_of(addresses, count)
        here = self._lanes(guard).any(1)
        found = self._shared_as(np.uint32)[self._shared_index(rows[here], 16, 1)[..., None] * 4 + np.arange(4)]
        data = np.zeros((*rows.shape, 4), np.uint32)
        data[here] = found
        return matrices.spread(data, transposed)

    def store_matrices(self, addresses, values, transposed, guard) -> None:
        self.whole_warps(guard)
        rows = matrices.rows_of(addresses, len(values))
        here = self._lanes(guard).any(1)
        first = self._shared_index(rows[here], 16, 1) * 8
        self._shared_as(np.uint16)[first[..., None] + np.arange(8)] = matrices.collect(values, transposed)[here]
        self.written(matrices.rows_of(np.arange(self.padded), len(values))[here], first * 2, 16)

    def multiply_add(self, shape, kinds, a, b, c, guard):
        self.whole_warps(guard)
        return matrices.multiply_add(shape, kinds, a, b, c)
