"""Say for every stage of a plan whether it fits a device, and which settings would make it fit. Nothing is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.config.devices import Device
from orchestrator.config.schema import Config, merge
from orchestrator.costs.fit import CHOICES, Fit, Settings, nearest_fit
from orchestrator.plan.graph import Plan
from orchestrator.runs.prepare import Prepared
from orchestrator.units import human_bytes, human_seconds
from workers.specs.as_json import from_json
from workers.specs.experiment import TrainSpec
from workers.specs.task_kinds import TASKS
from workers.specs.tasks import StageTask

#: So many stages get settings of their own before the whole regime does.
FEW_STAGES = 3


@dataclass(frozen=True)
class StageFit:
    """One stage on a device. `change`: settings of `training` with which it fits; None where none were found."""

    regime: str
    name: str
    peak_bytes: int
    fits: bool
    host_bytes: int
    disk_bytes: int
    seconds: float
    change: Settings | None


@dataclass(frozen=True)
class DeviceFit:
    """All stages of a plan on a device. `change`: by regime, the settings with which all of its stages fit; none for
    regimes whose stages fit as they are, or fit with none."""

    device: str
    memory_bytes: int
    usable_bytes: int
    stages: tuple[StageFit, ...]
    change: Mapping[str, Settings]
    #: The most that scoring a network or making snapshots holds on the device.
    passes_bytes: int

    def to_json(self) -> dict[str, Any]:
        """JSON, for `segprop plan --json`."""
        return {**dataclasses.asdict(self), "overrides": self.overrides}

    @property
    def overrides(self) -> list[str]:
        """What to add to a command so that all stages fit: settings of the few stages that do not, else of the
        regime."""
        found: list[str] = []
        for regime in dict.fromkeys(stage.regime for stage in self.stages if not stage.fits):
            failing = [stage for stage in self.stages if stage.regime == regime and not stage.fits]
            sections = {f"stages.{stage.name}": stage.change or {} for stage in failing}
            if len(failing) > FEW_STAGES or not all(sections.values()):
                sections = {"training": self.change.get(regime, {})}
            found += [
                f"regimes.{regime}.{section}.{key}={_text(value)}"
                for section, settings in sections.items()
                for key, value in settings.items()
            ]
        return found


def fit_of(prepared: Prepared, device: Device) -> DeviceFit:
    """Find out what of a plan fits. `prepared` was made for this device."""
    usable = device.usable_bytes
    stages: list[StageFit] = []
    change: dict[str, Settings] = {}
    for regime in prepared.plan.regimes:
        search = _Search(prepared, regime, usable)
        found = [search.stage(index) for index in range(len(search.stages))]
        stages += found
        whole = None if all(stage.fits for stage in found) else search.nearest(None)
        if whole is not None:
            change[regime] = whole.settings
    kinds = {name for name, kind in TASKS.items() if kind.scores or kind.makes_set}
    passes = max((node.estimate.peak_bytes for node in prepared.plan.nodes if node.kind in kinds), default=0)
    return DeviceFit(device.words, device.memory_bytes, usable, tuple(stages), change, passes)


class _Search:
    """Plans one regime with other settings of training, each only once."""

    def __init__(self, prepared: Prepared, regime: str, usable: int) -> None:
        self._prepared, self._regime, self._usable = prepared, regime, usable
        self._peaks: dict[str, list[int] | None] = {}
        plan = prepared.plan
        self.stages = [plan.node(node) for node in plan.regimes[regime].stages]
        self._tasks = [from_json(StageTask, node.task) for node in self.stages]

    def stage(self, index: int) -> StageFit:
        """One stage as it is, and what would make it fit."""
        found = self.stages[index].estimate
        fits = found.peak_bytes <= self._usable
        change = None if fits else self.nearest(index)
        return StageFit(
            regime=self._regime,
            name=self._tasks[index].name,
            peak_bytes=found.peak_bytes,
            fits=fits,
            host_bytes=found.host_bytes or 0,
            disk_bytes=found.disk_bytes or 0,
            seconds=found.seconds,
            change=None if change is None else change.settings,
        )

    def nearest(self, index: int | None) -> Fit | None:
        """The nearest settings with which this stage fits; None: all of them."""
        trains = [task.train for task in (self._tasks if index is None else [self._tasks[index]])]

        def peak(settings: Settings) -> int | None:
            peaks = self._planned(settings)
            return None if peaks is None else max(peaks) if index is None else peaks[index]

        return nearest_fit(peak, self._usable, max(train.micro for train in trains), self._given(trains[0]))

    def _given(self, train: TrainSpec) -> dict[str, Any]:
        """What may be changed here, as it is."""
        can = self._prepared.config.family.traits.can
        given: dict[str, Any] = {"activation_checkpointing": train.activation_checkpointing}
        if train.optimizer.name == "adamw":
            given |= {"optimizer.name": train.optimizer.name}
        if can.lora is None:
            given |= {"lm_head": train.lm_head}
        # Parts that take turns are trained whole, all of them in time.
        if can.lora is None and self._tasks[0].schedule is None:
            given |= {"frozen_weights": train.frozen_weights}
            given |= {"lora.rank": None if train.lora is None else train.lora.rank}
        return {key: value for key, value in given.items() if key in CHOICES and not (key == "lora.rank" and value)}

    def _planned(self, settings: Settings) -> list[int] | None:
        """Peaks of the regime's stages with these settings; None where they do not go together."""
        key = repr(sorted(settings.items()))
        if key not in self._peaks:
            self._peaks[key] = self._plan(settings)
        return self._peaks[key]

    def _plan(self, settings: Settings) -> list[int] | None:
        config = changed(self._prepared.config, self._regime, settings)
        train = config.regime(self._regime).training
        if train.optimizer.name == "adamw8bit" and train.optimizer.rounding == "compensated":
            return None
        plan: Plan = self._prepared.plan_of(config)
        return [plan.node(node).estimate.peak_bytes for node in plan.regimes[self._regime].stages]


def changed(config: Config, regime: str, settings: Settings) -> Config:
    """The configuration of this regime alone with other settings of training."""
    own = config.regimes[regime]
    training: Mapping[str, Any] = own.training
    for key, value in settings.items():
        *way, name = key.split(".")
        nested: Any = {name: value}
        for step in reversed(way):
            nested = {step: nested}
        training = merge(training, nested)
    if "micro_batch" in settings:
        training = {**training, "accumulate": 1}
    return config.model_copy(update={"regimes": {regime: own.model_copy(update={"training": dict(training)})}})


def render(fit: DeviceFit, command: str) -> RenderableType:
    """The answer as a table, and `command` with what makes everything fit."""
    table = Table(
        title=f"{fit.device}: {human_bytes(fit.usable_bytes)} of {human_bytes(fit.memory_bytes)} for tensors",
        title_justify="left",
        title_style="bold",
        show_edge=False,
        pad_edge=False,
    )
    for name in ("regime", "stage"):
        table.add_column(name, no_wrap=True)
    for name in ("peak memory", "host memory", "disk", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    table.add_column("nearest settings of training that fit", overflow="fold")
    for stage in fit.stages:
        words = "" if stage.fits else "none found" if stage.change is None else _words(stage.change)
        table.add_row(
            stage.regime,
            stage.name,
            human_bytes(stage.peak_bytes),
            human_bytes(stage.host_bytes),
            human_bytes(stage.disk_bytes),
            human_seconds(stage.seconds),
            "yes" if stage.fits else "no",
            words,
        )
    return Group(table, *(Text(sentence) for sentence in _sentences(fit, command)))


def _sentences(fit: DeviceFit, command: str) -> Iterator[str]:
    overrides = fit.overrides
    if all(stage.fits for stage in fit.stages):
        yield "Every stage fits as it is."
    elif overrides:
        yield "The nearest that fits:"
        yield f"  {command} {' '.join(overrides)}"
    lost = dict.fromkeys(stage.regime for stage in fit.stages if not stage.fits and stage.change is None)
    if lost:
        yield f"Nothing that is searched makes all of {', '.join(lost)} fit: train less at once (split.base)."
    yield f"Scoring and making snapshots takes at most {human_bytes(fit.passes_bytes)} of the device" + (
        "."
        if fit.passes_bytes <= fit.usable_bytes
        else ", which does not fit: with memory.frozen=host blocks come to it one by one."
    )
    yield (
        "Host memory is beside the process itself: batches that wait, the best epoch's weights, a buffer. Disk is "
        "checkpoints and the commit, beside snapshots."
    )


def _words(settings: Settings) -> str:
    return " ".join(f"{key}={_text(value)}" for key, value in settings.items())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
