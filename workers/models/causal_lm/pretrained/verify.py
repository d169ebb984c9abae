"""A cheap proof for one model: a small model of the same architecture, run as a chain and by its own forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cache_store.errors import ConfigError
from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.network.context import Frame
from workers.models.causal_lm.network.parts import Boundary, build_part, part_names
from workers.models.causal_lm.network.random_init import random_state
from workers.models.causal_lm.network.skeleton import architecture, build_config, build_skeleton
from workers.models.causal_lm.pretrained.configs import pruned
from workers.specs.language import CausalLMSpec

_VOCABULARY = 64
_INNER = 64
_MOST_LAYERS = 6


def verify_chain(spec: CausalLMSpec) -> None:
    """ConfigError when the chain of a task's spec gives other logits than the model's own forward.

    Both run in float32 on random weights of a shrunk config: every kind of layer, few of them, a small vocabulary,
    narrow where the config can be narrowed. Takes about a second.
    """
    for narrow in (True, False):
        small = replace(
            spec, config=_shrunk(architecture(spec), narrow), prune=(), master="float32", path=_code(spec), gguf=None
        )
        try:
            part_names(small)
        except ConfigError:
            if narrow:
                continue  # what was shrunk does not go together; the full width always does
            raise
        _compare(small)
        return


def _code(spec: CausalLMSpec) -> str | None:
    return spec.path if spec.trust_remote_code else None


@torch.no_grad()
def _compare(spec: CausalLMSpec) -> None:
    skeleton = build_skeleton(spec)
    model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        build_config(architecture(spec), spec),
        dtype=torch.float32,
        attn_implementation=skeleton.config._attn_implementation,
        trust_remote_code=spec.trust_remote_code,
    ).eval()
    states = {name: random_state(spec, name, 0) for name in part_names(spec)}
    model.load_state_dict({key: tensor for state in states.values() for key, tensor in state.items()})
    ids = torch.randint(_VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12) % torch.tensor([[12], [5]])
    want = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    context = Frame(spec)(ids, positions)
    value: Any = (ids,)
    for name, state in states.items():
        part: nn.Module = build_part(spec, name).eval()
        part.load_state_dict(state)
        value = part(cast("Boundary", value), context)
    got = value.logits().view_as(want)
    if not torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max())):
        raise refuse(
            f"{skeleton.config.model_type!r} run part by part gives other logits than its own forward "
            f"(largest difference {float((got - want).abs().max()):.3g}); it cannot be trained in segments"
        )


def _shrunk(config: dict[str, Any], narrow: bool) -> dict[str, Any]:
    small = pruned(config, tuple(range(_layers_needed(config), config["num_hidden_layers"])))
    small = {**small, "vocab_size": min(_VOCABULARY, config["vocab_size"])}
    for key, value in small.items():
        if key.endswith("_token_id"):
            small[key] = None
        elif "intermediate_size" in key and isinstance(value, int):
            small[key] = min(value, _INNER)
    return _narrowed(small) if narrow else small


def _layers_needed(config: dict[str, Any]) -> int:
    """Layers from the first on until every kind has come, at least two."""
    count: int = config["num_hidden_layers"]
    kinds = [str(kind) for kind in config.get("layer_types") or ()]
    firsts = [kinds.index(kind) + 1 for kind in set(kinds)]
    return min(count, max([2, *firsts]), _MOST_LAYERS)


def _narrowed(config: dict[str, Any]) -> dict[str, Any]:
    """As many query heads a key head as before, of the same size, but one or two key heads."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not hidden or not heads:
        return config
    keys: int = config.get("num_key_value_heads") or heads
    if heads % keys or hidden % heads:
        return config
    size = config.get("head_dim") or hidden // heads
    few = min(keys, 2)
    kept = few * (heads // keys)
    narrow = {**config, "num_attention_heads": kept, "hidden_size": hidden // heads * kept}
    for key, value in (("num_key_value_heads", few), ("head_dim", size)):
        if config.get(key) is not None:
            narrow[key] = value
    return narrow
