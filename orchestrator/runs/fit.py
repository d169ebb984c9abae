"""Say for every stage of a plan whether it fits a device, and which settings would make it fit. Nothing is run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cache_store.errors import ConfigError
from orchestrator.config.devices import Device
from orchestrator.config.rules import gangs, models
from orchestrator.config.rules.memory import goes_together
from orchestrator.config.schema import Config, Regime, merge
from orchestrator.costs.fit import PIECES, Fit, Settings, nearest_fit, section_of
from orchestrator.plan.experiment import outline_of
from orchestrator.plan.graph import Plan
from orchestrator.runs.prepare import Prepared
from orchestrator.units import human_bytes, human_seconds
from workers.specs.as_json import from_json
from workers.specs.experiment import TrainSpec
from workers.specs.memory import MemorySpec
from workers.specs.task_kinds import TASKS
from workers.specs.tasks import StageTask

#: So many stages get settings of their own before the whole regime does.
FEW_STAGES = 3


@dataclass(frozen=True)
class StageFit:
    """One stage on a device. `change`: settings with which it fits (of a base: all of its pieces); those of other
    sections than `training` name theirs first; None where none were found. `changed_host_bytes`: host memory then."""

    regime: str
    name: str
    peak_bytes: int
    fits: bool
    host_bytes: int
    disk_bytes: int
    seconds: float
    change: Settings | None
    changed_host_bytes: int | None = None
    #: Of a gang that trains it together: memory of device and host is one's.
    ranks: int | None = None


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
            changes = {stage.name: stage.change or {} for stage in failing}
            if len(failing) > FEW_STAGES or not all(changes.values()) or any(map(_cuts, changes.values())):
                keys = [(".".join(section_of(key)), value) for key, value in self.change.get(regime, {}).items()]
            else:
                keys = [(f"stages.{name}.{key}", change[key]) for name, change in changes.items() for key in change]
            found += [f"regimes.{regime}.{key}={_text(value)}" for key, value in keys]
        return found


def _cuts(change: Settings) -> bool:
    """Whether a change makes other stages."""
    return PIECES in change


@dataclass(frozen=True)
class _Taken:
    """What a planned stage takes."""

    group: str
    peak_bytes: int
    host_bytes: int


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
    """Plans one regime with other settings, each only once."""

    def __init__(self, prepared: Prepared, regime: str, usable: int) -> None:
        self._prepared, self._regime, self._usable = prepared, regime, usable
        self._known: dict[str, list[_Taken] | None] = {}
        plan, config = prepared.plan, prepared.config
        self.stages = [plan.node(node) for node in plan.regimes[regime].stages]
        self._tasks = [from_json(StageTask, node.task) for node in self.stages]
        outline = outline_of(config, config.regime(regime), prepared.data, prepared.found)
        self._blocks = [block.name for block in outline.blocks]
        self._groups = [stage.group for stage in config.regime(regime).layout(self._blocks)]

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
            changed_host_bytes=None if change is None else self._host(index, change.settings),
            ranks=found.ranks,
        )

    def nearest(self, index: int | None) -> Fit | None:
        """The nearest settings with which this stage fits; None: all of them."""
        trains = [task.train for task in (self._tasks if index is None else [self._tasks[index]])]

        def peak(settings: Settings) -> int | None:
            taken = self._of_stage(index, settings)
            return None if taken is None else max(each.peak_bytes for each in taken)

        return nearest_fit(peak, self._usable, max(train.micro for train in trains), self._given(index or 0, index))

    def _of_stage(self, index: int | None, settings: Settings) -> list[_Taken] | None:
        """What a stage takes with other settings, or every piece of a base that they cut; None for the index: all."""
        planned = self._planned(settings)
        if planned is None or index is None:
            return planned
        if _cuts(settings):
            return [each for each in planned if each.group == self._groups[index]]
        return [planned[index]]

    def _host(self, index: int, settings: Settings) -> int:
        return max(each.host_bytes for each in self._of_stage(index, settings) or [])

    def _given(self, first: int, index: int | None) -> dict[str, Any]:
        """What may be changed for a stage (None: for all), as it is now; `first`: one of those stages."""
        can, task = self._prepared.config.family.traits.can, self._tasks[first]
        train, memory = task.train, task.tiers
        given: dict[str, Any] = {}
        if self._may(train, memory, frozen="host"):
            given |= {"memory.frozen": memory.frozen}
        if memory.activations is None:
            given |= {"activation_checkpointing": train.activation_checkpointing}
        elif memory.activations in ("keep", "selective"):
            given |= {"memory.activations": memory.activations}
        along = "host" if memory.masters == "device" else memory.masters
        if memory.optimizer == "device" and self._may(train, memory, optimizer="host", masters=along):
            given |= {"memory.optimizer": memory.optimizer, "memory.masters": memory.masters}
        if train.optimizer.name == "adamw":
            given |= {"optimizer.name": train.optimizer.name}
        if can.lora is None:
            given |= {"lm_head": train.lm_head}
        # Parts that take turns are trained whole, all of them in time.
        if can.lora is None and task.schedule is None:
            given |= {"frozen_weights": train.frozen_weights}
            given |= {} if train.lora is not None else {"lora.rank": None}
        regime = self._prepared.config.regime(self._regime)
        if regime.row.has_base and regime.split.train_base and (index is None or self._groups[index] == "base"):
            given |= {PIECES: regime.split.base_segment_size or regime.split.base}
        return given

    def _may(self, train: TrainSpec, memory: MemorySpec, **changes: Any) -> bool:
        """Whether a stage that trains so may keep what it holds with these changes."""
        config = self._prepared.config
        return goes_together(config, config.regime(self._regime), train, dataclasses.replace(memory, **changes))

    def _planned(self, settings: Settings) -> list[_Taken] | None:
        """What the regime's stages take with these settings; None where they do not go together."""
        key = repr(sorted(settings.items()))
        if key not in self._known:
            self._known[key] = self._plan(settings)
        return self._known[key]

    def _plan(self, settings: Settings) -> list[_Taken] | None:
        config = changed(self._prepared.config, self._regime, settings)
        regime = config.regime(self._regime)
        if not _goes_together(self._prepared, config, regime):
            return None
        try:
            plan: Plan = self._prepared.plan_of(config)
        except ConfigError:
            return None  # what is left to the plan has no way that fits
        estimates = [plan.node(node).estimate for node in plan.regimes[self._regime].stages]
        stages = regime.layout(self._blocks)
        return [
            _Taken(stage.group, each.peak_bytes, each.host_bytes or 0)
            for stage, each in zip(stages, estimates, strict=True)
        ]


def _goes_together(prepared: Prepared, config: Config, regime: Regime) -> bool:
    """Whether the settings of a changed configuration may stand beside each other."""
    train = regime.training
    if train.optimizer.name in ("adamw8bit", "adamw4bit") and train.optimizer.rounding == "compensated":
        return False
    if next(gangs.training_problems(config.resources.gang, train), None) is not None:
        return False
    sample = prepared.config.domain.sample(prepared.config.data, prepared.data)
    return next(models.chain(config, regime, prepared.found, sample), None) is None


def changed(config: Config, regime: str, settings: Settings) -> Config:
    """The configuration of this regime alone with other settings."""
    own = config.regimes[regime]
    sections: dict[str, Any] = {name: getattr(own, name) for name in ("training", "memory", "split")}
    for key, value in settings.items():
        section, rest = section_of(key)
        *way, name = rest.split(".")
        nested: Any = {name: value}
        for step in reversed(way):
            nested = {step: nested}
        sections[section] = merge(sections[section], nested)
    if "micro_batch" in settings:
        sections["training"] = {**sections["training"], "accumulate": 1}
    return config.model_copy(update={"regimes": {regime: own.model_copy(update=sections)}})


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
    table.add_column("nearest settings that fit", overflow="fold")
    table.add_column("host memory then", justify="right", no_wrap=True)
    for stage in fit.stages:
        words = "" if stage.fits else "none found" if stage.change is None else _words(stage.change)
        then = "" if stage.changed_host_bytes is None else human_bytes(stage.changed_host_bytes)
        table.add_row(
            stage.regime,
            stage.name,
            human_bytes(stage.peak_bytes) + (f" a rank of {stage.ranks}" if stage.ranks else ""),
            human_bytes(stage.host_bytes),
            human_bytes(stage.disk_bytes),
            human_seconds(stage.seconds),
            "yes" if stage.fits else "no",
            words,
            then,
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
    yield f"Scoring and making snapshots takes at most {human_bytes(fit.passes_bytes)} of the device" + _passes_end(fit)
    yield (
        "Host memory is beside the process itself: batches that wait, the best epoch's weights, a buffer. Disk is "
        "checkpoints and the commit, beside snapshots."
    )


def _passes_end(fit: DeviceFit) -> str:
    if fit.passes_bytes <= fit.usable_bytes:
        return "."
    if any(re.fullmatch(r"regimes\.[^.]+\.memory\.frozen=host", each) for each in fit.overrides):
        return " as it is; with memory.frozen=host, as above, blocks come to it one by one."
    return ", which does not fit: with memory.frozen=host blocks come to it one by one."


def _words(settings: Settings) -> str:
    return " ".join(f"{key}={_text(value)}" for key, value in settings.items())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
