"""The whole architecture of a model, from a config.json, a GGUF file or the user's own description."""

from __future__ import annotations

import json
from typing import Any

from cache_store.errors import first_line
from cache_store.storage.durable import read_json
from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.network.skeleton import DTYPES, build_config, master_dtype, untied
from workers.models.causal_lm.pretrained.description import check_description
from workers.models.causal_lm.pretrained.gguf_file import gguf_config
from workers.models.causal_lm.pretrained.locate import Located
from workers.models.causal_lm.pretrained.numbering import pruned
from workers.specs.language import CausalLMSpec

#: Facts about where a config came from and who wrote it, not about the architecture.
_PASSING = (
    "_name_or_path",
    "_model_name_or_path",
    "_attn_implementation",
    "transformers_version",
    "torch_dtype",
    "architectures",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "chunk_size_feed_forward",
)


#: A config.json has some kilobytes.
_MOST_BYTES = 16 << 20


def stored_config(spec: CausalLMSpec, located: Located | None) -> dict[str, Any]:
    """What the checkpoint says about itself; empty without one. ConfigError when it cannot be read."""
    if located is None:
        return {}
    if located.gguf is not None:
        return gguf_config(located.gguf)
    path = located.folder / "config.json"
    try:
        content = read_json(path, _MOST_BYTES)
    except FileNotFoundError as e:
        ggufs = sorted(file.name for file in located.folder.glob("*.gguf"))
        hint = f"; for {ggufs[0]} set model.gguf" if ggufs else ""
        raise refuse(f"{located.folder} has no config.json{hint}", "model.path", value=spec.path) from e
    except (OSError, ValueError) as e:
        raise refuse(f"{path} cannot be read: {first_line(e)}", "model.path") from e
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise refuse(f"{path} names no model_type", "model.path", value=str(path))
    return content


def whole_config(spec: CausalLMSpec, located: Located | None) -> dict[str, Any]:
    """The architecture as written into tasks and exports: every setting spelled out, pruned, in the master type; tied
    where the checkpoint is and the user's `config` does not say otherwise, which is laid over the checkpoint's.
    ConfigError for whatever does not fit."""
    stored = stored_config(spec, located)
    values = {**stored, **(spec.config or {})}
    if "model_type" not in values:
        raise refuse("is no architecture: a model_type is needed, as in a config.json", "model.config")
    if values.get("quantization_config"):
        raise refuse(
            f"{spec.path} is stored quantized ({values['quantization_config'].get('quant_method', 'unknown')}), which "
            "cannot be trained; take the original checkpoint or a GGUF file",
            "model.path",
        )
    check_description(values, spec)
    config = build_config(values, spec)
    whole: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    named = values.get("dtype") or values.get("torch_dtype")
    for key in _PASSING if spec.trust_remote_code else (*_PASSING, "auto_map"):
        whole.pop(key, None)
    whole["tie_word_embeddings"] = bool(getattr(config, "tie_word_embeddings", False))
    if whole["tie_word_embeddings"] and located is not None and not tied(spec, located):
        raise refuse(
            f"tie_word_embeddings: true, but {spec.path} has an LM head of its own; allowed: false",
            "model.config",
            value=True,
        )
    whole["dtype"] = str(named or "float32").removeprefix("torch.")
    dtype = master_dtype(CausalLMSpec(family="causal_lm", config=whole, master=spec.master))
    whole["dtype"] = next(name for name, known in DTYPES.items() if known is dtype)
    return pruned(whole, spec.prune)


def tied(spec: CausalLMSpec, located: Located | None) -> bool:
    """Whether the checkpoint's LM head is its embedding."""
    stored = stored_config(spec, located)
    return bool(stored) and bool(getattr(build_config(stored, spec), "tie_word_embeddings", False))


def kept_layers(spec: CausalLMSpec, count: int) -> list[int]:
    """Numbers in the checkpoint of the `count` layers that are left, in order."""
    gone = set(spec.prune)
    return [index for index in range(count + len(gone)) if index not in gone]


def config_json(spec: CausalLMSpec, architecture: str) -> bytes:
    """A config.json for a task's spec: whole, naming the class that loads it."""
    return _written({**(spec.config or {}), "architectures": [architecture]})


def config_untied(content: bytes) -> bytes:
    """What `config_json` gave, for a model whose LM head has become another matrix than its embedding."""
    return _written(untied(json.loads(content)))


def _written(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
