"""Let one driver at a time work on a run. Others see what it does, and take the run over when it is gone.

Commits alone keep a run correct; two drivers would only do the same work twice. So this is about time, and about
telling people. For every plan there is a folder in the store:

    runs/<digest>/holder-<n>.json   created exclusively: who took the run, as the n-th
    runs/<digest>/beat-<n>.json     rewritten by that driver every few seconds: alive, and what it is doing

The greatest n holds the run. Whoever wants it creates n + 1, when n has ended, is dead, or has been silent for
`STALE_S` by the store's clock; a driver that sees a greater number than its own stops. Creating is the only step that
decides anything, so no clock is compared with another machine's, and no step in the middle leaves anything to repair.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cache_store.errors import CorruptRecord, RunTaken, StoreError
from cache_store.records.record_io import dump_record, new_attempt_id, parse_record, read_bounded
from cache_store.storage.base import Storage
from orchestrator.execution.beat import NOTHING_DONE, Beat
from orchestrator.units import seconds_text

FOLDER = "runs"
#: Seconds between two signs of life.
BEAT_S = 5.0
#: A driver on another machine that has been silent for so long is gone.
STALE_S = 45.0
#: Between two looks at a driver of which it is not known whether it is alive.
LOOK_S = 1.0

_HOLDER = re.compile(r"holder-(\d{6})\.json")
_RECORD = re.compile(r"(?:holder|beat)-(\d{6})\.json")
_log = logging.getLogger("segprop.lease")


@dataclass(frozen=True)
class Identity:
    """A process, so that another one on the same machine can tell whether it is still there."""

    host: str
    pid: int
    #: When the machine was started and which processes it sees: pids compare only where both are equal.
    boot: str
    namespace: str
    #: Clock ticks after the machine's start at which the process began: pids come round again.
    born: int | None

    @classmethod
    def own(cls) -> Identity:
        return cls(socket.gethostname(), os.getpid(), _boot(), _namespace(), _born(os.getpid()))

    def is_alive(self) -> bool | None:
        """Tell whether the process lives. None: it cannot be told from here."""
        if not self.boot or (self.host, self.boot, self.namespace) != (socket.gethostname(), _boot(), _namespace()):
            return None
        if self.born is None:
            return None
        return _born(self.pid) == self.born


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _born(pid: int) -> int | None:
    """Return when the process began. None when there is no such process, or a dead one that nobody waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


@dataclass(frozen=True)
class Held:
    """A driver as its records tell."""

    number: int
    run: str
    run_dir: str
    identity: Identity
    #: When it took the run, by its own clock (unix seconds).
    since: float
    #: running, done, failed or stopped.
    state: str = "running"
    #: What it was doing by its latest sign of life.
    beat: Beat = NOTHING_DONE
    #: When the newest of its records was written, by the store's clock.
    seen: float = 0.0

    @property
    def ended(self) -> bool:
        return self.state != "running"

    def words(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"driver {self.identity.pid} on {self.identity.host} (since {since})"


def read_held(storage: Storage, digest: str) -> Held | None:
    """Read the latest driver of a plan; None when there was none."""
    numbers = _numbers(storage, digest)
    for number in sorted(numbers, reverse=True):
        held = _read(storage, digest, number)
        if held is not None:
            return held
    return None


def _numbers(storage: Storage, digest: str) -> list[int]:
    found = (_HOLDER.fullmatch(name) for name in storage.list(f"{FOLDER}/{digest}"))
    return [int(match.group(1)) for match in found if match]


def _paths(digest: str, number: int) -> tuple[str, str]:
    return f"{FOLDER}/{digest}/holder-{number:06d}.json", f"{FOLDER}/{digest}/beat-{number:06d}.json"


def _read(storage: Storage, digest: str, number: int) -> Held | None:
    """Read one driver's records. None when they are gone or damaged: a run must not be blocked by them."""
    holder, beat = _paths(digest, number)
    record, told = _record(storage, holder), _record(storage, beat)
    try:
        identity = Identity(**record["identity"])
        seen = [info.modified for info in storage.files(f"{FOLDER}/{digest}") if info.path in (holder, beat)]
        return Held(
            number,
            str(record["run"]),
            str(record["run_dir"]),
            identity,
            float(record["since"]),
            str(told.get("state", "running")),
            _beat_of(told),
            max(seen, default=0.0),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _beat_of(told: Mapping[str, Any]) -> Beat:
    """Read what a driver does; nothing where its record has another shape."""
    try:
        return Beat.from_json(told)
    except (AttributeError, TypeError, ValueError):
        return NOTHING_DONE


def _record(storage: Storage, path: str) -> dict[str, Any]:
    data = read_bounded(storage, path)
    if data is None:
        return {}
    try:
        return parse_record(data, path)
    except CorruptRecord:
        return {}


@dataclass(frozen=True)
class Claim:
    """What a driver wants to work on."""

    #: Of the plan.
    digest: str
    run: str
    run_dir: str
    #: Take it also from a driver that is alive, which then stops.
    take_over: bool = False
    #: The plan that its run directory was last used for.
    before: str | None = None


@dataclass(frozen=True)
class LeaseTiming:
    """Seconds after which a silent driver counts as gone, and between two signs of life; how to wait."""

    stale_s: float = STALE_S
    beat_s: float = BEAT_S
    sleep: Callable[[float], None] = time.sleep


TIMING = LeaseTiming()


def _nothing(message: str) -> None:
    pass


class RunLease:
    """A run held by this process. `release` ends it; a process that dies is found out by the next one."""

    #: How the run ended, for whoever releases.
    outcome = "failed"

    def __init__(self, storage: Storage, digest: str, number: int, *, beat_s: float = BEAT_S) -> None:
        self._storage = storage
        self._digest = digest
        self._number = number
        self._beat_s = beat_s
        self._latest = NOTHING_DONE
        self._done = threading.Event()
        self._lost = threading.Event()
        self._silent = False
        self._thread = threading.Thread(target=self._keep, name="segprop-lease", daemon=True)

    @classmethod
    def acquire(
        cls,
        storage: Storage,
        claim: Claim,
        timing: LeaseTiming = TIMING,
        say: Callable[[str], None] = _nothing,
    ) -> RunLease:
        """Take the run. `say` is told when this has to wait.

        Raises RunTaken when another driver is at work on it, or on the same run directory with other settings. A
        driver of which this machine cannot tell whether it lives is listened to for at most `timing.stale_s`.
        """
        digest = claim.digest
        if not claim.take_over:
            check_neighbour(storage, claim, timing.stale_s)
        elif _neighbour(storage, claim, timing.stale_s) is not None:
            # It finds out as one whose own plan is taken over does.
            cls.acquire(storage, replace(claim, digest=str(claim.before), before=None), timing).release("stopped")
        identity = Identity.own()
        while True:
            # Listed before anybody is looked at: whoever comes after that has this number, and creating it fails here.
            number = max(_numbers(storage, digest), default=0) + 1
            held = read_held(storage, digest)
            if held is not None and not claim.take_over and not held.ended:
                _wait_gone(storage, digest, held, timing, say)
            holder, _ = _paths(digest, number)
            # The token makes every record another one, so that a creation without an answer can be recognized.
            record = {
                "run": claim.run,
                "run_dir": claim.run_dir,
                "since": time.time(),
                "identity": vars(identity),
                "token": new_attempt_id(),
            }
            if not _create(storage, holder, record):
                continue  # somebody was first: look who
            if max(_numbers(storage, digest), default=number) > number:
                # Ours was one that a later driver had swept away already.
                storage.delete(holder)
                continue
            lease = cls(storage, digest, number, beat_s=timing.beat_s)
            lease._start()
            return lease

    def _start(self) -> None:
        self._beat("running")
        self._forget_older()
        self._thread.start()

    @property
    def superseded(self) -> bool:
        """Tell whether another driver has taken the run over: stop then."""
        return self._lost.is_set()

    def report(self, beat: Beat) -> None:
        """Note what the driver is doing; it goes out with the next sign of life."""
        self._latest = beat

    def release(self, state: str) -> None:
        """End the lease with `done`, `failed` or `stopped`. What was reported last stays readable."""
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=60)
        if not self.superseded:
            self._beat(state)

    def _keep(self) -> None:
        while not self._done.wait(self._beat_s):
            try:
                if max(_numbers(self._storage, self._digest), default=0) > self._number:
                    self._lost.set()
                    return
            except StoreError:
                pass  # the beat finds the same and says so
            self._beat("running")

    def _beat(self, state: str) -> None:
        """Leave a sign of life. A store that does not take it stops nobody: those who commit find out."""
        _, beat = _paths(self._digest, self._number)
        try:
            self._storage.write(beat, dump_record({"state": state, **self._latest.to_json()}, "a beat"))
            self._silent = False
        except StoreError as error:
            if not self._silent:
                _log.warning("no sign of life can be left in the store: %s", error.message)
            self._silent = True

    def _forget_older(self) -> None:
        with contextlib.suppress(StoreError):
            for name in self._storage.list(f"{FOLDER}/{self._digest}"):
                match = _RECORD.fullmatch(name)
                if match and int(match.group(1)) < self._number:
                    self._storage.delete(f"{FOLDER}/{self._digest}/{name}")


def _create(storage: Storage, path: str, record: Mapping[str, Any]) -> bool:
    """Create a record as `Storage.create` does; find out by reading where the answer was lost."""
    data = dump_record(record, "a lease")
    failure: StoreError | None = None
    try:
        if storage.create(path, data):
            return True
    except StoreError as error:
        failure = error
    found = read_bounded(storage, path)
    if failure is not None and found is None:
        raise failure
    return found == data


def _wait_gone(
    storage: Storage,
    digest: str,
    held: Held,
    timing: LeaseTiming,
    say: Callable[[str], None],
) -> None:
    """Wait until the driver is gone; raise RunTaken when it lives."""
    alive = held.identity.is_alive()
    if alive is False:
        _log.info("%s is dead; taking over", held.words())
        return
    if alive:
        raise RunTaken(_taken(held, "It is running."))
    first = held
    say(f"{held.words()} holds this run; listening whether it is alive, for at most {seconds_text(timing.stale_s)}")
    while True:
        silent = storage.now() - held.seen
        if silent >= timing.stale_s:
            _log.info("%s has been silent for %.0f s; taking over", held.words(), silent)
            return
        timing.sleep(LOOK_S)
        latest = read_held(storage, digest)
        if latest is None or latest.ended or latest.number != first.number:
            return
        if latest.seen > first.seen:
            raise RunTaken(_taken(latest, "It has just given a sign of life."))
        held = latest


def _neighbour(storage: Storage, claim: Claim, stale_s: float) -> Held | None:
    """Return the living driver of another plan on the same run directory; None where there is none."""
    if claim.before is None or claim.before == claim.digest:
        return None
    held = read_held(storage, claim.before)
    if held is None or held.ended:
        return None
    alive = held.identity.is_alive()
    if alive is None:
        alive = storage.now() - held.seen < stale_s
    return held if alive else None


def _taken(held: Held, why: str) -> str:
    return (
        f"{held.run}: {held.words()} works on this run. {why} `segprop status` shows what it does. "
        "To go on here instead: stop it and run the same command again, or add --take-over, and it stops by itself. "
        "Nothing was started"
    )


def check_neighbour(storage: Storage, claim: Claim, stale_s: float = STALE_S) -> None:
    """Refuse a run directory on which a driver works with other settings, such as more regimes: another plan."""
    held = _neighbour(storage, claim, stale_s)
    if held is not None:
        raise RunTaken(
            f"{held.run}: {held.words()} works on this run directory with other settings. Let it end, or stop it, and "
            "run the same command again, or add --take-over, and it stops by itself. Nothing was started"
        )
