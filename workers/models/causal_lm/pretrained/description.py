"""Check what an architecture says about itself before transformers builds anything of it.

transformers checks types, few values: a width of 0 ends in a division by zero somewhere, a million layers in minutes of
waiting, and an attention kernel called `owner/name` is code that it fetches from the hub.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from workers.models.causal_lm.errors import refuse
from workers.specs.language import CausalLMSpec

#: What every decoder has at least one of, by the names that transformers gives them in common.
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
)
_MOST_LAYERS = 10_000
_MOST = 1 << 24
#: Bases and factors of rotary embeddings, also inside `rope_parameters` and `rope_scaling`.
_ROTARY = ("rope_theta", "rope_local_base_freq", "factor")
#: Settings that name an implementation: transformers' own, or `owner/name` of the hub, whose code is run.
_IMPLEMENTATION = "_implementation"


def check_description(values: Mapping[str, Any], spec: CausalLMSpec) -> None:
    """ConfigError when `values`, a config.json with the user's settings over it, has a size that no decoder has, or
    names code of others without `trust_remote_code`."""
    for key, value in _sizes(values):
        most = _MOST_LAYERS if "layer" in key else _MOST
        if type(value) is int and not 1 <= value <= most:
            raise refuse(f"{key} {value}: must be a whole number from 1 to {most}", "model.config", value=value)
    for key, value in _everything(values):
        if key in _ROTARY and isinstance(value, int | float) and value <= 0:
            raise refuse(f"{key} {value}: must be greater than 0", "model.config", value=value)
        if not spec.trust_remote_code and key.endswith(_IMPLEMENTATION) and "/" in str(value):
            raise refuse(
                f"{key} {value!r}: is code from the hub, which is not run unless you have read it and set "
                "model.trust_remote_code: true; model.attention chooses among transformers' own",
                "model.config",
            )
    if "auto_map" in (spec.config or {}) and not spec.trust_remote_code:
        raise refuse(
            "auto_map: names code that comes with a checkpoint, which is not run unless you have read it and set "
            "model.trust_remote_code: true",
            "model.config",
        )


def _sizes(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The sizes that are given, under the common name or the architecture's own (GPT-2: `n_embd`)."""
    kind = values.get("model_type")
    own = CONFIG_MAPPING[kind].attribute_map if isinstance(kind, str) and kind in CONFIG_MAPPING else {}
    for name in _SIZES:
        for key in dict.fromkeys((name, own.get(name, name))):
            if key in values:
                yield key, values[key]


def _everything(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a description, those of sections inside it too."""
    for key, value in values.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _everything(value)
