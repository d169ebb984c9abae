"""Define the types of `sweep.json`: what a sweep came to, its trials, and what they shared.

As in `orchestrator.reports.records`, `to_json` and `from_json` of `record_json` are the one way between these and the
file, field names are the file's keys in its order, and None stands for what was not measured. Figures of a trial are
those of its metric's regime: `seconds` is compute time, whoever ran it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from orchestrator.environment import Environment
from orchestrator.reports.record_json import OPTIONAL
from orchestrator.reports.records import FINISHED, Benchmarks, Metrics
from orchestrator.sweeps.metric import Metric, MetricMode
from orchestrator.sweeps.plan import Shared

TrialStatus = Literal["waiting", "running", "done", "stopped", "failed"]

FORMAT = 1
NO_SHARING = Shared()


@dataclass(frozen=True)
class MetricRecord:
    """What trials are compared by. `key` is the name of the whole."""

    key: str
    regime: str
    split: str | None
    name: str
    mode: MetricMode


@dataclass(frozen=True)
class DrawRecord:
    """The values of one parameter: exactly one of these is set."""

    grid: tuple[Any, ...] | None = field(default=None, metadata=OPTIONAL)
    choice: tuple[Any, ...] | None = field(default=None, metadata=OPTIONAL)
    uniform: tuple[float, ...] | None = field(default=None, metadata=OPTIONAL)
    loguniform: tuple[float, ...] | None = field(default=None, metadata=OPTIONAL)
    randint: tuple[int, ...] | None = field(default=None, metadata=OPTIONAL)

    @property
    def kind(self) -> str:
        return next(each.name for each in fields(self) if getattr(self, each.name) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        found: tuple[Any, ...] = getattr(self, self.kind)
        return found


@dataclass(frozen=True)
class SchedulerRecord:
    """The sweep's scheduler, as `SchedulerConfig` documents it."""

    name: str
    grace: int
    reduction: float
    interval: int
    quantile: float
    resample: float


@dataclass(frozen=True)
class Rung:
    """How a trial stood after so many stages."""

    stages: int
    metric: float | None


@dataclass(frozen=True)
class TrialRegime:
    """What tables and figures show of one regime of a trial."""

    status: str
    kind: str
    seconds: float
    peak_device_bytes: int | None
    peak_host_bytes: int | None
    host_growth_bytes: int | None
    trainable_parameters: int | None
    export: str | None
    test: Metrics
    validation: Metrics
    #: On benchmarks; None: not asked.
    judged: Benchmarks | None = field(default=None, metadata=OPTIONAL)

    @property
    def done(self) -> bool:
        return self.status in FINISHED

    def metrics(self, split: str | None) -> Metrics:
        """Return the metrics on `test` or `validation`; {} for None."""
        return {} if split is None else self.test if split == "test" else self.validation


@dataclass(frozen=True)
class StageCounts:
    """Stages of a trial. `shared`: other trials asked for them too."""

    planned: int
    asked: int
    done: int
    shared: int


@dataclass(frozen=True)
class TaskCounts:
    asked: int
    shared: int


@dataclass(frozen=True)
class TrialSummary:
    """One trial. `parameters`: swept key -> its value; `history`: settings of the stages that were taken over, and of
    those since (pbt); `pareto`: no other trial beats it in quality, memory and time at once."""

    name: str
    folder: str
    parameters: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]
    status: TrialStatus
    metric: float | None
    rungs: tuple[Rung, ...]
    best: bool
    pareto: bool
    regimes: Mapping[str, TrialRegime]
    seconds: float
    peak_device_bytes: int | None
    host_growth_bytes: int | None
    stages: StageCounts
    nodes: TaskCounts
    message: str

    @property
    def final(self) -> float | None:
        """The metric of a trial that is through; None of others."""
        return self.metric if self.status == "done" else None

    @property
    def standing(self) -> float | None:
        """The final metric, or that of the last stage of a trial that was stopped."""
        if self.status == "stopped" and self.rungs:
            return self.rungs[-1].metric
        return self.final


@dataclass(frozen=True)
class Abandoned:
    """Work for trials that took over another's stages instead (pbt)."""

    tasks: int
    seconds: float


@dataclass(frozen=True)
class Sharing:
    """What trials asked for and what was run, by kind of node. `before`: tasks that an earlier invocation, or another
    run on this store, had done; `abandoned` work is in no other figure."""

    kinds: Mapping[str, Shared]
    total: Shared
    before: int
    abandoned: Abandoned

    @property
    def stages(self) -> Shared | None:
        return self.kinds.get("train")


@dataclass(frozen=True)
class TrialFailure:
    trial: str
    message: str


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """What a sweep came to. `short`: swept key -> what to call it; `original`: as in a run's summary."""

    format: int = FORMAT
    run: str
    status: str
    environment: Environment
    metric: MetricRecord
    parameters: Mapping[str, DrawRecord]
    short: Mapping[str, str]
    scheduler: SchedulerRecord
    samples: int
    seed: int
    trials: tuple[TrialSummary, ...]
    best: str | None
    original: Mapping[str, Metrics]
    sharing: Sharing
    wall_seconds: float | None
    failures: tuple[TrialFailure, ...]
    #: The model as it came on benchmarks; None: not asked.
    judged: Benchmarks | None = field(default=None, metadata=OPTIONAL)

    @property
    def compared_by(self) -> Metric:
        """The metric that trials are compared by."""
        return Metric(self.metric.regime, self.metric.split, self.metric.name, self.metric.mode)

    @property
    def through(self) -> list[tuple[TrialSummary, float]]:
        """The trials that have a final metric, each with it."""
        return [(trial, trial.final) for trial in self.trials if trial.final is not None]

    @property
    def best_trial(self) -> TrialSummary | None:
        return next((trial for trial in self.trials if trial.best), None)

    @property
    def on_device(self) -> bool:
        """Whether memory is the device's; growth of the process where there was none."""
        return any_on_device(self.trials)

    def peak(self, item: TrialSummary | TrialRegime) -> int | None:
        """Return the bytes that stand for the memory of a trial or regime."""
        return item.peak_device_bytes if self.on_device else item.host_growth_bytes


def any_on_device(trials: Iterable[TrialSummary]) -> bool:
    return any(trial.peak_device_bytes for trial in trials)
