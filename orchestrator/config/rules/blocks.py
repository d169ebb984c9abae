"""Rules about regimes whose parts take turns at being trained (`blocks`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.config.rules.base import stage_key
from orchestrator.config.schema import Config, Regime
from orchestrator.config.yaml_loader import KeyPath
from orchestrator.regimes.stages import Stage
from orchestrator.regimes.table import REGIMES, kinds_that
from workers.models.base import Finding
from workers.specs.experiment import TrainSpec


def settings(config: Config) -> Iterator[Finding]:
    """Check that `blocks` is asked of regimes that have them, and says what their kind knows."""
    taking_turns = kinds_that(lambda row: row.blocks is not None)
    for name, own in config.regimes.items():
        rule, at = REGIMES[own.kind].blocks, ("regimes", name, "blocks")
        if rule is None:
            if own.blocks.model_fields_set:
                yield at, f"is for {taking_turns}, {name} is {own.kind}; allowed here: leave it out"
            continue
        if own.blocks.order is not None and own.blocks.order not in rule.orders:
            yield (*at, "order"), f"{own.blocks.order}: {own.kind} draws its layers; allowed here: leave it out"
        if own.blocks.count is not None and rule.count is None:
            yield (
                (*at, "count"),
                f"{own.blocks.count}: {own.kind} trains one block at a time; allowed here: leave it out",
            )
        if config.resources.gang.size is not None:
            yield (
                ("resources", "gang", "size"),
                f"{config.resources.gang.size}: not with regimes whose parts take turns ({name} is {own.kind}); "
                "allowed: leave it out",
            )


def training(config: Config, regime: Regime) -> Iterator[Finding]:
    """Check that a stage whose parts take turns trains them as they are, step by step."""
    if regime.blocks is None:
        return
    for stage in _stages(regime):
        train = regime.stage_training(stage)
        for key, message in _refused(train):
            yield stage_key(config, regime, stage, key), f"{message} ({regime.name} is {regime.kind})"


def _refused(train: TrainSpec) -> Iterator[tuple[str, str]]:
    if train.lora is not None:
        yield "lora", "not where parts take turns, which are trained whole; allowed: null"
    if train.compile:
        yield "compile", "true: not where parts take turns, each of which would be compiled anew; allowed: false"
    if train.frozen_weights != "full":
        yield (
            "frozen_weights",
            f"{train.frozen_weights}: not where parts take turns, which all are trained in time; allowed: full",
        )


def _stages(regime: Regime) -> Sequence[Stage]:
    """Its one stage; what blocks there are does not matter here."""
    return regime.layout(("block",) * (1 + regime.traits.stem))


def enough_blocks(config: Config, regime: Regime, stages: Sequence[Stage]) -> Iterator[Finding]:
    """Check that there are as many layers as are drawn at one time, and something to take turns."""
    for stage in stages:
        schedule = regime.schedule(stage, tied=False)
        if schedule is not None and schedule.count > len(schedule.blocks):
            own = config.regimes[regime.name].blocks.count is not None
            at: KeyPath = ("regimes", regime.name, *(("blocks", "count") if own else ("kind",)))
            yield (
                at,
                f"{schedule.count} blocks at one time: {regime.name} has {len(schedule.blocks)} to draw from; allowed: "
                f"blocks.count 1 to {len(schedule.blocks)}",
            )
