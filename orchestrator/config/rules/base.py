"""Rules about one regime or all of them, whatever the model; each function is one rule.

A rule yields what is wrong as (key path, message) and knows no file: `check` looks up the lines, once, at the end.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from cache_store.storage.open import is_private
from cache_store.suggest import did_you_mean
from orchestrator.config.rules import gangs
from orchestrator.config.schema import Config, Regime, training_of, validate
from orchestrator.config.yaml_loader import KeyPath
from orchestrator.regimes.stages import Stage
from orchestrator.regimes.table import REGIMES, kinds_that
from orchestrator.regimes.wavefront import FINAL
from workers.models.base import Finding
from workers.specs.experiment import TrainSpec

#: Shards read ahead of the batch that is loaded (SHARDS_AHEAD of workers.training.batches, which imports torch).
AHEAD = 2


def locate(config: Config, regime: str, section: str, *keys: str) -> KeyPath:
    """Where a regime's setting was written: in its own override, or in the section all share."""
    own: dict[str, Any] = getattr(config.regimes[regime], section)
    return ("regimes", regime, section, *keys) if keys[0] in own else (section, *keys)


def _has(settings: Any, keys: Sequence[str]) -> bool:
    """Whether nested settings name this key."""
    for key in keys:
        if not isinstance(settings, dict) or key not in settings:
            return False
        settings = settings[key]
    return True


def window(config: Config, regime: Regime) -> Iterator[Finding]:
    """Check that the open shards plus those read ahead fit into `resources.snapshot_memory`."""
    settings, memory = regime.snapshots, config.resources.snapshot_memory
    if settings.shuffle != "window" or memory is None:
        return
    needed = (settings.window + AHEAD) * settings.shard_bytes
    if needed > memory:
        yield (
            ("resources", "snapshot_memory"),
            f"{memory}: {settings.window} shards open at a time and {AHEAD} read ahead, of "
            f"{settings.shard_bytes} bytes each, need {needed} (regime {regime.name}); raise it, or lower "
            "snapshots.window or snapshots.shard_bytes",
        )


def trainings(config: Config, regime: Regime) -> Iterator[Finding]:
    """Check `training` of a regime, and of every stage that overrides it."""
    for keys, message in training(config, regime.training):
        yield locate(config, regime.name, "training", *keys), message
    for stage, own in config.regimes[regime.name].stages.items():
        try:
            spec = validate(TrainSpec, training_of(regime.stages[stage]))
        except ValidationError:
            continue
        for keys, message in training(config, spec):
            written = _has(own, keys)
            path = ("regimes", regime.name, "stages", stage, *keys)
            yield path if written else locate(config, regime.name, "training", *keys), message


def training(config: Config, train: TrainSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    """Check settings of training against each other and the device: (keys inside `training`, message)."""
    optimizer = train.optimizer
    if train.batch_size % train.accumulate:
        yield ("accumulate",), f"{train.accumulate}: must divide the batch_size, which is {train.batch_size}"
    if train.micro_batch is not None and train.accumulate != 1:
        yield ("micro_batch",), "sets the micro-batches of a step by itself; leave accumulate out"
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield ("optimizer", "betas"), f"{list(optimizer.betas)}: both must be at least 0 and below 1"
    if optimizer.nesterov and (optimizer.name != "sgd" or optimizer.momentum == 0):
        yield ("optimizer", "nesterov"), "true: needs sgd with a momentum above 0"
    if optimizer.name in ("adamw8bit", "adamw4bit") and optimizer.rounding == "compensated":
        yield ("optimizer", "rounding"), f"compensated: not with {optimizer.name}; allowed there: stochastic, nearest"
    if optimizer.name == "adamw4bit":
        yield from _four_bits(train)
    if importlib.util.find_spec("bitsandbytes") is None:
        needs = "needs bitsandbytes: pip install 'segprop[quantized]'"
        if optimizer.name == "adamw8bit":
            yield ("optimizer", "name"), f"{optimizer.name}: {needs}"
        elif train.frozen_weights != "full":
            yield ("frozen_weights",), f"{train.frozen_weights}: {needs}"
    if train.precision == "fp16" and config.resources.device == "cpu":
        yield ("precision",), "fp16: not available on resources.device cpu; allowed there: fp32, bf16"
    yield from gangs.training_problems(config.resources.gang, train)


def _four_bits(train: TrainSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    if importlib.util.find_spec("torchao") is None:
        yield ("optimizer", "name"), "adamw4bit: needs torchao: pip install 'segprop[torchao]'"
    if train.channels_last:
        yield ("channels_last",), "true: not with adamw4bit, whose blocks lie in plain order; allowed there: false"


def stores(config: Config) -> Iterator[Finding]:
    """A store that one process has is of no use to workers on Ray, which are others."""
    if config.resources.on_ray and is_private(config.store):
        yield (
            ("store",),
            f"{config.store}: is the memory of one process, which workers on Ray do not see; "
            "allowed with it: resources.runner local",
        )


def pipelines(config: Config) -> Iterator[Finding]:
    """Check that `wavefront` is asked of regimes that have segments which meet the network's own head."""
    waving = kinds_that(lambda row: row.may_wave)
    for name, own in config.regimes.items():
        if not REGIMES[own.kind].may_wave and (own.pipeline == "wavefront" or own.wavefront):
            key = "pipeline" if own.pipeline == "wavefront" else "wavefront"
            message = f"wavefront: is for {waving}, {name} is {own.kind}; allowed here: leave it out"
            yield ("regimes", name, key), message
    if config.pipeline == "wavefront" and not any(REGIMES[own.kind].may_wave for own in config.regimes.values()):
        yield ("pipeline",), f"wavefront: is for {waving}, and no regime here is one; allowed: sequential"


def trackers(config: Config) -> Iterator[Finding]:
    """Check that services that are to be told of a run are installed."""
    for name in config.tracking.trackers:
        if importlib.util.find_spec(name) is None:
            yield (
                ("tracking", "trackers"),
                f"{name}: is not installed here; pip install 'segprop[trackers]', or {name} alone",
            )


def yardstick(config: Config) -> Iterator[Finding]:
    """Check that results are compared with a regime that there is."""
    name = config.evaluation.yardstick
    if name is not None and name not in config.regimes:
        known = ", ".join(config.regimes)
        yield (
            ("evaluation", "yardstick"),
            f"{name}: no such regime{did_you_mean(name, config.regimes)}; allowed: {known}",
        )


def variants(config: Config) -> Iterator[Finding]:
    """Check that `variant` is asked of a regime and a family that have it, and not together with what it overrules."""
    refusal = config.family.traits.can.variant
    for name, own in config.regimes.items():
        known = REGIMES[own.kind].variants
        if own.variant is not None and own.variant not in known:
            having = kinds_that(lambda row: bool(row.variants))
            message = f"{own.variant}: is for {having}, {name} is {own.kind}; allowed here: leave it out"
            yield ("regimes", name, "variant"), message
        elif own.variant is not None and refusal is not None:
            yield ("regimes", name, "variant"), refusal
        variant = config.variant_of(own)
        if own.head_convs is not None and variant is not None and known.get(variant, False):
            mapped = ", ".join(other for other, bare in known.items() if not bare)
            yield (
                ("regimes", name, "head_convs"),
                f"{own.head_convs}: with variant {variant} the head of {name} has no convolutions; "
                f"allowed: leave it out, or variant: {mapped}",
            )


def run_exit(config: Config, regime: Regime) -> Iterator[Finding]:
    """Check that the network is whole after every stage: only then can it be good enough before the last one."""
    own = config.regimes[regime.name].run_exit
    if regime.run_exit.gate is None:
        return
    at: KeyPath = ("regimes", regime.name, "run_exit") if own else ("run_exit",)
    if not regime.row.may_end_early:
        if own:
            ending = kinds_that(lambda row: row.may_end_early)
            yield at, f"is for {ending}, {regime.name} is {regime.kind}; allowed here: leave it out"
        return
    if regime.pipeline == "wavefront":
        yield at, f"not with pipeline wavefront ({regime.name}): its stages do not wait for each other's scores"
    if regime.snapshots.production == "overlap":
        yield (
            locate(config, regime.name, "snapshots", "production"),
            f"overlap: not with run_exit ({regime.name}), which decides first whether there is anything to read; "
            "allowed: before",
        )
    if not config.evaluation.stages:
        yield ("evaluation", "stages"), "false: run_exit looks at the whole network after every stage"
    if not regime.family.pretrained(regime.model) and regime.split.intermediate == "omit":
        yield (
            at,
            f"{regime.name} starts from random weights and omits what is not trained yet: blocks that a run leaves "
            "untrained would be noise; allowed: weights to start from, or split.intermediate: frozen",
        )


def split(config: Config, regime: Regime, blocks: Sequence[str]) -> Iterator[Finding]:
    """Check that the split leaves a chain of these blocks something of each kind."""
    stem = regime.traits.stem
    layers = len(blocks) - stem
    beyond = [index for index in regime.split.omit if index >= layers]
    if beyond and regime.traits.can.omit is None:
        yield locate(config, regime.name, "split", "omit"), f"{beyond}: the model has layers 0 to {layers - 1}"
        return
    if not regime.row.has_base:
        return
    if regime.base < 1:
        message = f"0: must be at least 1 block of {regime.traits.noun}"
        yield locate(config, regime.name, "split", "base"), message
        return
    if regime.split.base_segment_size is not None and not regime.split.train_base:
        yield (
            locate(config, regime.name, "split", "base_segment_size"),
            f"{regime.split.base_segment_size}: split.train_base false takes the base as it comes, so there are no "
            "pieces to train; allowed: null, or train_base: true",
        )
    n = len(regime.in_training(blocks)) - stem
    p, r = regime.split.base, regime.split.head
    if p + r <= n:
        yield from _order(config, regime, segments=n - p - r)
        return
    key = "base" if p > n or r == 0 else "head"
    value = p if key == "base" else r
    other = f"with split.head {r} " if key == "base" else f"with split.base {p} "
    most = n - (r if key == "base" else p)
    yield (
        locate(config, regime.name, "split", key),
        f"{value}: base + head may not exceed the {n} blocks of the chain; {other}at most {max(most, 0)}",
    )


def _order(config: Config, regime: Regime, *, segments: int) -> Iterator[Finding]:
    """Check that segments can be trained from the head down. `segments`: blocks between base and global head."""
    if regime.split.order != "top_down":
        return
    at = locate(config, regime.name, "split", "order")
    if regime.split.intermediate != "frozen":
        yield (
            at,
            f"top_down: {regime.name} would leave out the segments it has just trained; allowed: bottom_up, or "
            "split.intermediate: frozen",
        )
    if regime.pipeline == "wavefront":
        yield at, f"top_down: not with pipeline wavefront ({regime.name}); allowed: bottom_up, or pipeline: sequential"
    if not segments and not regime.split.train_base:
        yield at, "top_down: with split.train_base false and no block between base and global head there is no stage"


def stage_names(config: Config, regime: Regime, stages: Sequence[Stage]) -> Iterator[Finding]:
    """Check that overrides name stages there are."""
    allowed = list(dict.fromkeys([*(stage.group for stage in stages), *(stage.name for stage in stages)]))
    for name in config.regimes[regime.name].stages:
        if name not in allowed:
            message = f"unknown stage{did_you_mean(name, allowed)}; allowed: {', '.join(allowed)}"
            yield ("regimes", regime.name, "stages", name), message


def something_to_train(
    config: Config, regime: Regime, stages: Sequence[Stage], blocks: Sequence[str]
) -> Iterator[Finding]:
    """Check that low-rank adapters have something to adapt: layers, or the LM head where it is asked for."""
    if regime.traits.can.lora is not None:
        return
    layers = frozenset(blocks[regime.traits.stem :])
    for stage in stages:
        train = regime.stage_training(stage)
        if train.lora is not None and train.lm_head != "lora" and layers.isdisjoint(stage.trained):
            yield (
                locate(config, regime.name, "training", "lora"),
                f"leaves {stage.name} of {regime.name} nothing to train: it has no decoder layers to adapt; "
                f"allowed: training.lm_head: lora, or regimes.{regime.name}.stages.{stage.group}: {{lora: null}}",
            )


def wave(config: Config, regime: Regime, stages: Sequence[Stage]) -> Iterator[Finding]:
    """Check that a wave has segments to overlap, and stages of a fixed number of epochs, enough for the rounds."""
    if regime.pipeline != "wavefront":
        return
    running = [stage for stage in stages if stage.group != FINAL]
    if len(running) < 2:
        yield (
            locate(config, regime.name, "split", "base"),
            f"leaves {regime.name} one stage, and pipeline wavefront nothing to overlap; allowed: a smaller base, "
            "or pipeline: sequential",
        )
    if regime.snapshots.production == "overlap":
        yield (
            locate(config, regime.name, "snapshots", "production"),
            f"overlap: not with pipeline wavefront ({regime.name}), whose rounds wait for their sets; allowed: before",
        )
    refused: dict[KeyPath, str] = {}
    for stage in running:
        train = regime.stage_training(stage)
        if train.epochs < regime.wavefront.rounds:
            yield _too_many_rounds(config, regime, stage, train.epochs)
            break
        for path, message in _not_in_rounds(config, regime, stage, train):
            refused.setdefault(path, message)
    yield from refused.items()


def _too_many_rounds(config: Config, regime: Regime, stage: Stage, epochs: int) -> Finding:
    rounds, where = regime.wavefront.rounds, f"{stage.name} of {regime.name}"
    written = "rounds" in config.regimes[regime.name].wavefront
    return (
        ("regimes", regime.name, "wavefront", "rounds") if written else ("wavefront", "rounds"),
        f"{rounds}: more than the {epochs} epochs of {where}; allowed: 2 to {epochs}"
        if epochs > 1
        else f"{rounds}: {where} has one epoch, which cannot be cut; allowed: more training.epochs",
    )


def _not_in_rounds(config: Config, regime: Regime, stage: Stage, train: TrainSpec) -> Iterator[Finding]:
    """Settings that a stage cut into rounds cannot have."""
    where = f"{stage.name} of {regime.name}"
    for key in ("steps", "plateau", "target"):
        value = getattr(train.exit, key)
        if value is not None:
            yield (
                stage_key(config, regime, stage, "exit", key),
                f"{value}: {where} runs in rounds of a fixed number of epochs (pipeline wavefront); allowed: "
                "null, and an exit of the final pass alone, in stages.final",
            )
    if train.lora is not None:
        yield (
            stage_key(config, regime, stage, "lora"),
            f"not in a round of pipeline wavefront ({where}): low-rank adapters are merged when a piece of "
            "work ends; allowed: null",
        )


def stage_key(config: Config, regime: Regime, stage: Stage, *keys: str) -> KeyPath:
    """Where a setting of a stage's training was written."""
    for name in (stage.name, stage.group):
        if keys[0] in config.regimes[regime.name].stages.get(name, {}):
            return ("regimes", regime.name, "stages", name, *keys)
    return locate(config, regime.name, "training", *keys)
