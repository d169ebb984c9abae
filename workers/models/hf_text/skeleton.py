"""A text classifier of transformers on the meta device: its modules and shapes without a byte of weights."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from cache_store.errors import first_line
from workers.models.causal_lm.errors import refuse
from workers.specs.language import HFTextSpec

#: transformers' factory, whose functions are not annotated.
UNTYPED_AUTO: Any = AutoModelForSequenceClassification


def build_config(spec: HFTextSpec, classes: int) -> PretrainedConfig:
    """Make transformers' config object for a spec whose `config` is the whole architecture."""
    given = json.loads(json.dumps(spec.config or {}))
    config = AutoConfig.for_model(given.pop("model_type"), **given, num_labels=classes)
    # transformers chooses the loss by it; ours is another matter.
    config.problem_type = "single_label_classification"
    config.architectures = config.architectures or []
    # Decoders would hand layers a cache, which a second pass through a layer would fill again.
    config.use_cache = False
    return config


def build_skeleton(spec: HFTextSpec, classes: int) -> PreTrainedModel:
    """Build the network of a task's spec on the meta device, in float32 and eval mode; shared, so copy before changing
    it. ConfigError where transformers does not build it."""
    return _cached(json.dumps([spec.config, spec.attention], sort_keys=True), classes)


@lru_cache(maxsize=8)
def _cached(key: str, classes: int) -> PreTrainedModel:
    config, attention = json.loads(key)
    spec = HFTextSpec(family="hf_text", config=config, attention=attention)
    with torch.device("meta"):
        return build_network(spec, classes)


def build_network(spec: HFTextSpec, classes: int) -> PreTrainedModel:
    """Build transformers' own network of a spec, its weights drawn from the global generators, on the default device.

    Networks without sdpa take eager attention, as in transformers. ConfigError where transformers does not build it."""
    kinds = [spec.attention, "eager"] if spec.attention == "sdpa" else [spec.attention]
    for kind in kinds:
        try:
            model = UNTYPED_AUTO.from_config(
                build_config(spec, classes), dtype=torch.float32, attn_implementation=kind, trust_remote_code=False
            )
        except Exception as error:  # whatever a network's constructor raises
            if kind == "sdpa" and "scaled_dot_product_attention" in str(error):
                continue
            name = (spec.config or {}).get("model_type")
            raise refuse(f"transformers builds no text classifier of {name!r}: {first_line(error)}") from error
        return cast("PreTrainedModel", model.float().eval())
    raise refuse("has neither sdpa nor eager attention", "model.attention")
