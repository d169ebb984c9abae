"""Watch one run directory: each look gives a `RunView`, and reads only what has changed since the last one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cache_store.errors import StoreError, UserError, first_line
from cache_store.storage.open import existing_storage
from orchestrator.execution.beat import NOTHING_DONE, RunningTask
from orchestrator.execution.event_log import FILE as LOG_FILE
from orchestrator.execution.run_lease import Held, read_held
from orchestrator.execution.run_record import RunRecord, read_pointer
from orchestrator.progress import describe
from orchestrator.reports.words import STATE_WORDS, data_lines, of_kind
from orchestrator.runs.recorded import FILE as RECORD_FILE
from orchestrator.runs.recorded import Recorded, read_recorded
from orchestrator.status.observe import DONE, FAILED, RUNNING, STOPPED, WAITING, Observer, RunStatus, observe_recorded
from orchestrator.status.observe import store_of as run_store
from orchestrator.trackers.live import FILE as POINTS_FILE
from orchestrator.ui import graph
from orchestrator.ui.curves import CurveBook, colours_of
from orchestrator.ui.records import LogLine, RegimeView, RunView, StageMemory, StopOffer
from orchestrator.ui.tails import Tail
from orchestrator.units import score_text, seconds_text

#: Lines of the log that are shown.
LOG_LINES = 100
#: Characters of a message.
_MESSAGE = 600
#: Results in a run directory that the page leads to.
RESULTS = ("report.html", "summary.json", "sweep.json", "config.yaml", "plan.json", LOG_FILE, POINTS_FILE)


class WatchedRun:
    """One run directory. `path`: its name in the folder that is shown; `sweep`: the directory of its sweep, which has
    its driver and its log. Called from one thread at a time."""

    def __init__(self, run_dir: Path, path: str, sweep: Path | None = None) -> None:
        self.run_dir, self.path = run_dir, path
        self._driven = sweep or run_dir
        self._is_trial = sweep is not None
        self._observer: Observer | None = None
        self._recorded: tuple[tuple[int, int], Recorded | None] | None = None
        self._log, self._points = Tail(self._driven / LOG_FILE), Tail(run_dir / POINTS_FILE)
        self._lines: deque[LogLine] = deque(maxlen=LOG_LINES)
        self._own: set[str] = set()
        self._curves = CurveBook()
        self._begun = (0, 0)

    def look(self) -> RunView:
        """Look at the run as it is now. UserError where it has left no record yet; StoreError where its store, or what
        stands in its records, cannot be read."""
        try:
            return self._look()
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # A record of another shape: the other runs in the folder are shown all the same.
            kind = type(error).__name__
            raise StoreError(f"{self.path}: its records cannot be read: {kind}: {first_line(error)}") from error

    def _look(self) -> RunView:
        observer = self.observer()
        status = observer.look()
        held = read_held(observer.storage, observer.digest)
        self._read_files()
        moment = self._moment(observer, held, status)
        state = _trial_state(status, moment) if self._is_trial else status.state
        return RunView(
            path=self.path,
            run=status.run,
            state=state,
            state_words=STATE_WORDS.get(state, state),
            store=status.store,
            driver=status.driver or "",
            seen=_seen(held),
            counts=status.nodes,
            snapshot_bytes=status.snapshot_bytes,
            preparation=graph.preparation(moment),
            regimes=tuple(_regimes(moment, status)),
            beside=tuple((task.label, describe(task.progress)) for task in status.tasks),
            memory=tuple(_memory(moment, status)),
            curves=self._curves.curves(_colours(status)),
            log=tuple(self._lines),
            data=() if status.data is None else tuple(data_lines(status.data)),
            warnings=_warnings(status),
            failures=status.failures,
            files=tuple(name for name in RESULTS if (self.run_dir / name).is_file()),
            stop=self._stop_offer(held, alive=status.state == RUNNING),
        )

    def observer(self) -> Observer:
        """Return who looks at the run; another one once the directory is used for another plan."""
        digest = read_pointer(self._driven)
        if self._observer is None or (digest is not None and digest != self._observer.digest):
            self._observer = self._found(digest)
        return self._observer

    def _found(self, digest: str | None) -> Observer:
        if not self._is_trial:
            found = observe_recorded(self.run_dir, reads_only=True)
            if found is not None:
                return found
        recorded = self._record()
        if recorded is None or digest is None:
            raise UserError(f"{self.path}: it has left no record yet: it was never started, or by another version")
        record = RunRecord.of(recorded.run, recorded.plan)
        return Observer(existing_storage(run_store(self.run_dir)), record, digest, reads_only=True)

    def _record(self) -> Recorded | None:
        """Return the plan beside the configuration, read again when it has changed."""
        try:
            status = (self.run_dir / RECORD_FILE).stat()
        except OSError:
            return None
        mark = (status.st_mtime_ns, status.st_size)
        if self._recorded is None or self._recorded[0] != mark:
            self._recorded = (mark, read_recorded(self.run_dir, run_store(self.run_dir)))
        return self._recorded[1]

    def _read_files(self) -> None:
        log, points = self._log.read(), self._points.read()
        if self._begun[0] != self._log.begun:
            self._lines.clear()
            self._own.clear()
        if self._begun[1] != self._points.begun:
            self._curves.clear()
        self._begun = (self._log.begun, self._points.begun)
        for line in log:
            self._lines.append(_log_line(line))
            if line.get("event") == "committed":
                self._own.add(str(line.get("node")))
        self._curves.add(points)

    def _moment(self, observer: Observer, held: Held | None, status: RunStatus) -> graph.Moment:
        recorded = self._record()
        plan = None if recorded is None or self._other_plan(recorded, observer) else recorded.plan
        beat = held.beat if held is not None else NOTHING_DONE
        return graph.Moment(
            record=observer.record,
            plan=plan,
            figures=observer.figures,
            running=_without_done(beat.running, observer) if status.state == RUNNING else {},
            failed={node: reason for node, reason in beat.failed.items() if observer.figures(node) is None},
            own=frozenset(self._own) if self._log.begun else None,
            sets=frozenset(observer.storage.list("sets")),
        )

    def _other_plan(self, recorded: Recorded, observer: Observer) -> bool:
        """Tell whether the plan beside the configuration is not the one that is observed: it is written a moment apart
        from the driver's pointer."""
        return not all(node in recorded.plan for node in observer.record.nodes)

    def _stop_offer(self, held: Held | None, *, alive: bool) -> StopOffer:
        if held is None or not alive:
            return StopOffer(False, None, "No driver is at work on this run.")
        if self._is_trial:
            return StopOffer(False, None, "The driver works for the whole sweep: stop it on the sweep's page.")
        if held.identity.is_alive() is None:
            pid, host = held.identity.pid, held.identity.host
            return StopOffer(False, held.number, f"To stop it: `kill {pid}` on {host}, where it runs.")
        return StopOffer(True, held.number, held.words())


def _without_done(running: Mapping[str, RunningTask], observer: Observer) -> dict[str, RunningTask]:
    return {node: task for node, task in running.items() if observer.figures(node) is None}


def _seen(held: Held | None) -> float | None:
    return held.seen or None if held is not None else None


def _trial_state(status: RunStatus, moment: graph.Moment) -> str:
    """Return the state of a trial, whose driver works for all trials of its sweep."""
    nodes = moment.record.nodes.keys()
    if all(moment.figures(node) is not None for node in moment.record.targets):
        return DONE
    if nodes & moment.failed.keys():
        return FAILED
    if nodes & moment.running.keys():
        return RUNNING
    begun = any(stage.state != WAITING for regime in status.regimes.values() for stage in regime.stages)
    # One that is begun goes on when it is its turn.
    return WAITING if not begun else RUNNING if status.state == RUNNING else STOPPED


def _warnings(status: RunStatus) -> tuple[str, ...]:
    found = [] if status.data is None else [f"data: {warning}" for warning in status.data.warnings]
    return (*([f"store away: {status.away}"] if status.away else []), *found)


def _colours(status: RunStatus) -> dict[str, int]:
    return colours_of({name: regime.kind for name, regime in status.regimes.items()})


def _regimes(moment: graph.Moment, status: RunStatus) -> Iterator[RegimeView]:
    colours = _colours(status)
    for name, regime in status.regimes.items():
        kind = of_kind(regime.kind)
        yield RegimeView(
            name=name,
            colour=colours[name],
            words=f"{kind.title}: {kind.words}",
            state=regime.state,
            validation=score_text(regime.validation, named=True),
            test=score_text(regime.test, named=True),
            parts=graph.regime_parts(moment, name, regime),
        )


def _memory(moment: graph.Moment, status: RunStatus) -> Iterator[StageMemory]:
    for name, regime in status.regimes.items():
        for node_id, stage in zip(moment.record.regimes[name].stages, regime.stages, strict=True):
            yield _stage_memory(moment, node_id, name, stage.name)


def _stage_memory(moment: graph.Moment, node_id: str, regime: str, stage: str) -> StageMemory:
    planned = moment.plan.node(node_id).estimate if moment.plan is not None and node_id in moment.plan else None
    figures, task = moment.figures(node_id), moment.running.get(node_id)
    told = None if task is None else task.progress
    counts = {} if figures is None else figures.snapshot
    return StageMemory(
        regime=regime,
        stage=stage,
        state=moment.state(node_id),
        predicted_bytes=None if planned is None else planned.peak_bytes,
        device_bytes=figures.peak_device_bytes if figures else told.device_bytes if told else None,
        host_bytes=figures.peak_host_bytes if figures else None,
        hits=counts.get("hits") if figures else told.hits if told else None,
        misses=counts.get("misses") if figures else told.misses if told else None,
        bytes_read=counts.get("bytes_read") if figures else told.bytes_read if told else None,
        bytes_written=counts.get("bytes_written") if figures else told.bytes_written if told else None,
        trainable=(figures.trainable_parameters if figures else None) or (planned.trainable if planned else None),
    )


def _seconds(value: object) -> str:
    return seconds_text(value) if isinstance(value, int | float) else str(value)


#: Field of a line of the log -> what the page calls it, and how it is written.
_LOG_FIELDS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "attempt": ("attempt", str),
    "machine": ("on", str),
    "seconds": ("in", _seconds),
    "after_s": ("again after", _seconds),
}


def _log_line(line: Mapping[str, Any]) -> LogLine:
    """Put a line of the log into words: what happened, with the figures that belong to it."""
    text = str(line.get("error") or line.get("warning") or line.get("message") or "")
    event, stage = str(line.get("event") or ""), str(line.get("stage") or "")
    if stage and event != "message":
        more = [f"{name} {write(line[key])}" for key, (name, write) in _LOG_FIELDS.items() if key in line]
        words = "" if text == f"{stage}: {event}" else f": {text}"
        text = f"{event}{words}" + (f" ({', '.join(more)})" if more else "")
    return LogLine(str(line.get("time") or ""), str(line.get("level") or "info"), stage, text[:_MESSAGE])


#: What goes wrong while one looks at a run, without being this program's fault.
LOOKING = (UserError, StoreError)
