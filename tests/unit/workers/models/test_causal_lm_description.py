"""Architectures that no decoder has, or that name code of others, are refused before transformers builds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_makers import lm_spec

from cache_store.errors import ConfigError
from workers.models.causal_lm.inspect import inspect
from workers.specs.language import CausalLMSpec


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("llama", {"hidden_size": 0}, "hidden_size 0: must be a whole number from 1 to 16777216"),
        ("llama", {"hidden_size": -64}, "hidden_size -64: must be"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads 0: must be"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads 0: must be"),
        ("llama", {"head_dim": 0}, "head_dim 0: must be"),
        ("llama", {"intermediate_size": 0}, "intermediate_size 0: must be"),
        ("llama", {"vocab_size": 0}, "vocab_size 0: must be"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers 0: must be a whole number from 1 to 10000"),
        ("llama", {"num_hidden_layers": 1_000_000}, "num_hidden_layers 1000000: must be"),
        ("gpt2", {"n_embd": 0}, "n_embd 0: must be"),
        ("gpt2", {"n_layer": 1_000_000}, "n_layer 1000000: must be"),
        ("llama", {"rope_theta": 0}, "rope_theta 0: must be greater than 0"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor 0: must be greater than 0"),
        (
            "llama",
            {"_attn_implementation": "owner/kernel"},
            "_attn_implementation 'owner/kernel': is code from the hub",
        ),
        ("llama", {"experts_implementation": "owner/kernel"}, "experts_implementation 'owner/kernel': is code from"),
        ("llama", {"auto_map": {"AutoConfig": "owner/name--a.B"}}, "auto_map: names code that comes with a checkpoint"),
    ],
)
def test_a_description_that_cannot_be_meant_is_refused(name: str, given: dict[str, Any], message: str) -> None:
    spec = lm_spec(name)
    with pytest.raises(ConfigError) as caught:
        inspect(CausalLMSpec(family="causal_lm", config={**(spec.config or {}), **given}))
    assert caught.value.message.startswith(f"model.config: {message}")


def test_a_checkpoint_cannot_name_a_kernel_of_the_hub(tmp_path: Path) -> None:
    config = {**(lm_spec("llama").config or {}), "attn_implementation": "owner/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is code from the hub"):
        inspect(CausalLMSpec(family="causal_lm", path=str(tmp_path)))
