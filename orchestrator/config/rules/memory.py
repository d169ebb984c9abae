"""Rules about where stages keep what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.config.schema import MEMORY, Config, Regime
from orchestrator.config.yaml_loader import KeyPath
from orchestrator.regimes.stages import Stage
from workers.models.base import Finding
from workers.specs.experiment import TrainSpec
from workers.specs.memory import AUTO, MemorySpec


def tiers(config: Config, regime: Regime, stages: Sequence[Stage], found: object) -> Iterator[Finding]:
    """Check for every stage that its tiers go together with each other, with its training and with its devices.
    `found`: what the model's family found when it looked at the model."""
    narrow = regime.family.narrow_weights(regime.model, found)
    wrong: dict[KeyPath, str] = {}
    for stage in stages:
        memory, train = regime.stage_memory(stage), regime.stage_training(stage)
        if memory.masters != "none" and not narrow and regime.traits.can.masters is None:
            said = f"{memory.masters}: weights in float32 are their own masters"
            wrong[_written(config, regime, stage, "masters")] = f"{said}; allowed: none, or model.master: bfloat16"
        for key, message in _problems(config, regime, train, memory):
            wrong.setdefault(_written(config, regime, stage, key), message)
    yield from wrong.items()


def goes_together(config: Config, regime: Regime, train: TrainSpec, memory: MemorySpec) -> bool:
    """Whether a stage that trains so may keep what it holds so."""
    return next(_problems(config, regime, train, memory), None) is None


def _problems(config: Config, regime: Regime, train: TrainSpec, memory: MemorySpec) -> Iterator[tuple[str, str]]:
    """(key of `memory`, message)."""
    if regime.blocks is not None:
        where = f"not where parts take turns ({regime.name} is {regime.kind})"
        if memory.updates_on_host:
            yield "optimizer", f"{memory.optimizer}: {where}, whose states end with their turn; allowed: device"
        if memory.masters != "none":
            yield "masters", f"{memory.masters}: {where}, with whose states they go; allowed: none"
        if memory.frozen == "host":
            yield "frozen", f"host: {where}, which all are trained in time; allowed: device"
    if config.resources.gang.size is not None and memory.moves_updates:
        key, value = ("optimizer", memory.optimizer) if memory.updates_on_host else ("masters", memory.masters)
        allowed = "device" if memory.updates_on_host else "none"
        yield (
            key,
            f"{value}: not in a gang, whose ranks share states by resources.gang.strategy fsdp2; "
            f"allowed there: {allowed}",
        )
    if "disk" in (memory.optimizer, memory.masters) and memory.disk is None:
        yield "disk", "null: optimizer or masters are on disk; allowed: a folder for their files, best on an NVMe disk"
    if memory.optimizer == "disk" and train.optimizer.name == "adamw8bit":
        yield "optimizer", "disk: not with adamw8bit, whose states bitsandbytes makes in memory; allowed: device, host"
    if train.optimizer.name == "adamw4bit" and memory.moves_updates:
        key, value = ("optimizer", memory.optimizer) if memory.updates_on_host else ("masters", memory.masters)
        allowed = "device" if memory.updates_on_host else "none"
        yield key, f"{value}: not with adamw4bit, whose states torchao keeps beside its weights; allowed: {allowed}"
    if memory.masters != "none":
        yield from _masters(regime, train, memory)
    if memory.frozen == "host" and train.frozen_weights != "full":
        yield (
            "frozen",
            f"host: not with training.frozen_weights {train.frozen_weights}, whose matrices bitsandbytes packs on the "
            "device, a few bits each; allowed there: device",
        )
    yield from _activation_problems(config, train, memory)


def _masters(regime: Regime, train: TrainSpec, memory: MemorySpec) -> Iterator[tuple[str, str]]:
    said = f"{memory.masters}:"
    refusal = regime.traits.can.masters
    if refusal is not None:
        yield "masters", f"{said} {refusal}; allowed: none"
        return
    if train.lora is not None:
        yield "masters", f"{said} low-rank adapters are in float32 whatever the weights are; allowed with them: none"
    if train.optimizer.rounding == "compensated":
        yield (
            "masters",
            f"{said} nothing is rounded that training.optimizer.rounding compensated would keep; allowed with it: none",
        )
    if memory.optimizer == AUTO:
        return  # it becomes what goes with the masters
    beside, where = (("host", "disk"), "host") if memory.updates_on_host else (("device",), "device")
    if memory.masters not in beside:
        yield (
            "masters",
            f"{said} masters change where the optimizer's state is, on the {where}"
            f" (memory.optimizer {memory.optimizer}); allowed there: none, {', '.join(beside)}",
        )


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


def _written(config: Config, regime: Regime, stage: Stage, key: str) -> KeyPath:
    """Where a setting of a stage's memory was written."""
    own = config.regimes[regime.name]
    for name in (stage.name, stage.group):
        override: Any = own.stages.get(name, {}).get(MEMORY, {})
        if key in override:
            return ("regimes", regime.name, "stages", name, MEMORY, key)
    return ("regimes", regime.name, MEMORY, key) if key in own.memory else (MEMORY, key)
