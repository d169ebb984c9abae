"""Make a small model of an architecture: few layers, but one of every kind; a small vocabulary; narrow where it can
be."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from torch import nn

from cache_store.errors import ConfigError
from workers.models.causal_lm.network.skeleton import architecture, build_config, build_skeleton
from workers.models.causal_lm.pretrained.numbering import layer_count, pruned, signature
from workers.specs.language import CausalLMSpec

VOCABULARY = 64
_INNER = 64
#: Layers at least; layers that are searched for kinds; layers where what is left cannot be described otherwise.
_FEWEST, _SEARCHED, _MOST = 2, 128, 6

#: Words for how many experts there are, how many a token visits, and in how many groups they are.
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_VISITED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_GROUPS = ("n_group", "num_expert_group")
_SPARE = 8


def shrunk(spec: CausalLMSpec, narrow: bool) -> CausalLMSpec:
    """Return the spec of a small model of the same kind, in float32. ConfigError where the architecture cannot be
    built.

    narrow: also fewer experts, and fewer heads of the same size; that does not go together with every other width.
    """
    given = architecture(spec)
    whole = json.loads(build_config(given, spec).to_json_string(use_diff=False))
    whole["tie_word_embeddings"] = False
    if spec.trust_remote_code and given.get("auto_map"):
        whole["auto_map"] = given["auto_map"]
    config = _few_layers(replace(spec, config=whole, prune=()))
    vocabulary = config.get("vocab_size")
    if isinstance(vocabulary, int):
        config["vocab_size"] = min(VOCABULARY, vocabulary)
        config |= {key: _inside(value, config["vocab_size"]) for key, value in config.items() if "_token_id" in key}
    for key, value in config.items():
        if ("intermediate_size" in key or "ffn" in key) and type(value) is int:
            config[key] = min(value, _INNER)
    if narrow:
        config = _narrowed(_fewer_experts(config))
    path = spec.path if spec.trust_remote_code else None
    return replace(spec, config=config, prune=(), master="float32", path=path, gguf=None)


def _inside(value: Any, vocabulary: int) -> Any:
    """Map a special token, or several, into a smaller vocabulary: not every configuration does without."""
    if isinstance(value, list):
        return [_inside(one, vocabulary) for one in value]
    return min(value, vocabulary - 1) if type(value) is int else value


def _few_layers(spec: CausalLMSpec) -> dict[str, Any]:
    """Keep the first layer of every kind; where their numbers cannot be moved, the first few."""
    config = dict(architecture(spec))
    count = layer_count(config)
    kept = sorted({*_firsts(spec), *range(_FEWEST)} & set(range(count)))
    if len(kept) == count:
        return config
    try:
        few = pruned(config, [index for index in range(count) if index not in kept])
        if _kinds(replace(spec, config=few)) == _kinds(spec):
            return few
    except ConfigError:
        pass
    return pruned(config, range(min(count, max(_MOST, _FEWEST)), count))


def _firsts(spec: CausalLMSpec) -> list[int]:
    signatures = _signatures(spec)
    return [index for index, one in enumerate(signatures) if one not in signatures[:index]]


def _kinds(spec: CausalLMSpec) -> set[str]:
    return set(_signatures(spec))


def _signatures(spec: CausalLMSpec) -> list[str]:
    """Describe each layer; return nothing where no list of layers is found."""
    model = build_skeleton(spec)
    count = layer_count(architecture(spec))
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        return []
    return [repr(signature(layer)) for layer in list(lists[0])[:_SEARCHED]]


def _fewer_experts(config: dict[str, Any]) -> dict[str, Any]:
    """Keep as many experts as a token visits, and some more, in as many groups as before."""
    visited = max((value for key, value in config.items() if key in _VISITED and type(value) is int), default=1)
    groups = max((value for key, value in config.items() if key in _GROUPS and type(value) is int), default=1)
    few = groups * -(-(visited + _SPARE) // groups)
    return {**config, **{k: min(v, few) for k, v in config.items() if k in _EXPERTS and type(v) is int}}


def _narrowed(config: dict[str, Any]) -> dict[str, Any]:
    """Keep as many query heads a key head as before, of the same size, but only one or two key heads."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if type(hidden) is not int or type(heads) is not int or not heads:
        return config
    keys = config.get("num_key_value_heads") or heads
    if type(keys) is not int or heads % keys or hidden % heads:
        return config
    size = config.get("head_dim") or hidden // heads
    few = min(keys, 2)
    kept = few * (heads // keys)
    narrow = {**config, "num_attention_heads": kept, "hidden_size": hidden // heads * kept}
    for key, value in (("num_key_value_heads", few), ("head_dim", size)):
        if config.get(key) is not None:
            narrow[key] = value
    return narrow
