"""Tiny causal LMs of many architectures, and chains built of their parts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from workers.models.causal_lm.network.context import Context, Frame
from workers.models.causal_lm.network.parts import build_part, part_names, part_state_names
from workers.models.causal_lm.network.skeleton import build_config, build_skeleton
from workers.specs.language import CausalLMSpec

VOCABULARY = 97
WINDOW = 5

_BASE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Every one is there for something the others lack.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "gemma2": {"sliding_window": WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "gpt_neox": {"hidden_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "cohere2": {"sliding_window": WINDOW, "logit_scale": 0.25},
    "gpt2": {"n_inner": 48, "n_positions": 64},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


def lm_spec(name: str = "llama", **given: Any) -> CausalLMSpec:
    """A task's spec; keywords that are fields of the spec go there, the others into the architecture."""
    fields = {key: given.pop(key) for key in list(given) if key in CausalLMSpec.__dataclass_fields__}
    config = {"model_type": name, "tie_word_embeddings": False, **_BASE, **ARCHITECTURES.get(name, {}), **given}
    return CausalLMSpec(family="causal_lm", config=config, **fields)


def make_model(spec: CausalLMSpec, seed: int = 0) -> nn.Module:
    """transformers' own model with weights large enough that every part matters, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kernel = build_skeleton(spec).config._attn_implementation
        model = AutoModelForCausalLM.from_config(build_config(spec.config or {}, spec), attn_implementation=kernel)
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 1.0, std=0.3)
    return model.eval()  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=32)
def reference(name: str) -> tuple[CausalLMSpec, nn.Module]:
    spec = lm_spec(name)
    return spec, make_model(spec)


def build_chain(spec: CausalLMSpec, state: Mapping[str, Tensor], device: str = "cpu") -> dict[str, nn.Module]:
    """All parts, each strictly loaded with its share of `state`; all of `state` is used exactly once."""
    parts, seen = {}, []
    for name in part_names(spec):
        part = build_part(spec, name, device)
        names = list(part.state_dict())
        assert names == part_state_names(spec, name)
        part.load_state_dict({key: state[key] for key in names}, strict=True)
        parts[name] = part.eval()
        seen += names
    assert sorted(seen) == sorted(state)
    return parts


def run_chain(parts: Mapping[str, nn.Module], ids: Tensor, context: Context) -> Any:
    value: Any = (ids,)
    for part in parts.values():
        value = part(value, context)
    return value


def logits(spec: CausalLMSpec, parts: Mapping[str, nn.Module], ids: Tensor, *frame: Any) -> Tensor:
    """(B, T, V) by the chain."""
    out: Tensor = run_chain(parts, ids, Frame(spec)(ids, *frame)).logits()
    return out.view(*ids.shape, -1)


def saved_model(folder: Path, name: str = "llama", shard: str = "5GB", **given: Any) -> tuple[CausalLMSpec, nn.Module]:
    """A model saved by transformers into `folder`, and the user's spec for it."""
    spec = lm_spec(name, **given)
    model = make_model(spec)
    model.save_pretrained(folder, max_shard_size=shard)  # type: ignore[operator]
    return replace(spec, config=None, path=str(folder)), model
