"""A configuration without some of its layers: their number, and every setting that says something by layer number.

Configurations number layers in several ways: lists with an entry a layer, lists of layer numbers, settings by number,
how many layers at the beginning or the end are of a kind. All of these move along. Periods ("every fourth layer")
cannot: `check_numbering` compares both models without weights and refuses where a layer would become another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.network.skeleton import layer_count_key, number_of_layers

#: Lists of layer numbers, beside those whose names end in `_idxs`, `_indices` or `_ids`.
_NUMBERS = ("mlp_only_layers", "moe_layers", "ple_layer_ids")
#: How many layers at the beginning, or at the end, are of a kind.
_LEADING = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
_TRAILING = ("num_kv_shared_layers",)
#: Number of the last layer of a kind.
_LAST = ("moe_layer_end_index",)
#: The number of layers in a second word, where a configuration has two.
_AGAIN = ("num_blocks",)
#: Parts of the names by which layers call their own number.
_OWN_NUMBER = ("idx", "index", "layer_id", "layer_number")
#: Settings by layer number.
_BY_NUMBER = ("per_layer_config",)


def layer_count(config: dict[str, Any], where: str = "model.config") -> int:
    """Decoder layers of an architecture; ConfigError for the setting `where` when it does not say."""
    count = number_of_layers(config)
    if count is None:
        raise refuse("this model does not say how many layers it has", where)
    return count


def pruned(config: dict[str, Any], prune: Sequence[int]) -> dict[str, Any]:
    """The config without some layers; numbers move along.

    ConfigError for layers the model does not have, or when none is left.
    """
    if not prune:
        return config
    count = layer_count(config, "model.prune")
    outside = sorted(index for index in prune if not 0 <= index < count)
    if outside or len(set(prune)) >= count:
        raise refuse(
            f"{list(prune)} cannot be removed from {count} layers; allowed: different numbers of 0-{count - 1}, at "
            "least one layer left",
            "model.prune",
            value=list(prune),
        )
    kept = [index for index in range(count) if index not in set(prune)]
    result = {name: _moved(name, value, kept, count) for name, value in _spelled_out(config, count).items()}
    key = layer_count_key(config)
    return result if key is None else {**result, key: len(kept)}


def layer_kinds(config: dict[str, Any]) -> list[str]:
    """What the configuration says of every layer by its number: equal texts for layers it does not tell apart."""
    count = number_of_layers(config) or 0
    spelled = _spelled_out(config, count)
    return [repr([_said(name, value, index, count) for name, value in spelled.items()]) for index in range(count)]


def _said(name: str, value: Any, index: int, count: int) -> Any:
    """What one setting says of one layer; None where it says nothing by number."""
    if name in _BY_NUMBER and isinstance(value, dict):
        return {int(number): settings for number, settings in value.items()}.get(index)
    if isinstance(value, list):
        if _is_numbers(name, value, count):
            return index in value
        return value[index] if _is_by_layer(name, value, count) else None
    if type(value) is not int:
        return None
    if name in _LEADING:
        return index < value
    if name in _TRAILING:
        return index >= count - value
    return index <= value if name in _LAST else None


def _spelled_out(config: dict[str, Any], count: int) -> dict[str, Any]:
    """The config with patterns that repeat written out layer by layer, where another key can say so."""
    result = dict(config)
    if isinstance(config.get("block_types"), list) and config["block_types"]:  # RecurrentGemma: repeated to the end
        pattern = config["block_types"]
        result["block_types"] = [pattern[index % len(pattern)] for index in range(count)]
    if isinstance(config.get("attention_types"), list):  # GPT-Neo: [[[kind, kind], repeats]]
        result["attention_types"] = [
            [[kind], 1] for kinds, repeats in config["attention_types"] for _ in range(repeats) for kind in kinds
        ]
    step, dense = config.get("decoder_sparse_step"), config.get("mlp_only_layers")
    if isinstance(step, int) and step > 1 and isinstance(dense, list):
        result["mlp_only_layers"] = [n for n in range(count) if n in dense or (n + 1) % step]
        result["decoder_sparse_step"] = 1
    return result


def _moved(name: str, value: Any, kept: list[int], count: int) -> Any:
    """A setting of the whole model as one of what is left of it."""
    new = {old: index for index, old in enumerate(kept)}
    if name in _BY_NUMBER and isinstance(value, dict):
        return {str(new[int(old)]): settings for old, settings in value.items() if int(old) in new}
    if isinstance(value, list):
        if _is_numbers(name, value, count):
            return [new[old] for old in value if old in new]
        return [value[old] for old in kept] if _is_by_layer(name, value, count) else value
    if type(value) is not int:
        return value
    if name in _AGAIN and value == count:
        return len(kept)
    if name in _LEADING:
        return sum(old < value for old in kept) + max(0, value - count)
    if name in _TRAILING:
        return sum(old >= count - value for old in kept)
    return sum(old <= value for old in kept) - 1 if name in _LAST and value >= 0 else value


def _is_numbers(name: str, value: list[Any], count: int) -> bool:
    named = name in _NUMBERS or ("token" not in name and name.endswith(("_idxs", "_indices", "_layer_ids")))
    return named and all(type(entry) is int and 0 <= entry < count for entry in value)


def _is_by_layer(name: str, value: list[Any], count: int) -> bool:
    """Lists with an entry a layer: layer_types, no_rope_layers, mlp_layer_types, intermediate_size, indexer_types …"""
    named = "layer" in name or name.endswith(("_types", "_pattern", "intermediate_size"))
    return named and len(value) == count


def check_numbering(whole: PreTrainedModel, left: PreTrainedModel, layers: str, kept: Sequence[int]) -> None:
    """ConfigError unless every layer of `left` is as the one of `whole` that it comes from.

    whole, left: models without weights. layers: path of the list of layers in both. kept: numbers in `whole`.
    """
    before = list(cast("nn.ModuleList", whole.get_submodule(layers)))
    after = list(cast("nn.ModuleList", left.get_submodule(layers)))
    by_number = [key for key, value in whole.config.to_dict().items() if "layer_idx" in key and value is True]
    for new, old in enumerate(kept):
        difference = _difference(signature(before[old]), signature(after[new]))
        if difference is None and by_number and new != old:
            difference = by_number[0]
        if difference is not None:
            raise refuse(
                f"without these layers, layer {old} of {whole.config.model_type!r} would become layer {new}, which is "
                f"another one ({difference}): its configuration says what a layer is by its number, in a way that "
                "cannot be moved",
                "model.prune",
            )


def signature(layer: nn.Module) -> dict[str, Any]:
    """What a layer is, but for its weights' values: modules, shapes and plain settings. The number that it, or a module
    inside it, calls itself by is left out."""
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        found[path] = type(module).__qualname__
        for name, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str | type(None))
            is_number = type(value) is int and any(word in name for word in _OWN_NUMBER)
            if plain and not is_number and name != "training" and not name.startswith("_"):
                found[f"{path}.{name}"] = value
    found |= {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    return found


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    differing = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return differing[0].lstrip(".") if differing else None
