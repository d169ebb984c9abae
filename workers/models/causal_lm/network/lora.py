"""Low-rank adapters (peft) inside a built part; merged into ordinary weights when a stage commits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from workers.distributed.sharded import gathered, is_sharded
from workers.models.causal_lm.errors import refuse, require
from workers.models.causal_lm.network.parts import Embed, Head
from workers.models.causal_lm.network.quantized import dequantized, is_quantized, is_transposed
from workers.seeds import derive_seed
from workers.specs.language import LoraSpec

_ADAPTER = "default"


def add_lora(part: nn.Module, lora: LoraSpec, seed: int, lm_head: bool = False) -> nn.Module:
    """Put adapters on a part's linear layers and freeze everything else; changes and returns the part.

    Decoder layers get them on `lora.targets`, the head on its LM head where `lm_head` is set, the embedding never.
    Adapters are float32 and drawn from the seed and their own names: the same on every device and beside whatever
    other parts. At first they change nothing (B is zero). ConfigError when no target is found.
    """
    require("peft", "train.lora", "train.lora")
    from peft import LoraConfig, inject_adapter_in_model

    targets = _targets(part, lora, lm_head)
    part.requires_grad_(False)
    # peft wants to be told; its layers look at what they are put on.
    for mark in ("is_loaded_in_8bit", "is_loaded_in_4bit"):
        setattr(part, mark, True)
    if not targets:
        return part
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float does as well: it is only divided by the rank
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        fan_in_fan_out=all(type(part.get_submodule(name)).__name__ == "Conv1D" for name in targets),
    )
    inject_adapter_in_model(config, part, adapter_name=_ADAPTER)
    for name, parameter in part.named_parameters():
        adapts = "lora_" in name
        parameter.requires_grad_(adapts)
        if adapts:
            parameter.data = _initial(name, parameter, seed).to(parameter.device)
    return part


def _targets(part: nn.Module, lora: LoraSpec, lm_head: bool) -> list[str]:
    if isinstance(part, Embed):
        return []
    linear = [name for name, module in part.named_modules() if is_linear(module)]
    if isinstance(part, Head):
        return linear if lm_head else []
    chosen = [name for name in linear if lora.adapts(name)]
    if not chosen and lora.targets != "all-linear":
        short = sorted({name.rpartition(".")[2] for name in linear})
        raise refuse(
            f"no linear layer is called {', '.join(lora.targets)}; allowed: all-linear, or some of {', '.join(short)}",
            "train.lora.targets",
            value=list(lora.targets),
            allowed=short,
        )
    return chosen


def is_linear(module: nn.Module) -> bool:
    """Tell whether this is a linear layer that an adapter can go on."""
    # transformers' Conv1D (GPT-2) is a linear layer with its matrix the other way round; peft knows it too.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _initial(name: str, parameter: Tensor, seed: int) -> Tensor:
    """peft's own start: A uniform as in nn.Linear, B zero."""
    value = torch.zeros(parameter.shape, dtype=torch.float32)
    if "lora_A" in name:
        generator = torch.Generator().manual_seed(derive_seed(seed, "lora", name))
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


def trainable(part: nn.Module) -> dict[str, nn.Parameter]:
    """The part's parameters that get gradients, by name."""
    return {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def merged_state(part: nn.Module) -> dict[str, Tensor]:
    """The part's state under its ordinary names with adapters added into the matrices they belong to.

    Sums are made in float32 and rounded once to the matrix's own type. Matrices in few bits (QLoRA) come as the
    rounded ones that were trained on, in the type they had before. The part itself is left as it is; tensors without
    adapters are its own, not copies. Of sharded ones all ranks must ask, and the first gets them, as `gathered` gives
    them.
    """
    adapters: dict[str, Any] = {
        f"{name}.weight": module for name, module in part.named_modules() if hasattr(module, "get_delta_weight")
    }
    state: dict[str, Tensor] = {}
    for name, tensor in _whole(part).items():
        plain = name.replace(".base_layer.", ".")
        adapter = adapters.get(plain)
        tensor = gathered(tensor)
        if adapter is not None and _ADAPTER in adapter.lora_A:
            delta = _delta(adapter).float()
            if is_transposed(adapter.get_base_layer()):
                delta = delta.t()
            # Only the first rank has both.
            tensor = (tensor.float() + delta).to(tensor.dtype) if delta.numel() else tensor
        state[plain] = tensor
    return state


@torch.no_grad()
def adapter_state(part: nn.Module) -> dict[str, Tensor]:
    """The adapters of a part alone: float32 `<linear>.lora_A.weight` (rank, in) and `<linear>.lora_B.weight`
    (out, rank) of every linear layer that has one, as peft's files name them. Of sharded ones all ranks must ask, and
    the first gets them, as `gathered` gives them."""
    found: dict[str, Tensor] = {}
    for name, module in part.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        adapter: Any = module
        for side, matrices in (("lora_A", adapter.lora_A), ("lora_B", adapter.lora_B)):
            if _ADAPTER in matrices:
                found[f"{name}.{side}.weight"] = gathered(matrices[_ADAPTER].weight)
    return found


def _delta(adapter: Any) -> Tensor:
    """What an adapter adds to its matrix; of a sharded one on the first rank alone, as peft computes it."""
    down, up = (each[_ADAPTER].weight for each in (adapter.lora_A, adapter.lora_B))
    if not (is_sharded(down) or is_sharded(up)):
        made: Tensor = adapter.get_delta_weight(_ADAPTER)
        return made
    down, up = gathered(down), gathered(up)
    if not down.numel():
        return down
    product = up @ down
    return (product.t() if adapter.fan_in_fan_out else product) * float(adapter.scaling[_ADAPTER])


def _whole(part: nn.Module) -> dict[str, Tensor]:
    """The part's state without adapters, matrices in few bits made whole; without what belongs to the packing."""
    packed = [name for name, module in part.named_modules() if is_quantized(module)]
    state = {name: tensor for name, tensor in part.state_dict().items() if ".lora_" not in name}
    for name in packed:
        module = part.get_submodule(name)
        own = {key for key in state if key.startswith(f"{name}.")}
        for key in own - {f"{name}.weight", f"{name}.bias"}:
            del state[key]
        state[f"{name}.weight"] = dequantized(module)
    return state
