"""Simulate drivers, their workers, leases and a store on one made-up clock, from a seed.

The driver, ready queue, retries, lease, ledger and commits are the program's own classes; the store is a dictionary and
a worker writes a few bytes. Each of them is a thread of which one runs at a time: whoever asks the store, or sleeps,
waits for a made-up time drawn from the seed, and the one that wakes first goes on. So a seed is one interleaving, and
always the same. What goes wrong, until `calm` seconds have passed: requests that fail before or after they took effect,
long pauses, lost workers, drivers killed with workers that outlive them, second drivers that ask or take over,
clocks of drivers years apart.

    python tests/support/simulation.py [--first 0] [--seeds 10000] [--seconds 0]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import heapq
import io
import logging
import random
import sys
import threading
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from graphs import make_node, make_plan

from cache_store.errors import CorruptShard, MissingShard, RunTaken, StorageUnavailable, StoreError
from cache_store.formats.codec import Field
from cache_store.records.nodes import NodeStore
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.base import FileInfo, Storage, views_of
from orchestrator.execution import attempts, driver, run_lease, store_watch
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.driver import Driver, DriverSettings
from orchestrator.execution.retry import NodeRetries
from orchestrator.execution.run_lease import Claim, Identity, LeaseTiming, RunLease
from orchestrator.execution.store_watch import StoreWatch
from orchestrator.plan.graph import Plan
from orchestrator.progress import Progress
from orchestrator.runners.base import Event, Failed, Succeeded
from workers.control import Update
from workers.specs.orders import WorkOrder

START = 1_790_000_000.0
DIGEST = "0123456789abcdef"
#: After so many made-up seconds a run without faults has ended.
PATIENCE_S = 20_000.0
STALE_S, BEAT_S = 45.0, 5.0
MOST_ATTEMPTS = 4
_ROWS = np.ones((2, 1), np.uint8)
WHERE = {"host": "a", "pid": 1, "device": "cpu", "threads": 1, "world_size": 1, "started": 0.0, "finished": 1.0}


class Killed(BaseException):
    """Ends a simulated process: nothing it does afterwards has an effect."""


class Violation(AssertionError):  # noqa: N818  not an error of the program
    """Something that must never happen has happened."""


@dataclass
class Process:
    """What is killed as a whole: a driver with its lease, or a worker."""

    name: str
    #: Its wall clock is so far from the store's.
    skew_s: float = 0.0
    dead: bool = False


@dataclass
class _Thread:
    process: Process
    work: Callable[[], None]
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    started: bool = False


class World:
    """The clock, the threads, the store's files, and the rules that are looked at after every change."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.now = 0.0
        #: How much more often faults happen than the shares say.
        self.wildness = self.draw.choice([1.0, 1.0, 3.0, 8.0])
        self.calm = self.draw.choice([0.0, 60.0, 300.0, 900.0])
        self.files: dict[str, tuple[bytes, float]] = {}
        self.violations: list[str] = []
        self.events: list[str] = []
        self.holders: dict[int, Lease] = {}
        self.drivers: dict[int, Process] = {}
        #: Set -> the driver that released it last.
        self.released: dict[str, Process] = {}
        #: Names of drivers that were told to take over.
        self.takers: set[str] = set()
        #: How often each kind of fault happened.
        self.faults: Counter[str] = Counter()
        self._queue: list[tuple[float, int, _Thread]] = []
        self._count = 0
        self._current: _Thread | None = None
        self._ended = threading.Semaphore(0)

    # -- threads

    def start(self, process: Process, work: Callable[[], None], after_s: float = 0.0) -> None:
        self._wake(_Thread(process, work), after_s)

    def _wake(self, thread: _Thread, after_s: float) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + after_s, self._count, thread))

    @property
    def process(self) -> Process:
        assert self._current is not None
        return self._current.process

    def sleep(self, seconds: float) -> None:
        """Let others go on for so long."""
        thread = self._current
        assert thread is not None
        if thread.process.dead or self.violations:
            raise Killed
        self._wake(thread, max(0.0, seconds))
        if self._next() is not thread:
            thread.go.acquire()
        if thread.process.dead or self.violations:
            raise Killed

    def _next(self) -> _Thread | None:
        """Choose who goes on, and let it, unless it is the one that asks."""
        if not self._queue:
            self._ended.release()
            return None
        asking = self._current
        self.now, _, thread = heapq.heappop(self._queue)
        self._current = thread
        if not thread.started:
            thread.started = True
            threading.Thread(target=self._body, args=(thread,), daemon=True).start()
        elif thread is not asking:
            thread.go.release()
        return thread

    def _body(self, thread: _Thread) -> None:
        try:
            if not thread.process.dead:
                thread.work()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever escapes is a finding
            self.violations.append(f"{thread.process.name}: {type(error).__name__}: {error}")
            self.events.append(traceback.format_exc())
        self._current = None
        self._next()

    def run(self) -> None:
        """Go on until every thread has ended."""
        self._next()
        if not self._ended.acquire(timeout=60):
            raise Violation("the simulation hangs")

    # -- faults

    @property
    def stormy(self) -> bool:
        return self.now < self.calm

    def chance(self, share: float, what: str) -> bool:
        """Draw whether a fault happens now."""
        happens = self.stormy and self.draw.random() < share * self.wildness
        self.faults[what] += happens
        return happens

    def violation(self, what: str) -> None:
        self.violations.append(f"at {self.now:.1f} s, {self.process.name}: {what}")


class SimulatedStorage(Storage):
    """The world's files as a store; every request takes time, and may fail."""

    def __init__(self, world: World) -> None:
        self.uri = "simulated://store"
        self._world = world

    def _request(self) -> None:
        world = self._world
        if world.chance(0.003, "pause"):
            world.sleep(world.draw.choice([3.0, 30.0, 100.0]))
        else:
            world.sleep(world.draw.random() * 0.05)
        if world.chance(0.01, "request refused"):
            raise StorageUnavailable("no answer")

    def _reply(self) -> None:
        if self._world.chance(0.01, "reply lost"):
            raise StorageUnavailable("the answer was lost")

    def _put(self, path: str, data: bytes) -> None:
        self._world.files[path] = (data, START + self._world.now)

    def _make_root(self) -> None:
        """Nothing to do."""

    def _open(self, path: str) -> io.BufferedIOBase:
        self._request()
        if path not in self._world.files:
            raise FileNotFoundError(path)
        return io.BytesIO(self._world.files[path][0])

    def _write(self, path: str, contents: tuple[Any, ...]) -> int:
        data = b"".join(views_of(contents))
        self._request()
        if path.endswith("/commit.json"):
            self._world.violation(f"{path} was written over")
        self._put(path, data)
        self._reply()
        return len(data)

    def _create(self, path: str, data: bytes) -> bool:
        self._request()
        first = path not in self._world.files
        if first:
            self._put(path, data)
        self._reply()
        return first

    def _exists(self, path: str) -> bool:
        self._request()
        return path in self._world.files

    def _size(self, path: str) -> int:
        self._request()
        if path not in self._world.files:
            raise FileNotFoundError(path)
        return len(self._world.files[path][0])

    def _below(self, prefix: str) -> list[str]:
        return [path for path in self._world.files if not prefix or path.startswith(f"{prefix}/")]

    def _list(self, prefix: str) -> Any:
        self._request()
        start = len(prefix) + 1 if prefix else 0
        return list({path[start:].split("/", 1)[0] for path in self._below(prefix)})

    def _walk(self, prefix: str) -> Iterator[FileInfo]:
        self._request()
        for path in self._below(prefix):
            data, written = self._world.files[path]
            yield FileInfo(path, len(data), written)

    def _move(self, source: str, target: str) -> None:
        self._request()
        if source not in self._world.files:
            raise FileNotFoundError(source)
        self._put(target, self._world.files.pop(source)[0])

    def _delete(self, path: str) -> None:
        self._request()
        self._lose(path)
        self._reply()

    def _delete_tree(self, prefix: str) -> None:
        # One file after another, as a folder is emptied: others look in between.
        for path in self._below(prefix):
            self._request()
            self._lose(path)
        self._reply()

    def _lose(self, path: str) -> None:
        if path.endswith("/commit.json"):
            self._world.violation(f"{path} was deleted")
        if path.endswith("/set.json"):
            self._world.released[path.split("/")[1]] = self._world.process
        self._world.files.pop(path, None)


def set_of(node_id: str) -> SetSpec:
    """The snapshot set of a node: one shard of two rows."""
    return SetSpec({"node": node_id}, 2, (Field("x", "uint8", (1,)),), 1, 2)


class SimulatedRunner:
    """Slots whose workers are processes of the world; a driver's own."""

    threads, device, slots = 1, "cpu", 2

    def __init__(self, world: World, storage: Storage, plan: Plan) -> None:
        self._world, self._storage, self._plan, self._owner = world, storage, plan, world.process
        self._running: dict[str, Process] = {}
        self._events: list[Event] = []

    def start(self) -> None: ...

    def free(self, *, together: bool = False) -> int:
        return self.slots - len(self._running)

    def submit(self, order: WorkOrder) -> None:
        if order.key in self._running:
            self._world.violation(f"{order.key} was submitted twice")
        worker = self._running[order.key] = Process(f"worker of {order.node_id} for {self._world.process.name}")
        self._world.start(worker, lambda: self._work(order, worker), self._world.draw.random())
        if self._world.chance(0.05, "worker lost"):
            self._world.start(Process("fate"), lambda: self._lose(order, worker), self._world.draw.random() * 4)

    def _lose(self, order: WorkOrder, worker: Process) -> None:
        if self._running.get(order.key) is not worker:
            return
        # Of a machine that only seems to be gone the worker goes on.
        worker.dead = self._world.draw.random() < 0.7
        self._end(order, worker, Failed(order.key, ConnectionError("gone"), lost=True))

    def _end(self, order: WorkOrder, worker: Process, event: Event) -> None:
        if self._running.get(order.key) is worker:
            del self._running[order.key]
            self._events.append(event)

    def _work(self, order: WorkOrder, worker: Process) -> None:
        try:
            commit = self._make(order, worker)
        except StoreError as error:
            self._end(order, worker, Failed(order.key, error))
        else:
            self._end(order, worker, Succeeded(order.key, commit))

    def _make(self, order: WorkOrder, worker: Process) -> Any:
        nodes, snapshots = NodeStore(self._storage), SnapshotStore(self._storage)
        for parent in order.parents.values():
            if self._plan.node(parent.node).makes_set:
                self._read_set(snapshots, parent.result["set"], order, worker)
            else:
                nodes.read_file(parent.files["w"])
        self._world.sleep(self._world.draw.random() * 10)
        if order.production.helper:
            snapshots.open(set_of(order.node_id)).put(0, [_ROWS])
            return None
        attempt = nodes.attempt(order.node_id, order.identity)
        attempt.write("w", order.node_id.encode())
        result: dict[str, Any] = {"seconds": 1.0, "where": WHERE}
        if self._plan.node(order.node_id).makes_set:
            made = snapshots.open(set_of(order.node_id))
            made.put(0, [_ROWS])
            result |= {"set": made.spec.id, "rows": 2, "bytes": 2}
        return attempt.commit(result)

    def _read_set(self, snapshots: SnapshotStore, set_id: str, order: WorkOrder, worker: Process) -> None:
        try:
            snapshots.load(set_id).shard(0)
        except (MissingShard, CorruptShard):
            # One that was given up for lost may come too late.
            # Of a helper at a set nobody needs anything.
            awaited = self._running.get(order.key) is worker and not order.production.helper
            if awaited and self._world.released.get(set_id) is self._owner:
                self._world.violation(f"{set_id} was released by the driver whose worker needs it")
            raise

    def wait(self, timeout_s: float) -> list[Event]:
        end = self._world.now + timeout_s
        self._world.sleep(0.01)
        while not self._events and self._world.now < end:
            self._world.sleep(min(0.1, end - self._world.now))
        found, self._events = self._events, []
        return found

    def progress(self) -> dict[str, Update]:
        return {}

    def waiting(self, tasks: int) -> None: ...

    def machine(self, node_id: str) -> str | None:
        return None

    def stop(self) -> None:
        for worker in self._running.values():
            worker.dead = True
        self._running.clear()

    def close(self) -> None:
        self.stop()


class Lease(RunLease):
    """The program's lease, whose signs of life are the world's; notes who held it when."""

    world: World
    owner: Process
    beaten = 0.0

    def _start(self) -> None:
        # Of those before the last one nobody has to know: that one has taken the run from them.
        before = max((number for number in self.world.holders if number < self._number), default=None)
        if before is not None and self.owner.name not in self.world.takers:
            other = self.world.holders[before]
            silent = self.world.now - other.beaten
            if other.holds and silent < STALE_S - 1:
                self.world.violation(f"took the run from {other.owner.name}, silent for {silent:.1f} s")
        if self._number in self.world.holders:
            self.world.violation(f"lease {self._number} is held twice")
        self.world.holders[self._number] = self
        super()._start()

    @property
    def holds(self) -> bool:
        return not self.owner.dead and not self._done.is_set() and not self.superseded

    def _beat(self, state: str) -> None:
        super()._beat(state)
        if not self._silent:
            self.beaten = self.world.now


class _Flag:
    """A `threading.Event` of the made-up clock."""

    def __init__(self, world: World) -> None:
        self._world, self._set = world, False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float) -> bool:
        end = self._world.now + timeout
        while not self._set and self._world.now < end:
            self._world.sleep(min(1.0, end - self._world.now))
        return self._set


class _SimulatedThread:
    """A `threading.Thread` that is one of the world's."""

    def __init__(self, world: World, target: Callable[[], None]) -> None:
        self._world, self._target, self.ident = world, target, None
        self._over = _Flag(world)

    def start(self) -> None:
        self.ident = 1  # type: ignore[assignment]

        def body() -> None:
            try:
                self._target()
            finally:
                self._over.set()

        self._world.start(self._world.process, body)

    def join(self, timeout: float) -> None:
        self._over.wait(timeout)


@contextlib.contextmanager
def made_up(world: World) -> Iterator[None]:
    """Let the program's modules see the world's clock and threads."""
    clock = types.SimpleNamespace(
        monotonic=lambda: world.now,
        time=lambda: START + world.now + world.process.skew_s,
        sleep=world.sleep,
    )
    threads = types.SimpleNamespace(
        Thread=lambda target, **_: _SimulatedThread(world, target),
        Event=lambda: _Flag(world),
    )

    def watch(look: Any, deadline_s: float) -> StoreWatch:
        return StoreWatch(
            look,
            deadline_s,
            clock=clock.monotonic,
            start=lambda work: world.start(world.process, work),
        )

    changes: list[tuple[Any, str, Any]] = [
        (attempts, "time", clock),
        (driver, "time", clock),
        (driver, "StoreWatch", watch),
        (run_lease, "time", clock),
        (run_lease, "threading", threads),
        (store_watch, "_log", types.SimpleNamespace(warning=lambda *_: None)),
        (run_lease, "_log", types.SimpleNamespace(warning=lambda *_: None, info=lambda *_: None)),
        (Identity, "own", classmethod(lambda cls: identity(world))),
        (Identity, "is_alive", lambda held: alive(world, held)),
    ]
    quiet = logging.NullHandler()
    logging.getLogger("segprop").addHandler(quiet)
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        logging.getLogger("segprop").removeHandler(quiet)
        for owner, name, value in before:
            setattr(owner, name, value)


def identity(world: World) -> Identity:
    """Half of the drivers are on one machine."""
    number = int(world.process.name.rpartition(" ")[2])
    return Identity("a" if number % 2 else f"b{number}", number, "boot", "ns", number)


def alive(world: World, held: Identity) -> bool | None:
    """Tell of a driver on the same machine whether it lives, of others nothing."""
    if held.host != identity(world).host:
        return None
    return not world.drivers[held.pid].dead


def random_plan(draw: random.Random) -> Plan:
    """A graph of stages, sets and scores."""
    nodes = []
    for index in range(draw.randrange(3, 9)):
        kind = draw.choice(["train", "materialize", "materialize", "evaluate"]) if index else "train"
        earlier = [node.id for node in nodes]
        parents = sorted(draw.sample(earlier, min(len(earlier), draw.randrange(1, 4))))
        task = {"train": {"epochs": 1}} if kind == "train" else {}
        nodes.append(dataclasses.replace(make_node(f"n{index}", kind, parents), task=task))
    targets = [node.id for node in nodes if node.kind != "materialize"]
    return make_plan(nodes, targets, draw.choice(["release", "release", "keep"]))


def simulate(seed: int) -> World:
    """Play one seed to its end. Violation, with the seed and what happened, when a rule was broken."""
    world = World(seed)
    plan = random_plan(world.draw)
    finished: list[str] = []
    with made_up(world):
        world.start(Process("people 0"), lambda: _people(world, plan, finished))
        world.run()
    committed = {path.split("/")[1] for path in world.files if path.endswith("/commit.json")}
    if finished and (missing := set(plan.targets) - committed):
        world.violations.append(f"said done without {sorted(missing)}")
    if world.violations:
        raise Violation(f"seed {seed}: " + "; ".join(world.violations[:5]) + "\n" + "\n".join(world.events[-40:]))
    return world


def _people(world: World, plan: Plan, finished: list[str]) -> None:
    """Start a driver, and another one when it has ended or, impatient, beside it; kill some."""
    number = 0
    while not finished and world.now < world.calm + PATIENCE_S:
        number += 1
        process = world.drivers[number] = Process(f"driver {number}", world.draw.choice([0.0, -1e9, 5.0, 1e9]))
        over = _Flag(world)
        take_over = world.chance(0.3, "taken over")
        world.start(process, lambda p=process, o=over, t=take_over: _drive(world, plan, p, o, t, finished))
        if world.chance(0.6, "driver killed"):
            world.sleep(world.draw.random() * 90)
            process.dead = True
            continue
        if world.chance(0.5, "second driver"):
            world.sleep(world.draw.random() * 60)
            continue
        while not over.is_set() and not process.dead and world.now < world.calm + PATIENCE_S:
            world.sleep(5.0)
        world.sleep(1.0)
    if not finished:
        world.violation("it does not come to an end")


def _drive(world: World, plan: Plan, process: Process, over: _Flag, take_over: bool, finished: list[str]) -> None:
    """What a session does with a plan."""
    storage = SimulatedStorage(world)
    lease_class = type("LeaseOfOne", (Lease,), {"world": world, "owner": process})
    timing = LeaseTiming(STALE_S, BEAT_S, world.sleep)
    try:
        if take_over:
            world.takers.add(process.name)
        lease = lease_class.acquire(storage, Claim(DIGEST, "run", "/runs/run", take_over), timing)
        ledger = CommitLog.read(storage, plan)
        runner = SimulatedRunner(world, storage, plan)
        with Progress(len(plan.nodes), stream=io.StringIO(), quiet=True) as progress:
            settings = DriverSettings("simulated://store", NodeRetries(MOST_ATTEMPTS), store_deadline_s=60.0)
            found = Driver(
                plan, ledger, runner, progress, settings, stop_requested=lambda: lease.superseded, report=lease.report
            )
            outcome = found.run()
        runner.close()
        most = max(found._attempts._count.values(), default=0)
        if most > MOST_ATTEMPTS:
            world.violation(f"{most} attempts at a node")
        world.events.append(f"{world.now:.1f} {process.name}: {outcome.status} {outcome.failures}")
        if outcome.status == "done":
            finished.append(process.name)
        lease.release(outcome.status)
    except (RunTaken, StoreError) as error:
        world.events.append(f"{world.now:.1f} {process.name}: {type(error).__name__}: {error}")
    finally:
        over.set()
        process.dead = True


def play(first: int, count: int, seconds: float = 0.0) -> tuple[int, Counter[str]]:
    """Play so many seeds, or as many as fit into `seconds`; returns how many, and how often each fault happened."""
    faults: Counter[str] = Counter()
    end = time.monotonic() + seconds if seconds else None
    for number, seed in enumerate(range(first, first + count)):
        if end is not None and time.monotonic() > end:
            return number, faults
        faults += simulate(seed).faults
    return count, faults


def _program() -> int:
    parser = argparse.ArgumentParser(description="Simulate drivers, workers, leases and a store, from seeds.")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=0.0)
    given = parser.parse_args()
    count, faults = play(given.first, given.seeds, given.seconds)
    print(f"{count} seeds from {given.first}, {faults.total()} faults:")
    for name, number in faults.most_common():
        print(f"  {number:8d}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(_program())
