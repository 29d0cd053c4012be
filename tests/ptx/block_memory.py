"""What a thread block does to memory: loads and stores, its shared memory, atomics, and copies that land late."""

from __future__ import annotations

import numpy as np

from .memory import UNSIGNED
from .program import SHARED_BASE, PtxError

_COMBINED = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: np.where(old == expected, new, old),
}


class BlockMemory:
    """The part of :class:`ptx.machine.ThreadBlock` that knows memory."""

    def _active(self, guard) -> np.ndarray:
        """Indices of the threads that execute an instruction."""
        return np.arange(self.threads) if guard is None else np.flatnonzero(guard)

    def load_global(self, addresses, size, count, guard):
        active = self._active(guard)
        return self._widened(self.memory.load(addresses[active], size, count), active, size)

    def look(self, guard) -> None:
        """Other blocks have their turn before this one goes on: it may wait for what they write."""
        self.looked = self.looked or guard is None or bool(guard.any())

    def store_global(self, addresses, size, values, guard) -> None:
        active = self._active(guard)
        self.memory.store(addresses[active], size, [v[active] for v in values])

    def load_param(self, addresses, size, count, guard):
        active = self._active(guard)
        view = self.parameters[: len(self.parameters) // size * size].view(UNSIGNED[size])
        own = addresses[active]
        if len(own) and (own.min() < 0 or own.max() // size + count > len(view) or (own % size).any()):
            raise PtxError(f"reads parameters at {own[0]}, of {len(self.parameters)} bytes")
        return self._widened([view[own // size + i] for i in range(count)], active, size)

    def load_shared(self, addresses, size, count, guard):
        active = self._active(guard)
        first = self._shared_index(addresses[active], size, count)
        view = self._shared_as(UNSIGNED[size])
        return self._widened([view[first + i] for i in range(count)], active, size)

    def store_shared(self, addresses, size, values, guard) -> None:
        active = self._active(guard)
        first = self._shared_index(addresses[active], size, len(values))
        view = self._shared_as(UNSIGNED[size])
        for i, value in enumerate(values):
            view[first + i] = value[active]
        self.written(active, first * size, size * len(values))

    def _shared_as(self, kind) -> np.ndarray:
        """Shared memory as an array of whole values of a dtype."""
        size = np.dtype(kind).itemsize
        return self.shared[: len(self.shared) // size * size].view(kind)

    def _shared_index(self, addresses, size, count):
        """Index of the first value of each address, which it checks."""
        if not addresses.size:
            return addresses
        end = addresses + size * count
        if addresses.min() < SHARED_BASE or end.max() > self.shared_end:
            bad = addresses[(addresses < SHARED_BASE) | (end > self.shared_end)][0] - SHARED_BASE
            raise PtxError(f"{size * count} bytes at {bad} of {self.shared_end - SHARED_BASE} bytes of shared memory")
        if np.bitwise_or.reduce(addresses, axis=None) & (size * count - 1):
            raise PtxError(f"an access of {size * count} bytes to shared memory at an address that is not a multiple")
        return (addresses - SHARED_BASE) // size

    def _widened(self, values, active, size):
        """Values of the active threads, at their places among all."""
        made = []
        for value in values:
            array = np.zeros(self.padded, UNSIGNED[size])
            array[active] = value
            made.append(array)
        return made

    def atomic(self, space, operation, addresses, values, guard):
        """One thread after the other where they meet, else all at once."""
        active = self._active(guard)
        size = values[0].dtype.itemsize
        before = np.zeros(self.padded, values[0].dtype)
        apart = len(np.unique(addresses[active])) == len(active)
        for threads in [active] if apart else np.split(active, len(active)):
            place = addresses[threads]
            if space == "shared":
                index = self._shared_index(place, size, 1)
                view = self._shared_as(before.dtype)
                old = view[index]
            else:
                old = self.memory.load(place, size, 1)[0].view(before.dtype)
            new = _COMBINED[operation](old, *(v[threads] for v in values))
            before[threads] = old
            if space == "shared":
                view[index] = new
                self.written(threads, index * size, size)
            else:
                self.memory.store(place, size, [new.view(UNSIGNED[size])])
        return before

    # ------------------------------------------------------------ copies that land late

    def copy_async(self, to, source, size, count, guard) -> None:
        active = self._active(guard)
        bytes_read = np.full(len(active), size) if count is None else count[active].astype(np.int64)
        if (bytes_read > size).any():
            raise PtxError(f"a copy of {bytes_read.max()} bytes of {size}")
        data = np.zeros((len(active), size // 4), np.uint32)
        reads = bytes_read > 0
        if ((bytes_read != size) & reads).any():
            raise PtxError("copies of a part of their bytes are not known here")
        if (source[active] & (size - 1)).any():
            raise PtxError(f"a copy of {size} bytes from an address that is not a multiple")
        if reads.any():
            data[reads] = np.stack(self.memory.load(source[active][reads], 4, size // 4), 1)
        place = self._shared_index(to[active], size, 1) * (size // 4)
        words = place[:, None] + np.arange(size // 4)
        self._shared_as(np.uint32)[words] = 0xFFFFFFFF
        self.copies.append(Copy(active, words, data, self.groups[active].copy()))

    def copy_commit(self, guard) -> None:
        self.groups[self._active(guard)] += 1

    def copy_wait(self, pending, guard) -> None:
        """Copies land: all of the waiting threads (``None``), or those of all but their ``pending`` newest groups."""
        waits = np.zeros(self.padded, bool)
        waits[self._active(guard)] = True
        words, kept = self._shared_as(np.uint32), []
        for copy in self.copies:
            lands = waits[copy.threads]
            if pending is not None:
                lands = lands & (copy.groups < self.groups[copy.threads] - pending)
            words[copy.words[lands]] = copy.data[lands]
            if self.kernel.fences_copies:
                self.written(copy.threads[lands], copy.words[lands, 0] * 4, copy.data.shape[1] * 4)
            else:
                self.written_by_async(4 * copy.words[lands][..., None] + np.arange(4))
            if not lands.all():
                kept.append(Copy(*(part[~lands] for part in (copy.threads, copy.words, copy.data, copy.groups))))
        self.copies = kept


class Copy:
    """Copies of one instruction on the way: threads, words of shared memory, data, and the number of the group they are in."""

    def __init__(self, threads, words, data, groups):
        self.threads, self.words, self.data, self.groups = threads, words, data, groups
