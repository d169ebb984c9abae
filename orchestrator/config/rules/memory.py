"""Rules about where stages keep what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.config.schema import MEMORY, Config, Regime
from orchestrator.config.yaml_loader import KeyPath
from orchestrator.regimes.stages import Stage
from workers.models.base import Finding
from workers.specs.experiment import TrainSpec
from workers.specs.memory import MemorySpec


def tiers(config: Config, regime: Regime, stages: Sequence[Stage]) -> Iterator[Finding]:
    """Check for every stage that its tiers go together with each other, with its training and with its devices."""
    found: dict[KeyPath, str] = {}
    for stage in stages:
        memory, train = regime.stage_memory(stage), regime.stage_training(stage)
        for key, message in _problems(config, regime, train, memory):
            found.setdefault(_written(config, regime, stage, key), message)
    yield from found.items()


def _problems(config: Config, regime: Regime, train: TrainSpec, memory: MemorySpec) -> Iterator[tuple[str, str]]:
    """(key of `memory`, message)."""
    if regime.blocks is not None:
        where = f"not where parts take turns ({regime.name} is {regime.kind})"
        if memory.updates_on_host:
            yield "optimizer", f"{memory.optimizer}: {where}, whose states end with their turn; allowed: device"
        if memory.frozen == "host":
            yield "frozen", f"host: {where}, which all are trained in time; allowed: device"
    if config.resources.gang.size is not None and memory.updates_on_host:
        yield (
            "optimizer",
            f"{memory.optimizer}: not in a gang, whose ranks share states by resources.gang.strategy fsdp2; "
            "allowed there: device",
        )
    if memory.frozen == "host" and train.frozen_weights != "full":
        yield (
            "frozen",
            f"host: not with training.frozen_weights {train.frozen_weights}, whose matrices bitsandbytes packs on the "
            "device, a few bits each; allowed there: device",
        )
    yield from _activation_problems(config, train, memory)


def _activation_problems(config: Config, train: TrainSpec, memory: MemorySpec) -> Iterator[tuple[str, str]]:
    """What else frozen blocks and activations do not go together with."""
    kept, gang = memory.activations, config.resources.gang
    if train.compile:
        reason = "not with training.compile, which makes one program of a path and decides itself what it keeps"
        if memory.frozen == "host":
            yield "frozen", f"host: {reason}; allowed there: device"
        if kept in ("selective", "host"):
            yield "activations", f"{kept}: {reason}; allowed there: keep, recompute"
    if gang.size is not None and gang.strategy != "ddp":
        where = f"not with resources.gang.strategy {gang.strategy}"
        if memory.frozen == "host":
            yield "frozen", f"host: {where}, whose ranks hold a part of every block each; allowed there: device"
        if kept in ("selective", "host"):
            reason = "which gathers weights inside of blocks, among what would be counted or moved"
            yield "activations", f"{kept}: {where}, {reason}; allowed there: keep, recompute"


def _written(config: Config, regime: Regime, stage: Stage, key: str) -> KeyPath:
    """Where a setting of a stage's memory was written."""
    own = config.regimes[regime.name]
    for name in (stage.name, stage.group):
        override: Any = own.stages.get(name, {}).get(MEMORY, {})
        if key in override:
            return ("regimes", regime.name, "stages", name, MEMORY, key)
    return ("regimes", regime.name, MEMORY, key) if key in own.memory else (MEMORY, key)
