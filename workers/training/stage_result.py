"""Commit a stage: its parts' files, and the result that says how it went and what it took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from cache_store.records.nodes import Attempt, Commit
from workers.device import capability_of
from workers.environment import WorkerEnvironment
from workers.models.chain import write_part
from workers.snapshots.production import commit_made_along
from workers.specs.experiment import MOST_SWALLOWED
from workers.specs.orders import Production
from workers.specs.results import EpochFigures, MeasuredMemory, PartRecord, Rank, SnapshotCounters, StageResult, Where
from workers.specs.tasks import StageTask
from workers.training.checkpoint import StageState
from workers.training.optimizer import StageStep
from workers.training.stage_inputs import StageInputs
from workers.training.stage_path import StagePath
from workers.training.timing.stage_times import StageTimes
from workers.weights import ADAPTER, AUX

#: Behind a part's name, in that of the file with its low-rank adapters.
ADAPTER_FILE = ".lora"


@dataclass(frozen=True)
class Finished:
    """Hold a stage after its last step, with what its commit is made of. `first_step`: when its first step began (unix
    seconds); `host_baseline`: bytes of the process before the stage."""

    task: StageTask
    environment: WorkerEnvironment
    attempt: Attempt
    production: Production
    inputs: StageInputs
    path: StagePath
    step: StageStep
    state: StageState
    first_step: float
    host_baseline: int
    times: StageTimes
    #: Of how the stage was trained.
    warnings: tuple[str, ...] = ()

    def commit(self) -> Commit | None:
        """Write and publish what the stage came to, then drop its checkpoints. Every rank of a gang must take part,
        and gets the commit that counts."""
        gang, train = self.environment.gang, self.task.train
        self.times.at("publishing")
        if train.commit == "best":
            self.path.load(self.state.best)
        parts: dict[str, PartRecord] = {}
        adapters: dict[str, PartRecord] = {}
        for part in self.task.trained:
            tensors, adapter = self.path.final(part), self.path.adapters(part)
            if gang.leads:
                parts[part] = write_part(self.attempt, part, tensors)
                if adapter:
                    adapters[part] = write_part(self.attempt, f"{part}{ADAPTER_FILE}", adapter)
        if train.head_optimizer == "carry":
            self.state.write_optimizer()
        result = self._result(parts, None if train.lora is None else adapters)
        if not gang.leads:
            return gang.agree(None)
        if self.task.goes_on:  # never in a gang
            self.state.write_continue()
            result = replace(result, scaler=self.step.scaler_state())
        waited_s = self.inputs.waited_s()
        partial = commit_made_along(
            self.environment.nodes, self.production, self.inputs.by_role, self.environment.where()
        )
        if waited_s is not None:
            result = replace(result, partial=partial, waited_s=waited_s)
        result = replace(result, times=self.times.spent())
        commit = self.attempt.commit(result.to_json())
        self.environment.nodes.drop_checkpoints(self.attempt.node_id)
        return gang.agree(commit)

    def _result(self, parts: dict[str, PartRecord], adapters: dict[str, PartRecord] | None) -> StageResult:
        """Sum up the stage. Every rank of a gang must take part."""
        progress, task, precision = self.state.progress, self.task, self.task.train.precision
        own = [epoch for epoch in progress.history if epoch.epoch in task.epochs]
        steps = progress.global_step - task.epochs.start * self.inputs.per_epoch
        forwards = self.inputs.forwards(steps, len(own))
        where = self._where()
        memory = self._memory(own[1:] or own)
        counters = self.environment.gang.gather(self.inputs.counters())
        swallowed = self.step.swallowed()
        return StageResult(
            stage=task.name,
            parts=parts,
            epochs=tuple(progress.history),
            best_epoch=progress.best_epoch,
            committed_epoch=progress.best_epoch if task.train.commit == "best" else progress.epoch - 1,
            exit=progress.exit or "",
            steps=progress.global_step,
            path_is_auxiliary=ADAPTER in task.path or AUX in task.path,
            memory=memory,
            snapshot=sum(counters, SnapshotCounters()),
            forwards=forwards,
            # Of this attempt, like the counters of snapshots.
            input_seconds=self.inputs.seconds(),
            seconds=sum(epoch.seconds + epoch.validation_seconds for epoch in own),
            resumed=progress.resumed,
            train_spec=asdict(task.train),
            swallowed=swallowed,
            warnings=(*self.warnings, *rounding_warnings(swallowed, task.train.optimizer.rounding)) or None,
            emulated=None if capability_of(self.environment.device).computes(precision) else precision,
            where=where,
            adapters=adapters,
        )

    def _where(self) -> Where:
        gang, where = self.environment.gang, self.environment.where()
        if gang.size > 1:
            rank = Rank(host=where.host, pid=where.pid, device=where.device)
            where = replace(where, strategy=gang.strategy, ranks=tuple(gang.gather(rank)))
        return replace(where, first_step=self.first_step)

    def _memory(self, steady: Sequence[EpochFigures]) -> MeasuredMemory:
        return MeasuredMemory(
            trainable_parameters=self.path.trained_numbers,
            trained_at_once=self.step.trained_at_once(self.state.progress.global_step),
            resident_bytes=self.path.resident_bytes() + self.inputs.prefix_bytes(),
            peak_device_bytes=_largest(epoch.peak_device_bytes for epoch in steady),
            peak_device_reserved_bytes=_largest(epoch.peak_device_reserved_bytes for epoch in steady),
            peak_host_bytes=_largest(epoch.peak_host_bytes for epoch in steady),
            host_baseline_bytes=self.host_baseline,
        )


def rounding_warnings(swallowed: float | None, rounding: str) -> tuple[str, ...]:
    """Say so where rounding took more than `MOST_SWALLOWED` of a stage's updates."""
    if swallowed is None or swallowed <= MOST_SWALLOWED:
        return ()
    return (
        f"rounding to bfloat16 took {swallowed:.0%} of the updates (training.optimizer.rounding: {rounding}); "
        "stochastic or compensated lose none",
    )


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
