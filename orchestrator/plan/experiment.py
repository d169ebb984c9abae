"""What the nodes of a regime share, freed of everything that only says where files lie."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from orchestrator.costs.formulas import SplitRows, split_rows
from workers.specs.experiment import Experiment, ImageSpec, ResNetSpec
from workers.specs.language import CausalLMSpec, TextSpec

if TYPE_CHECKING:
    from orchestrator.config.schema import Config, Regime
    from workers.data.images.outline import DataOutline
    from workers.data.text.inspect import TextOutline
    from workers.models.causal_lm.outline import LMOutline


def experiment_of(config: Config, regime: Regime, classes: int, language: LMOutline | None) -> Experiment:
    """The store holds decoded data and initial weights, so a stage needs neither's path."""
    data = config.data
    return Experiment(
        model=model_of(regime.model, language),
        data=dataclasses.replace(data, path=None)
        if isinstance(data, TextSpec)
        else dataclasses.replace(data, path=None, download=False),
        classes=classes,
        seed=config.seed,
    )


def model_of(model: ResNetSpec | CausalLMSpec, language: LMOutline | None) -> ResNetSpec | CausalLMSpec:
    """The architecture alone; and where its code lies, for a checkpoint whose code the user trusts."""
    if isinstance(model, ResNetSpec):
        return dataclasses.replace(model, weights=None)
    assert language is not None
    alone = dataclasses.replace(model, gguf=None, tokenizer=None, prune=(), config=dict(language.config))
    return alone if model.trust_remote_code else dataclasses.replace(alone, path=None, revision=None)


def initializing(model: ResNetSpec | CausalLMSpec, language: LMOutline | None) -> ResNetSpec | CausalLMSpec:
    """The settings that decide the initial weights: how the chain is cut, or computes, later does not."""
    if isinstance(model, ResNetSpec):
        return dataclasses.replace(model, segments="stages", head_convs=1, dropout=ResNetSpec.dropout)
    assert language is not None
    return dataclasses.replace(model, attention="sdpa", config=dict(language.config))


def decoding(data: ImageSpec | TextSpec) -> ImageSpec | TextSpec:
    """The settings that decide how a data set is decoded. Those of images that do not are set to their defaults, so
    that data are decoded once for all the ways they are augmented, split and limited."""
    if isinstance(data, TextSpec):
        return data
    return ImageSpec(
        name=data.name, path=data.path, download=data.download, image_size=data.image_size, resize=data.resize
    )


def tokenizing(model: CausalLMSpec) -> CausalLMSpec:
    """The settings of a model that matter to its tokenizer, its vocabulary and its positions."""
    return dataclasses.replace(model, attention="sdpa", master="float32", prune=())


def rows_of(config: Config, data: DataOutline | TextOutline) -> SplitRows:
    """Samples of every split; of packed text, about."""
    if isinstance(config.data, ImageSpec):
        return split_rows(config.data, data.train_rows, data.test_rows)  # type: ignore[union-attr]
    return SplitRows(**{split: data.rows[split] for split in ("train", "validation", "test")})  # type: ignore[union-attr]


def tokens_a_sample(config: Config, data: DataOutline | TextOutline) -> int:
    """Tokens of a sample of text, about: what packing makes of it, or a quarter of its bytes."""
    from workers.data.text.formats import data_is_packed

    text = config.data
    assert isinstance(text, TextSpec)
    if data_is_packed(text):
        return text.sequence_length
    mean = data.bytes / max(1, sum(data.documents.values())) / 4  # type: ignore[union-attr]
    return max(1, min(text.sequence_length, round(mean)))
