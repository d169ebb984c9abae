"""Check a configuration's gangs against its regimes and training settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from orchestrator.config.resources import GangConfig, Zero3Config
from orchestrator.config.schema import Config
from orchestrator.config.yaml_loader import KeyPath
from workers.models.base import Finding
from workers.specs.experiment import TrainSpec


def problems(config: Config) -> Iterator[Finding]:
    """(key, message) of what no gang of this configuration can be."""
    gang, resources = config.resources.gang, config.resources
    if gang.size is None:
        return
    at: KeyPath = ("resources", "gang")
    if not resources.on_ray:
        yield (*at, "size"), f"{gang.size}: needs resources.runner ray, which is {resources.runner}"
    for name in config.regimes:
        regime = config.regime(name)
        if regime.pipeline == "wavefront":
            yield (
                (*at, "size"),
                f"{gang.size}: not with pipeline wavefront ({name}): its rounds are spread over devices",
            )
        if regime.snapshots.production == "overlap":
            yield (*at, "size"), f"{gang.size}: not with snapshots.production overlap ({name}); allowed: before"
    if gang.strategy != "zero3":
        if gang.zero3 != Zero3Config():
            yield (*at, "zero3"), f"is for resources.gang.strategy zero3, which is {gang.strategy}"
    elif not has_deepspeed():
        yield (
            (*at, "strategy"),
            "zero3: needs DeepSpeed: pip install --no-build-isolation 'segprop[deepspeed]'; without it: fsdp2",
        )
    if gang.strategy == "zero3":
        yield from _zero3_files(gang.zero3, (*at, "zero3"))
    if gang.strategy == "ddp":
        return
    if config.evaluation.every is not None:
        yield (
            ("evaluation", "every"),
            f"{config.evaluation.every}: not with resources.gang.strategy {gang.strategy}; allowed: null",
        )
    refusal = config.family.traits.can.sharding
    if refusal is not None:
        yield (*at, "strategy"), f"{gang.strategy}: {refusal}"
    if gang.strategy == "zero3" and getattr(config.model, "master", "float32") == "bfloat16":
        yield ("model", "master"), "bfloat16: not with resources.gang.strategy zero3; allowed there: float32"


def _zero3_files(zero3: Zero3Config, at: KeyPath) -> Iterator[Finding]:
    if zero3.spec().files and zero3.disk is None:
        message = "null: parameters or optimizer are on disk; allowed: a folder for their files, best on an NVMe disk"
        yield (*at, "disk"), message
    if zero3.parameters == "disk" and zero3.optimizer == "device":
        message = "device: with parameters on disk it would hold more than they do; allowed with them: host, disk"
        yield (*at, "optimizer"), message


def has_deepspeed() -> bool:
    """Whether DeepSpeed is installed here."""
    return importlib.util.find_spec("deepspeed") is not None


def training_problems(gang: GangConfig, train: TrainSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    """(key inside `training`, message) of what these settings ask of a gang that it cannot do."""
    if gang.size is None:
        return
    if isinstance(gang.size, int) and train.batch_size < gang.size:
        yield ("batch_size",), f"{train.batch_size}: fewer samples than the gang has ranks ({gang.size})"
    if train.compile:
        yield ("compile",), "true: not in a gang; leave resources.gang.size out, or compile"
    if gang.strategy == "ddp":
        return
    among = f"not with resources.gang.strategy {gang.strategy}"
    if train.lora is not None and gang.strategy == "zero3":
        yield ("lora",), f"{among}; allowed: ddp, fsdp2"
    if train.precision == "fp16":
        yield ("precision",), f"fp16: {among}; allowed there: fp32, bf16"
    if train.optimizer.name in ("adamw8bit", "adamw4bit"):
        yield ("optimizer", "name"), f"{train.optimizer.name}: {among}; allowed there: adamw, sgd"
    if train.frozen_weights != "full":
        yield ("frozen_weights",), f"{train.frozen_weights}: {among}; allowed: full"
