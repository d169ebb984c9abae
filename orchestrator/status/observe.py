"""Tell how far a run is, from its store alone: `segprop status`. No Ray, no model, no data set; a driver may be at
work, may have ended, or may have been killed.

Commits say what is done, with metrics. What runs right now is in the driver's latest beat (`lease`), and the newest
mid-stage checkpoint has the epochs of a stage that runs or was interrupted.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cache_store.errors import StorageDenied, StorageUnavailable, UserError
from cache_store.records.nodes import NodeStore
from cache_store.storage.base import Storage
from cache_store.storage.open import existing_storage
from orchestrator.execution.beat import NOTHING_DONE, RunningTask
from orchestrator.execution.run_lease import STALE_S, Held, read_held
from orchestrator.execution.run_record import NodeRecord, RegimeRecord, RunRecord, read_pointer, read_run
from orchestrator.execution.store_watch import look_at
from orchestrator.plan.identity import name_of
from orchestrator.reports.commit_view import CommitFigures, data_summary
from orchestrator.reports.records import DataSummary, EpochSummary, Metrics
from orchestrator.status.records import StageProgress
from workers.control import Update
from workers.specs.data_results import DataFigures

DONE, RUNNING, WAITING, FAILED, STOPPED = "done", "running", "waiting", "failed", "stopped"


@dataclass(frozen=True)
class StageStatus:
    """`state`: done, running, failed, waiting, or stopped: begun, and interrupted with a checkpoint."""

    name: str
    state: str
    epochs: int
    epochs_planned: int | None
    #: Validation metrics of the committed epoch, or of the latest one so far.
    metrics: Mapping[str, float]
    #: Of the whole chain after this stage, where that is scored.
    assembled: Mapping[str, float]
    #: Training loss so far in the running epoch, or of the latest one.
    loss: float | None
    rate: float | None = None
    seconds: float | None = None
    seconds_left: float | None = None
    attempts: int = 0
    machine: str | None = None
    reason: str | None = None
    #: Share of the steps' time in which they waited for their input, 0..1.
    waiting: float | None = None


@dataclass(frozen=True)
class RegimeStatus:
    kind: str
    state: str
    stages: tuple[StageStatus, ...]
    #: Of the final model: validation and test.
    validation: Mapping[str, float]
    test: Mapping[str, float]


@dataclass(frozen=True)
class TaskStatus:
    """A running task that is no stage: a roll-forward, an evaluation, the data."""

    label: str
    kind: str
    machine: str | None
    attempt: int
    progress: Update


@dataclass(frozen=True)
class RunStatus:
    """`state`: running, done, failed, stopped (in order), killed (its driver is gone), waiting (never started)."""

    run: str
    state: str
    store: str
    driver: str | None
    #: Seconds since the driver's last sign of life, or without one since the newest commit, by the store's clock.
    last_activity_s: float | None
    nodes: Mapping[str, int]
    #: In the store now: of finished sets, and about, of those being made.
    snapshot_bytes: int
    regimes: Mapping[str, RegimeStatus]
    tasks: tuple[TaskStatus, ...]
    failures: Mapping[str, str]
    #: Why the store cannot be reached now; everything else is as it was then.
    away: str | None = None
    #: None before the data are prepared.
    data: DataSummary | None = None

    @property
    def ended(self) -> bool:
        return self.state in (DONE, FAILED, STOPPED, "killed")


@dataclass
class Observer:
    """Looks at one run again and again; commits are read once."""

    storage: Storage
    record: RunRecord
    digest: str
    stale_s: float = STALE_S
    #: Leave nothing in the store, not even for a moment: its clock is then taken for this machine's.
    reads_only: bool = False
    _figures: dict[str, CommitFigures] = field(default_factory=dict)
    _data: DataSummary | None = None
    #: The storage's clock less this machine's.
    _offset: float | None = None
    _latest: RunStatus | None = None

    def figures(self, node_id: str) -> CommitFigures | None:
        """Return what a node had committed at the last look; None before it has."""
        return self._figures.get(node_id)

    def look(self) -> RunStatus:
        """Look at the run as it is now; as it was at the last look, with the reason, while the store cannot be reached.
        StoreError when the store cannot be read otherwise, or was never reached."""
        away = look_at(self.storage)
        if away is None:
            self._latest = self._look()
            return self._latest
        away = f"{away}; a driver at work waits for it (resources.store_deadline_s)"
        if self._latest is None:
            raise StorageUnavailable(away, path=self.storage.uri)
        return dataclasses.replace(self._latest, away=away)

    def _look(self) -> RunStatus:
        held = read_held(self.storage, self.digest)
        present = set(self.storage.list("nodes"))
        nodes = NodeStore(self.storage)
        for node_id in self.record.nodes:
            if node_id in present and node_id not in self._figures:
                commit = nodes.commit_of(node_id)
                if commit is not None:
                    self._figures[node_id] = CommitFigures.of(commit)
                    if self.record.nodes[node_id].prepares:
                        self._data = data_summary(commit.read(DataFigures))
        return self._status(held, self._is_alive(held), present)

    def _now(self) -> float:
        if self._offset is None and self.reads_only:
            self._offset = 0.0
        if self._offset is None:
            try:
                self._offset = self.storage.now() - time.time()
            except StorageDenied:
                self._offset = 0.0  # a store that may only be read: this machine's clock has to do
        return time.time() + self._offset

    def _is_alive(self, held: Held | None) -> bool:
        if held is None or held.ended:
            return False
        alive = held.identity.is_alive()
        return alive if alive is not None else self._now() - held.seen < self.stale_s

    def _status(self, held: Held | None, alive: bool, present: set[str]) -> RunStatus:
        beat = NOTHING_DONE if held is None else held.beat
        # Of a driver that is gone nothing is running.
        told = beat.running if alive else {}
        running = {node_id: task for node_id, task in told.items() if node_id not in self._figures}
        failed = {
            node_id: reason
            for node_id, reason in beat.failed.items()
            if node_id in self.record.nodes and node_id not in self._figures
        }
        view = _View(self, running, failed, beat.attempts, present)
        regimes = {name: view.regime(regime) for name, regime in self.record.regimes.items()}
        state = self._state(held, alive, regimes.values())
        counts = {
            "total": len(self.record.nodes),
            DONE: len(self._figures),
            RUNNING: len(running),
            FAILED: len(failed),
        }
        counts[WAITING] = counts["total"] - counts[DONE] - counts[RUNNING] - counts[FAILED]
        return RunStatus(
            run=self.record.run,
            state=state,
            store=self.storage.uri,
            driver=held.words() if held is not None else None,
            last_activity_s=self._age(held),
            nodes=counts,
            snapshot_bytes=self._snapshot_bytes(running),
            regimes=regimes,
            tasks=tuple(view.tasks()),
            failures={self.record.nodes[node_id].label: reason for node_id, reason in failed.items()},
            data=self._data,
        )

    def _state(self, held: Held | None, alive: bool, regimes: Iterable[RegimeStatus]) -> str:
        if alive:
            return RUNNING
        if all(target in self._figures for target in self.record.targets):
            return DONE
        if held is not None:
            return held.state if held.ended else "killed"
        return STOPPED if any(stage.state != WAITING for regime in regimes for stage in regime.stages) else WAITING

    def _age(self, held: Held | None) -> float | None:
        newest = held.seen if held is not None else 0.0
        if held is None:
            newest = max(
                (
                    info.modified
                    for node_id, node in self.record.nodes.items()
                    if node.trains and node_id in self._figures
                    for info in self.storage.files(f"nodes/{node_id}")
                ),
                default=0.0,
            )
        return max(0.0, self._now() - newest) if newest else None

    def _snapshot_bytes(self, running: Mapping[str, RunningTask]) -> int:
        sets = set(self.storage.list("sets"))
        total = 0
        for node_id, node in self.record.nodes.items():
            if not node.makes_set:
                continue
            figures = self._figures.get(node_id)
            if figures is not None:
                total += figures.bytes or 0 if figures.set in sets else 0
            elif node_id in running:
                progress = running[node_id].progress
                total += int(node.snapshot_bytes * (progress.done or 0) / max(1, progress.total or 1))
        return total


@dataclass
class _View:
    """One moment, to be told by stage."""

    observer: Observer
    running: Mapping[str, RunningTask]
    failed: Mapping[str, str]
    attempts: Mapping[str, int]
    present: set[str]

    def regime(self, regime: RegimeRecord) -> RegimeStatus:
        stages = tuple(self.stage(node_id, regime) for node_id in regime.stages)
        states = [stage.state for stage in stages]
        final = [self.metrics(regime.validation), self.metrics(regime.test)]
        if all(state == DONE for state in states):
            state = DONE
        else:
            state = next((state for state in (FAILED, RUNNING, STOPPED) if state in states), WAITING)
            # Between two stages: something of it is under way.
            state = RUNNING if state == WAITING and DONE in states and self.running else state
        return RegimeStatus(regime.kind, state, stages, *final)

    def stage(self, node_id: str, regime: RegimeRecord) -> StageStatus:
        node = self.observer.record.nodes[node_id]
        assembled = self.metrics(regime.assembled.get(node_id, ""))
        figures = self.observer._figures.get(node_id)
        if figures is not None:
            return self._done(node, node_id, figures, assembled)
        # What lies in the store of a stage nobody has touched needs no look.
        saved = self._saved(node_id) if node_id in self.present else None
        task = self.running.get(node_id)
        if task is not None:
            return _running(node, task, saved or StageProgress(), assembled)
        state = FAILED if node_id in self.failed else STOPPED if saved else WAITING
        made = (saved.resumed if saved else 0) + 1 if saved or state == FAILED else 0
        saved = saved or StageProgress()
        return StageStatus(
            name=name_of(node.label),
            state=state,
            epochs=len(saved.epochs),
            epochs_planned=node.epochs,
            metrics=_validation(saved.latest),
            assembled=assembled,
            loss=saved.latest.train_loss,
            attempts=self.attempts.get(node_id, made),
            reason=self.failed.get(node_id),
        )

    def _done(
        self, node: NodeRecord, node_id: str, figures: CommitFigures, assembled: Mapping[str, float]
    ) -> StageStatus:
        stage = StageProgress.of_commit(figures)
        last = len(stage.epochs) - 1
        chosen = stage.epochs[min(figures.committed_epoch or 0, last)] if stage.epochs else EpochSummary()
        rates = [
            rate for epoch in stage.epochs for key, rate in epoch.others.items() if key.endswith("_per_s") and rate
        ]
        return StageStatus(
            name=name_of(node.label),
            state=DONE,
            epochs=len(stage.epochs),
            epochs_planned=node.epochs,
            metrics=_validation(chosen),
            assembled=assembled,
            loss=chosen.train_loss,
            rate=rates[-1] if rates else None,
            seconds=figures.seconds,
            attempts=max(self.attempts.get(node_id, 1), 1 + stage.resumed),
            machine=None if figures.where is None else figures.where.host,
            waiting=None if figures.times is None else figures.times.waiting,
        )

    def _saved(self, node_id: str) -> StageProgress | None:
        """Read how far the newest checkpoint of a stage is; None without one."""
        found = NodeStore(self.observer.storage).checkpoints(node_id)
        return StageProgress.of_checkpoint(found[0].data.get("progress")) if found else None

    def metrics(self, node_id: str) -> Mapping[str, float]:
        """Return the metrics of an evaluation; {} before it is committed."""
        figures = self.observer._figures.get(node_id)
        return {} if figures is None else _numbers(figures.metrics)

    def tasks(self) -> Iterable[TaskStatus]:
        for node_id, task in self.running.items():
            node = self.observer.record.nodes.get(node_id)
            if node is not None and not node.trains:
                yield TaskStatus(node.label, node.kind, task.machine, task.attempt, task.progress)


def _running(node: NodeRecord, task: RunningTask, saved: StageProgress, assembled: Mapping[str, float]) -> StageStatus:
    progress = task.progress
    return StageStatus(
        name=name_of(node.label),
        state=RUNNING,
        epochs=max(len(saved.epochs), (progress.epoch or 1) - 1),
        epochs_planned=node.epochs,
        metrics=_validation(saved.latest),
        assembled=assembled,
        loss=saved.latest.train_loss if progress.loss is None else progress.loss,
        rate=progress.rate,
        seconds=max(0.0, time.time() - task.since) if task.since else None,
        seconds_left=progress.seconds_left,
        attempts=task.attempt,
        machine=task.machine,
        waiting=progress.stalled,
    )


def _validation(epoch: EpochSummary) -> Mapping[str, float]:
    found = _numbers(epoch.validation or {})
    return found or _numbers({"loss": epoch.validation_loss, "accuracy": epoch.validation_accuracy})


def _numbers(values: Metrics) -> dict[str, float]:
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}


def observe(place: str) -> Observer:
    """Find the run at `place`: a run directory, or a configuration file. UserError when it is neither, or its store is
    not there yet."""
    path = Path(place)
    if path.is_file():
        return _planned(path)
    source = path / "config.yaml"
    if not source.is_file():
        none = "no run directory, it has no config.yaml, and no folder that holds any"
        what = none if path.is_dir() else "no such folder"
        raise UserError(f"{place}: {what}")
    return observe_recorded(path) or _planned(source, [f"run_dir={path}"])


def observe_recorded(run_dir: Path, *, reads_only: bool = False) -> Observer | None:
    """Find a run by the records it left; None where there are none. UserError where its store is gone."""
    digest = read_pointer(run_dir)
    if digest is None:
        return None
    storage = existing_storage(store_of(run_dir))
    record = read_run(storage, digest)
    return None if record is None else Observer(storage, record, digest, reads_only=reads_only)


def store_of(run_dir: Path) -> str:
    """Read the store from a run directory's configuration, checked when it was written; the folder may have moved."""
    from orchestrator.config.values import default_store
    from orchestrator.config.yaml_loader import load_document

    found = load_document(run_dir / "config.yaml").data.get("store")
    return found if isinstance(found, str) else default_store(str(run_dir))


def _planned(source: Path, overrides: Iterable[str] = ()) -> Observer:
    """Plan again, without a driver's record; this needs the data set."""
    from orchestrator.execution.plan_record import plan_digest
    from orchestrator.runs.prepare import prepare

    prepared = prepare(source, list(overrides))
    storage = existing_storage(prepared.config.store)
    record = RunRecord.of(prepared.config.run, prepared.plan)
    return Observer(storage, record, plan_digest(prepared.config.run, prepared.plan))
