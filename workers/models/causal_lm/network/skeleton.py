"""The whole model on the meta device: its modules and shapes without a byte of weights."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cache_store.errors import first_line
from cache_store.formats.torch_dtypes import TORCH
from workers.models.causal_lm.errors import refuse
from workers.specs.experiment import COMPUTED
from workers.specs.language import CausalLMSpec

DTYPES = {name: TORCH[name] for name in COMPUTED.values()}


def architecture(spec: CausalLMSpec) -> dict[str, Any]:
    """`config` of a task's spec, which holds the whole architecture; ConfigError when it does not."""
    config = spec.config
    if config is None or "model_type" not in config:
        raise refuse(
            "is no architecture: a model_type is needed, as in a config.json; "
            "or give model.path, whose config.json has one",
            "model.config",
        )
    return config


def master_dtype(spec: CausalLMSpec) -> torch.dtype:
    """The type weights are kept and updated in; `auto` means the one the architecture names, or float32."""
    if spec.master != "auto":
        return DTYPES[spec.master]
    config = spec.config or {}
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if named not in DTYPES:
        raise refuse(
            f"auto, but the checkpoint is in {named}; allowed: float32, bfloat16",
            "model.master",
            value=named,
            allowed=["float32", "bfloat16"],
        )
    return DTYPES[named]


def build_config(values: dict[str, Any], spec: CausalLMSpec) -> PretrainedConfig:
    """transformers' config object for an architecture; ConfigError for an unknown model_type or a wrong value."""
    given = {key: value for key, value in values.items() if key != "model_type"}
    if values.get("auto_map") and not spec.trust_remote_code and values["model_type"] not in CONFIG_MAPPING:
        raise refuse(
            f"{values['model_type']!r} is unknown to transformers and brings its own code, which is not run unless you "
            "have read it and set model.trust_remote_code: true",
            "model.trust_remote_code",
            value=False,
        )
    try:
        if spec.trust_remote_code:
            return _remote_config(values, given, spec)
        # A copy: configs keep and change the containers they are given.
        return AutoConfig.for_model(values["model_type"], **json.loads(json.dumps(given)))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as e:
        raise refuse(
            f"transformers takes no {values['model_type']!r} of this description: {first_line(e)}", "model.config"
        ) from e
    except Exception as e:
        # transformers' own validation errors derive from nothing more telling.
        if type(e).__module__.startswith(("transformers", "huggingface_hub")):
            raise refuse(
                f"transformers takes no {values['model_type']!r} of this description: {first_line(e)}", "model.config"
            ) from e
        raise


def _remote_config(values: dict[str, Any], given: dict[str, Any], spec: CausalLMSpec) -> PretrainedConfig:
    if spec.path is None:
        raise refuse("needs model.path, where the model's code lies", "model.trust_remote_code")
    config = AutoConfig.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    config.update(json.loads(json.dumps(given)))
    return cast("PretrainedConfig", config)


def build_skeleton(spec: CausalLMSpec) -> PreTrainedModel:
    """The model of a task's spec on the meta device, in the master type; shared, so copy before changing it."""
    code = [spec.path, spec.revision] if spec.trust_remote_code else None
    key = [architecture(spec), str(master_dtype(spec)), spec.attention, code]
    return _cached(json.dumps(key, sort_keys=True))


@lru_cache(maxsize=8)
def _cached(key: str) -> PreTrainedModel:
    values, dtype, attention, code = json.loads(key)
    spec = CausalLMSpec(family="causal_lm", config=values, attention=attention)
    if code is not None:
        spec = replace(spec, path=code[0], revision=code[1], trust_remote_code=True)
    return _on_meta(build_config(values, spec), DTYPES[dtype.removeprefix("torch.")], attention, spec.trust_remote_code)


def _on_meta(config: PretrainedConfig, dtype: torch.dtype, attention: str, trust: bool) -> PreTrainedModel:
    for kernel in [attention, "eager"] if attention == "sdpa" else [attention]:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    config, dtype=dtype, attn_implementation=kernel, trust_remote_code=trust
                )
        except (ValueError, ImportError, TypeError, AttributeError, RuntimeError, IndexError, KeyError) as e:
            # Some models have no sdpa (soft-capped scores): transformers itself then takes eager, and so do we.
            if kernel == "sdpa" and "scaled_dot_product_attention" in str(e):
                continue
            raise refuse(f"transformers builds no causal LM of {config.model_type!r}: {first_line(e)}") from e
        return cast("PreTrainedModel", model.eval())
    raise refuse(f"{config.model_type!r} has neither sdpa nor eager attention", "model.attention")


def allocate(module: nn.Module, model: PreTrainedModel, device: str | torch.device) -> nn.Module:
    """Give a meta module memory on `device`: parameters unset, buffers that no checkpoint holds set.

    Those buffers (rotary frequencies, embedding scales) are computed by the model's own `_init_weights`, as
    transformers does after loading.
    """
    module = module.to_empty(device=device)
    for parameter in module.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark for: leave alone
    with torch.no_grad():
        for owner in module.modules():
            if owner._non_persistent_buffers_set:
                model._init_weights(owner)  # type: ignore[no-untyped-call]
    for parameter in module.parameters():
        del parameter._is_hf_initialized  # type: ignore[attr-defined]
    return module
