"""The machine that emulated Gluon kernels run on: programs and their partitions, barriers, shared memory, TMA loads.

A partition is a thread, and only one runs at a time. Whenever one synchronises, a seeded draw says who goes on: a partition
of any program, a load that lands, or a product that is computed. The order is the same for the same seed.

Races are found by what is known to have happened before what (vector clocks), so an access that nothing orders is reported
whatever order was drawn. Every partition counts its own events; a load into a tile, and a product of a partition, count as
events of their own that become known to whoever sees the barrier, or waits for the product. See :mod:`gluon_emulation`.
"""

from __future__ import annotations

import random
import threading

from gluon_emulation_values import KernelError, where


class _Stopped(BaseException):
    """Ends the other partitions once one has failed."""


class Clock(dict):
    """The latest event known of each source of events."""

    def join(self, other: dict) -> None:
        for source, time in other.items():
            if time > self.get(source, 0):
                self[source] = time

    def knows(self, event: tuple) -> bool:
        return self.get(event[0], 0) >= event[1]


class Program:
    """One program of the grid."""

    def __init__(self, index: int, grid: int):
        self.index, self.grid = index, grid
        self.partitions: list[Partition] = []
        self.stages: list[Stage] = []  # of all its shared memory

    def finish(self) -> None:
        """Everything that was begun must be known to have ended."""
        for p in self.partitions:
            if p.clock.get(p.products_source, 0) != p.issued:
                raise KernelError(f"{p.name} ends with a product in flight, the last begun at {p.last_product}")
        known = self.partitions[0].clock
        for stage in self.stages:
            if any(known.get(source, 0) != count for source, count in stage.loads.items()):
                raise KernelError(f"program {self.index} ends with a TMA load in flight, into {stage.name}")

    def specialize(self, functions) -> object:
        """Runs the functions side by side, the first as the default partition; returns what that returns."""
        me = machine().running
        check(len(self.partitions) == 1, "specialises its warps a second time")
        me.tick()
        me.name = self.name_of(functions[0][0], 0)
        workers = [machine().begin(self, self.name_of(function, i), function, arguments, me.clock)
                   for i, (function, arguments) in enumerate(functions[1:], 1)]  # fmt: skip
        result = functions[0][0](*functions[0][1])
        machine().wait_until(lambda: all(w.done for w in workers), lambda: "has ended")
        for w in workers:
            me.clock.join(w.clock)
        return result

    def name_of(self, function, number: int) -> str:
        return f"{function.__name__}[{number}] of program {self.index}"


class Partition:
    def __init__(self, name: str, number: int, program: Program, clock: Clock):
        self.name, self.number, self.program, self.clock = name, number, program, clock
        self.fences: list[int] = []  # times of fence_async_shared
        self.products: list = []  # in flight, the oldest first
        self.issued, self.last_product = 0, ""
        self.seen: dict = {}  # barrier: the last phase this partition saw complete
        self.polled: dict = {}  # place in global memory: what an atomic addition of 0 last found there
        self.together = True  # no warp can be behind another with its stores and additions
        self.waits_for = None  # a function that says whether it may go on
        self.reason = str  # a function that says why it waits
        self.done = False
        self.turn = threading.Semaphore(0)

    def tick(self) -> tuple:
        """A new event of this partition."""
        self.clock[self.number] = self.clock.get(self.number, 0) + 1
        return self.number, self.clock[self.number]

    @property
    def products_source(self):
        return "products", self.number


class Machine:
    """Runs all programs of a launch at once. ``current`` is the one that runs: only one does."""

    current: Machine | None = None

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.partitions: list[Partition] = []
        self.threads: list[threading.Thread] = []
        self.loads: list[Load] = []  # in flight
        self.weights: dict = {}
        self.failure: BaseException | None = None
        self.ended = threading.Semaphore(0)

    def run(self, function, grid: int) -> None:
        Machine.current = self
        try:
            programs = [Program(i, grid) for i in range(grid)]
            for p in programs:
                self.begin(p, f"program {p.index}", function, (), Clock())
            self.choose()
            self.running.turn.release()
            self.ended.acquire()
            for thread in self.threads:
                thread.join()
            if self.failure is not None:
                raise self.failure
            for p in programs:
                p.finish()
        finally:
            Machine.current = None

    def begin(self, program: Program, name: str, function, arguments, clock) -> Partition:
        partition = Partition(name, len(self.partitions), program, Clock(clock))
        program.partitions.append(partition)
        self.partitions.append(partition)
        self.threads.append(threading.Thread(target=self._work, args=(partition, function, arguments), daemon=True))
        self.threads[-1].start()
        return partition

    def _work(self, me: Partition, function, arguments) -> None:
        me.turn.acquire()
        try:
            if self.failure is None:
                function(*arguments)
                me.done = True
                if not all(p.done for p in self.partitions):
                    self.choose()
                    self.running.turn.release()
                    return
        except _Stopped:
            return
        except BaseException as error:
            self.failure = error
            for p in self.partitions:
                p.turn.release()
        self.ended.release()

    def _weight(self, agent) -> float:
        """How readily an agent goes on: drawn once, so that some are far ahead of others."""
        if agent not in self.weights:
            self.weights[agent] = self.random.choice((0.02, 1.0, 1.0, 50.0))
        return self.weights[agent]

    def point(self) -> None:
        """Lets a draw decide who goes on; returns when it is this partition's turn."""
        me = self.running
        self.choose()
        if self.running is not me:
            self.running.turn.release()
            me.turn.acquire()
        if self.failure is not None:
            raise _Stopped

    def choose(self) -> None:
        """Draws until a partition is to run."""
        while True:
            agents = [p for p in self.partitions if not p.done and (p.waits_for is None or p.waits_for())]
            agents += [("compute", p) for p in self.partitions if p.products]
            agents += [("land", load) for load in self.loads]
            if not agents:
                waiting = [f"{p.name} {p.reason()}" for p in self.partitions if not p.done]
                raise KernelError("deadlock: " + "; ".join(waiting))
            weights = [self._weight(a if isinstance(a, Partition) else (a[0], a[1].program.index)) for a in agents]
            (drawn,) = self.random.choices(agents, weights)
            if isinstance(drawn, Partition):
                self.running = drawn
                return
            what, which = drawn
            if what == "compute":
                which.products.pop(0).compute()
            else:
                self.loads.remove(which)
                which.land()

    def wait_until(self, condition, reason) -> None:
        """Until the condition holds and it is this partition's turn. ``reason``: says why it waits, if there is a deadlock."""
        me = self.running
        me.waits_for, me.reason = condition, reason
        self.point()
        me.waits_for, me.reason = None, str


def machine() -> Machine:
    if Machine.current is None:
        raise KernelError("no kernel is running")
    return Machine.current


def running() -> Partition:
    """The partition that runs."""
    return machine().running


def fail(message: str) -> None:
    """Raises, naming the partition and the line."""
    raise KernelError(f"{running().name} {message}, at {where()}")


def check(condition, message: str) -> None:
    if not condition:
        fail(message)


# --- barriers


class Barrier:
    """An mbarrier: a phase completes when nobody is left to arrive and no byte to come."""

    def __init__(self, name: str):
        self.name = name
        self.count = None
        self.completed = 0  # phases

    def init(self, count: int) -> None:
        me = running()
        check(self.count is None, f"initialises {self.name} a second time")
        check(count > 0, f"initialises {self.name} with a count of {count}")
        self.initialised = me.tick()
        self.count = self.pending = count
        self.missing = self.expected = self.loaded = 0  # bytes: to come, expected and begun in this phase
        self.gathered, self.known = Clock(), Clock()

    def use(self, what: str) -> Partition:
        """The partition that uses the barrier, which must know of its initialisation."""
        me = running()
        check(self.count is not None, f"{what} {self.name}, which is not initialised")
        check(me.clock.knows(self.initialised), f"{what} {self.name}, whose initialisation it does not know of")
        return me

    def arrive(self, count: int, byte_count: int = 0) -> None:
        machine().point()
        me = self.use("arrives at")
        check(self.pending >= count, f"arrives at {self.name} more often than its count of {self.count} allows in a phase")
        self.gathered.join(me.clock)
        me.tick()
        self.pending -= count
        self.missing += byte_count
        self.expected += byte_count
        self.complete()

    def complete(self) -> None:
        if self.pending == 0 and self.missing == 0:
            self.completed += 1
            self.pending, self.expected, self.loaded = self.count, 0, 0
            self.known, self.gathered = self.gathered, Clock()

    def wait(self, parity: int) -> None:
        me = self.use("waits for")
        check(parity in (0, 1), f"waits for {self.name} with parity {parity}")
        at = where()
        machine().wait_until(
            lambda: self.completed % 2 != parity,
            lambda: f"waits for the phase of parity {parity} of {self.state()}, at {at}",
        )
        phase = self.completed - 1
        last = me.seen.get(self, -1)
        check(phase - last < 3, f"waits for {self.name} and may have been lapped: it saw phase {last}, and now it is {phase}")
        me.seen[self] = phase
        me.clock.join(self.known)
        me.tick()

    def state(self) -> str:
        return f"{self.name} ({self.completed} phases done, {self.pending} arrivals and {self.missing} bytes to come)"

    def __repr__(self):
        return self.name


# --- shared memory


class Access:
    """One write of some rows of a stage, and the reads since."""

    def __init__(self, event, generic: bool, what: str):
        self.event, self.generic, self.what = event, generic, what
        self.reads: list = []  # (event, what)

    def copy(self) -> Access:
        other = Access(self.event, self.generic, self.what)
        other.reads = list(self.reads)
        return other


class Stage:
    """A matrix in shared memory, and who touched which of its rows last."""

    def __init__(self, name: str, data):
        self.name, self.data = name, data
        self.rows: list = [None] * len(data)
        self.loads: dict[tuple, int] = {}  # how many there were, by the rows that they write: each arrives on its own
        running().program.stages.append(self)

    def _accesses(self, rows: range) -> list:
        """The last writes of these rows, and of no other rows."""
        # What a step takes is nearly always one write.
        found = list({id(a): a for a in self.rows[rows.start : rows.stop] if a is not None}.values())
        if len(rows) < len(self.rows):
            for access in list(found):
                if any(self.rows[i] is access for i in range(len(self.rows)) if i not in rows):
                    alone = access.copy()
                    for i in rows:
                        if self.rows[i] is access:
                            self.rows[i] = alone
                    found[[a is access for a in found].index(True)] = alone
        return found

    def _ordered(self, access: Access, verb: str, generic: bool) -> None:
        """The last write must have happened before what this partition does now, and be visible to it."""
        me = running()
        check(me.clock.knows(access.event), f"{verb} {self.name} with nothing that orders it after {access.what}")
        if access.generic and not generic:
            writer, time = access.event
            fence = next((f for f in machine().partitions[writer].fences if f > time), None)
            fenced = fence is not None and me.clock.knows((writer, fence))
            check(fenced, f"{verb} {self.name} without a fence_async_shared between it and {access.what}")

    def read(self, rows: range, event, generic: bool, verb: str) -> None:
        me = running()
        if any(self.rows[i] is None for i in rows):
            fail(f"{verb} {self.name}, which is unwritten")
        for access in self._accesses(rows):
            self._ordered(access, verb, generic)
            access.reads.append((event, f"{me.name} {verb} it at {where()}"))

    def write(self, rows: range, event, generic: bool, verb: str) -> None:
        me = running()
        for access in self._accesses(rows):
            self._ordered(access, verb, generic)
            for read, what in access.reads:
                check(me.clock.knows(read), f"{verb} {self.name} with nothing that orders it after the read: {what}")
        new = Access(event, generic, f"the write: {me.name} {verb} it at {where()}")
        for i in rows:
            self.rows[i] = new


class Load:
    """A TMA load in flight."""

    def __init__(self, descriptor, row: int, column: int, barrier: Barrier, tile):
        me = barrier.use("loads for")
        stage, self.tile = tile.stage, tile
        self.program, self.barrier = me.program, barrier
        self.nbytes = descriptor.block_type.nbytes
        self.values = descriptor.tile(row, column)  # nothing writes them during a launch
        barrier.loaded += self.nbytes
        told = f"which has been told to expect {barrier.expected} in this phase"
        check(barrier.loaded <= barrier.expected, f"loads {self.nbytes} bytes for {barrier.name}, {told}")
        source = ("loads", id(stage), tile.rows)
        stage.loads[source] = stage.loads.get(source, 0) + 1
        event = (source, stage.loads[source])
        stage.write(tile.rows, event, False, "loads by TMA into")
        self.clock = Clock(me.clock)
        self.clock.join(dict([event]))
        me.tick()
        machine().loads.append(self)

    def land(self) -> None:
        self.tile.stage.data[self.tile.rows.start : self.tile.rows.stop] = self.values
        self.barrier.missing -= self.nbytes
        self.barrier.gathered.join(self.clock)
        self.barrier.complete()
