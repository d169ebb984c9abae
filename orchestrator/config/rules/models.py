"""Rules about a model, its chain and what its family can do. None looks at the data set's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cache_store.errors import ConfigError
from orchestrator.config.rules import base, memory
from orchestrator.config.rules import blocks as turns
from orchestrator.config.schema import Config, Regime
from orchestrator.regimes.stages import Stage
from workers.models.base import Finding
from workers.models.counting import Shape
from workers.models.outline import ChainOutline


def finding_of(error: ConfigError, default: str = "model") -> Finding:
    """An error of a family as a finding, at the key that it names."""
    where = str(error.details.get("where", default))
    return tuple(where.split(".")), error.message.removeprefix(f"{where}: ")


def refused(config: Config, regime: Regime) -> Iterator[Finding]:
    """Check that a regime asks of its model's family only what that can do."""
    can, train = regime.traits.can, regime.training
    asked = (
        (train.lora is not None, can.lora, ("training", "lora")),
        (train.lm_head != "train", can.lm_head, ("training", "lm_head")),
        (train.frozen_weights != "full", can.frozen_weights, ("training", "frozen_weights")),
        (regime.snapshots.encoding == "fp8", can.fp8, ("snapshots", "encoding")),
        (bool(regime.split.omit), can.omit, ("split", "omit")),
        (train.micro_batch == "auto", can.auto_micro, ("training", "micro_batch")),
        (train.channels_last, can.channels_last, ("training", "channels_last")),
    )
    for asks, words, (section, key) in asked:
        if asks and words is not None:
            yield base.locate(config, regime.name, section, key), words
    if can.lm_head is None and train.lm_head == "lora" and train.lora is None:
        yield base.locate(config, regime.name, "training", "lm_head"), "lora: needs training.lora"


def chain(config: Config, regime: Regime, found: object, sample: Shape) -> Iterator[Finding]:
    """Check that there is a chain for samples of this shape, that its split makes sense, and that its stages can be
    built."""
    try:
        # Which chain there is does not depend on the number of classes.
        outline = regime.family.outline(regime.model, found, sample, 10)
    except ConfigError as error:
        path, message = finding_of(error)
        if path == ("model", "head_convs") and config.regimes[regime.name].head_convs is not None:
            path = ("regimes", regime.name, "head_convs")
        yield path, message
        return
    blocks = [block.name for block in outline.blocks]
    wrong = list(base.split(config, regime, blocks))
    yield from wrong
    if wrong:
        return
    stages = regime.layout(blocks)
    yield from _bridges(regime, outline, stages)
    yield from base.stage_names(config, regime, stages)
    yield from base.wave(config, regime, stages)
    yield from base.something_to_train(config, regime, stages, blocks)
    yield from memory.tiers(config, regime, stages, found)
    yield from turns.enough_blocks(config, regime, stages)


def trainable(config: Config, regime: Regime, outline: ChainOutline, rows: int) -> Iterator[Finding]:
    """Check that stages can be trained on `rows` samples; only the first one that cannot is named."""
    for stage in regime.layout([block.name for block in outline.blocks]):
        found = list(regime.family.stage_problems(stage, outline, regime.stage_training(stage), rows))
        for keys, message in found:
            yield base.stage_key(config, regime, stage, *map(str, keys)), f"{message} (regime {regime.name})"
        if found:
            return


def _bridges(regime: Regime, outline: ChainOutline, stages: Sequence[Stage]) -> Iterator[Finding]:
    """Adapters and local heads must reach the head's grid."""
    for stage in stages:
        try:
            if stage.adapter is not None:
                outline.adapter(*stage.adapter)
            if stage.aux is not None:
                outline.aux(stage.aux)
        except ConfigError as error:
            path, message = finding_of(error, "data.image_size")
            yield path, f"{stage.name} of {regime.kind}: {message}"
