"""Build the whole model on the meta device: its modules and shapes without a byte of weights."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cache_store.errors import ConfigError, first_line
from cache_store.formats.torch_dtypes import TORCH
from workers.device import has_values
from workers.models.causal_lm.errors import refuse
from workers.specs.experiment import COMPUTED
from workers.specs.language import CausalLMSpec

#: Words for the number of decoder layers. Of an encoder's and a decoder's the decoder's counts.
_LAYER_COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")

#: Lists of the kind of every layer, which give the number where nothing else does.
_LAYER_LISTS = ("layers_block_type", "layer_types")
#: transformers' factory, whose functions are not annotated.
UNTYPED_AUTO: Any = AutoModelForCausalLM
#: transformers' mark on a parameter that its `_init_weights` should leave alone.
_LEAVE_ALONE = "_is_hf_initialized"

DTYPES = {name: TORCH[name] for name in COMPUTED.values()}


def architecture(spec: CausalLMSpec) -> dict[str, Any]:
    """Return `config` of a task's spec, which holds the whole architecture; ConfigError when it does not."""
    config = spec.config
    if config is None or "model_type" not in config:
        raise refuse(
            "is no architecture: a model_type is needed, as in a config.json; "
            "or give model.path, whose config.json has one",
            "model.config",
        )
    return config


def untied(values: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture with an LM head of its own: parts are modules apart, and may be given one matrix later."""
    return {**values, "tie_word_embeddings": False}


def is_tied(spec: CausalLMSpec) -> bool:
    """Tell whether embedding and LM head of a task's spec begin as one matrix."""
    return bool((spec.config or {}).get("tie_word_embeddings"))


def master_dtype(spec: CausalLMSpec) -> torch.dtype:
    """Return the type weights are kept and updated in; `auto` means the one the architecture names, or float32."""
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
    """Make transformers' config object for an architecture; ConfigError for an unknown model_type or a wrong value."""
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
        return AutoConfig.for_model(values["model_type"], **_fresh(given))
    except ConfigError:
        raise
    except Exception as e:  # whatever a configuration's own checks raise
        raise refuse(
            f"transformers takes no {values['model_type']!r} of this description: {first_line(e)}", "model.config"
        ) from e


def _fresh(given: dict[str, Any]) -> dict[str, Any]:
    """Copy the values, since configurations keep and change the containers they are given. JSON has no infinite
    numbers: transformers writes them as `{"__float__": "Infinity"}`, and only its loader of files reads that."""
    copied: dict[str, Any] = PretrainedConfig._decode_special_floats(json.loads(json.dumps(given)))
    return copied


def _remote_config(values: dict[str, Any], given: dict[str, Any], spec: CausalLMSpec) -> PretrainedConfig:
    if spec.path is None:
        raise refuse("needs model.path, where the model's code lies", "model.trust_remote_code")
    config = AutoConfig.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    config.update(_fresh(given))
    return cast("PretrainedConfig", config)


def build_skeleton(spec: CausalLMSpec) -> PreTrainedModel:
    """Build the model of a task's spec on the meta device, in the master type; shared, so copy before changing it."""
    return _cached(skeleton_key(spec))


def skeleton_key(spec: CausalLMSpec) -> str:
    """Name what decides the skeleton of a task's spec: specs with equal keys have equal skeletons."""
    code = [spec.path, spec.revision] if spec.trust_remote_code else None
    key = [untied(architecture(spec)), str(master_dtype(spec)), spec.attention, code]
    return json.dumps(key, sort_keys=True)


@lru_cache(maxsize=8)
def _cached(key: str) -> PreTrainedModel:
    values, dtype, attention, code = json.loads(key)
    spec = CausalLMSpec(family="causal_lm", config=values, attention=attention)
    if code is not None:
        spec = replace(spec, path=code[0], revision=code[1], trust_remote_code=True)
    return _on_meta(build_config(values, spec), DTYPES[dtype.removeprefix("torch.")], attention, spec.trust_remote_code)


def _on_meta(config: PretrainedConfig, dtype: torch.dtype, attention: str, trust: bool) -> PreTrainedModel:
    _of_text_alone(config)
    for kernel in [attention, "eager"] if attention == "sdpa" else [attention]:
        try:
            with torch.device("meta"):
                model = UNTYPED_AUTO.from_config(
                    config, dtype=dtype, attn_implementation=kernel, trust_remote_code=trust
                )
        except Exception as e:  # whatever a model's constructor raises
            # Some models have no sdpa (soft-capped scores): transformers itself then takes eager, and so do we.
            if kernel == "sdpa" and "scaled_dot_product_attention" in str(e):
                continue
            raise refuse(
                f"transformers builds no causal LM of {config.model_type!r}: {_outside(config) or first_line(e)}"
            ) from e
        return _in_float32(cast("PreTrainedModel", model.eval()))
    raise refuse(f"{config.model_type!r} has neither sdpa nor eager attention", "model.attention")


def _of_text_alone(config: PretrainedConfig) -> None:
    """Raise ConfigError for a configuration of several models, one of which is the text's."""
    try:
        text = config.get_text_config()
    except ValueError as e:
        raise refuse(f"{config.model_type!r} is several models: {first_line(e).split('.')[0]}", "model.config") from e
    if text is not config:
        raise refuse(
            f"{config.model_type!r} is a multimodal model; take the text model's own config "
            f"(model_type {text.model_type!r}, under `text_config`)",
            "model.config",
            value=config.model_type,
        )


def _outside(config: PretrainedConfig) -> str | None:
    """Name the special tokens outside the vocabulary, None without one: an embedding with such a padding token cannot
    be built."""
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    ids = {key: value for key, value in config.to_dict().items() if key.endswith("_token_id") and type(value) is int}
    outside = [f"{key} {value}" for key, value in sorted(ids.items()) if not -vocabulary <= value < vocabulary]
    if not outside:
        return None
    return f"{', '.join(outside)}: outside its vocabulary of {vocabulary} tokens; set them in model.config, or to null"


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Give the weights that transformers names as better kept in float32 that type; changes the model.

    Rounded to bfloat16, a router's correction bias chooses other experts. `_keep_in_fp32_modules_strict` are those that
    transformers' own loader keeps beside bfloat16; `_keep_in_fp32_modules`, which it keeps beside float16 alone, names
    such biases too.
    """
    names = sorted({*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ())})
    if not names:
        return model
    # Anywhere in a weight's name, as transformers' loader looks for them.
    kept = re.compile("|".join(name.replace("*", ".*") for name in names))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype in (torch.float16, torch.bfloat16) and kept.search(name):
            tensor.data = tensor.data.float()
    return model


def layer_count_key(values: Mapping[str, Any]) -> str | None:
    """Return the key under which an architecture says how many decoder layers it has (GPT-2: `n_layer`); None: nowhere.

    Configurations of transformers name their own word; of unknown code the usual ones are looked for.
    """
    known = CONFIG_MAPPING[values["model_type"]] if values.get("model_type") in CONFIG_MAPPING else PretrainedConfig
    named = known.attribute_map.get("num_hidden_layers")
    words = _LAYER_COUNTS if named is None or "encoder" in named else (named, *_LAYER_COUNTS)
    return next((key for key in words if type(values.get(key)) is int), None)


def number_of_layers(values: Mapping[str, Any]) -> int | None:
    """Count the decoder layers of an architecture, by its number or by a list with an entry a layer; None: it does
    not say."""
    key = layer_count_key(values)
    if key is not None:
        return cast("int", values[key])
    return next((len(values[name]) for name in _LAYER_LISTS if isinstance(values.get(name), list)), None)


def initialize(model: PreTrainedModel, module: nn.Module) -> None:
    """Let the model's own code set what it sets in `module` itself; models inside models have rules of their own."""
    owner: Any = module if isinstance(module, PreTrainedModel) else model
    owner._init_weights(module)


def allocate(module: nn.Module, model: PreTrainedModel, device: str | torch.device) -> nn.Module:
    """Give a meta module memory on `device`: parameters unset, buffers that no checkpoint holds set.

    Those buffers (rotary frequencies, embedding scales) are computed by the model's own `_init_weights`, as
    transformers does after loading. ConfigError for a buffer that this leaves unset.
    """
    module = module.to_empty(device=device)
    for parameter in module.parameters():
        setattr(parameter, _LEAVE_ALONE, True)
    with torch.no_grad():
        for buffer in _computed(module).values():
            buffer.fill_(torch.nan)
        for owner in module.modules():
            if owner._non_persistent_buffers_set:
                initialize(model, owner)
        if _unset(module):
            _initialize_by_parents(module, model)
    for parameter in module.parameters():
        delattr(parameter, _LEAVE_ALONE)
    if _unset(module):
        raise refuse(f"{model.config.model_type!r} has no rule for the values of its buffer {_unset(module)[0]!r}")
    return module


def _computed(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of numbers that no checkpoint holds."""
    kept = set(module.state_dict())
    return {name: buffer for name, buffer in module.named_buffers() if name not in kept and buffer.is_floating_point()}


def _unset(module: nn.Module) -> list[str]:
    """Of tensors without bytes (`workers.tracing`) none: they have no values."""
    return [name for name, buffer in _computed(module).items() if has_values(buffer) and bool(buffer.isnan().any())]


def _initialize_by_parents(module: nn.Module, model: PreTrainedModel) -> None:
    """Run the rule that some models have, for what holds their layers, to set buffers of layers: over those in
    `module`."""
    for parent in model.modules():
        for name, child in parent.named_children():
            kinds = {type(layer) for layer in child} if isinstance(child, nn.ModuleList) else set()
            inside = [layer for layer in module.modules() if type(layer) in kinds]
            if inside:
                stand_in = copy.copy(parent)
                stand_in._modules = {**parent._modules, name: nn.ModuleList(inside)}
                initialize(model, stand_in)
