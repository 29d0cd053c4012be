"""What the async proxy may see of what threads wrote to shared memory: products of warpgroups and TMA go through that proxy;
stores, atomics and ``cp.async`` through the generic one.

Between a write through the one and an access through the other there must be a ``fence.proxy.async``: after the write and
before the access, in program order or by barriers. So those who wrote may fence before the barrier, those who go on behind it,
or one thread for all between two barriers. To tell, vector clocks keep account of what happens before what: a thread knows, of
each other, up to when it has seen its writes, and up to when a fence is behind them too. It learns both at barriers, mbarriers
and ``bar.warp.sync``, from those who came there. (Not from flags in memory: a kernel whose threads wait for each other by loads
would be refused. Ours do not.)

Time is the number of writes so far. Clocks are never changed, and threads that come from one barrier share one: so barriers
cost little.
"""

from __future__ import annotations

import numpy as np

from .program import PtxError

_THREADS = 10  # bits for a thread in a stamp; the time is above them, with room for four million writes


class Clock:
    """What threads know of each thread. ``times[0]``: up to when its writes have happened before; ``times[1]``: up to when a
    fence is behind them too. What a thread did itself it knows in any case."""

    __slots__ = ("times",)

    def __init__(self, times: np.ndarray):
        self.times = times


class BlockProxies:
    """The part of :class:`ptx.machine.ThreadBlock` that knows proxies."""

    def start_proxies(self) -> None:
        self.watched = self.kernel.has_async_proxy  # else nothing of this is done
        self.now = 0
        # Who wrote last to each two bytes (no operand's elements are smaller), and when, if through the generic proxy; else 0.
        self.stamps = np.zeros(len(self.shared) // 2 if self.watched else 0, np.uint32)
        self.last_writes = np.zeros(self.padded, np.int64)
        self.last_fences = np.zeros(self.padded, np.int64)
        self.clocks = np.full(self.padded, Clock(np.zeros((2, self.padded), np.int64)), object)
        self.nothing_unfenced: dict[tuple[int, int], bool] = {}  # for groups of threads, since a write or a clock changed

    # ------------------------------------------------------------ what happens before what

    def known_by(self, threads: np.ndarray) -> np.ndarray:
        """What these threads know together: times as in a clock."""
        times = np.maximum.reduce([clock.times for clock in set(self.clocks[threads].tolist())])
        times[0, threads] = self.now
        times[1, threads] = np.maximum(times[1, threads], self.last_fences[threads])
        return times

    def knows(self, threads: np.ndarray, times: np.ndarray) -> None:
        """From now on these threads know this, and nothing else."""
        self.clocks[threads] = Clock(times)
        self.nothing_unfenced.clear()

    def learns(self, threads: np.ndarray, times: np.ndarray) -> None:
        """From now on these threads know this too."""
        for clock, some in self._by_clock(threads):
            self.knows(some, np.maximum(clock.times, times))

    def _by_clock(self, threads: np.ndarray) -> list[tuple[Clock, np.ndarray]]:
        """Clocks, and those of the threads who share one."""
        held = self.clocks[threads]
        clocks = set(held.tolist())
        return [(held[0], threads)] if len(clocks) == 1 else [(clock, threads[held == clock]) for clock in clocks]

    def warps_meet(self, guard) -> None:
        """At ``bar.warp.sync``."""
        if self.watched:
            active = self._active(guard)
            for lanes in np.split(active, np.flatnonzero(np.diff(active // 32)) + 1):
                if len(lanes):
                    self.knows(lanes, self.known_by(lanes))

    def fence_proxies(self, guard) -> None:
        """``fence.proxy.async``: behind all that a thread wrote, and all that it knows others wrote."""
        if self.watched:
            active = self._active(guard)
            for clock, threads in self._by_clock(active):
                self.knows(threads, clock.times[[0, 0]])
            self.last_fences[active] = self.now

    # ------------------------------------------------------------ writes, and who sees them

    def written(self, threads: np.ndarray, places: np.ndarray, size: int) -> None:
        """Through the generic proxy: ``size`` bytes at each place, a multiple of that, by the thread."""
        if self.watched and len(threads):
            self.now += 1
            self.last_writes[threads] = self.now
            self.nothing_unfenced.clear()
            count = max(size // 2, 1)
            pieces = self.stamps[: len(self.stamps) // count * count].reshape(-1, count)
            pieces[places // (2 * count)] = (self.now << _THREADS | threads)[..., None]

    def written_by_async(self, places: np.ndarray) -> None:
        """Through the async proxy: the bytes at these places."""
        if self.watched:
            self.stamps[places >> 1] = 0

    def seen_by_async(self, threads: np.ndarray, numbers: np.ndarray, size: int, what: str, text: str = "") -> None:
        """These threads have the async proxy read or write values of ``size`` bytes, numbered from where shared memory begins.

        Raises:
            PtxError: somebody wrote there last of whose write they know of no fence behind it.
        """
        group = int(threads[0]), len(threads)
        if group not in self.nothing_unfenced:
            known = (clock.times[1] for clock, _ in self._by_clock(threads))
            self.nothing_unfenced[group] = all((times >= self.last_writes).all() for times in known)
        if self.nothing_unfenced[group]:
            return
        pairs = numbers if size == 2 else numbers >> 1 if size == 1 else 2 * numbers[..., None] + np.arange(size // 2)
        stamps = self.stamps[pairs]
        if not stamps.any():
            return
        writers, times = stamps & ((1 << _THREADS) - 1), stamps >> _THREADS
        for clock, some in self._by_clock(threads):
            for at in np.flatnonzero(clock.times[1][writers] < times):
                writer, time = writers.flat[at], times.flat[at]
                others = (some != writer).any()
                if others or self.last_fences[writer] < time:
                    barrier = " or barrier" if others and clock.times[0][writer] < time else ""
                    raise PtxError(
                        f"{what} byte {2 * pairs.flat[at]} of shared memory, which thread {writer} wrote, with no "
                        f"fence.proxy.async{barrier} between{f': {text[:60]}' if text else ''}"
                    )
