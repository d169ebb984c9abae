"""Optimizers, learning-rate schedules and mixed precision of one stage."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from workers.distributed.sharded import like, whole_on_host
from workers.specs.experiment import OptimizerSpec


def build_optimizer(spec: OptimizerSpec, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over exactly these parameters (state is never kept for anything frozen)."""
    if spec.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=spec.lr,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
            fused=True,
        )
    if spec.name == "adamw8bit":
        # An extra, and half annotated; its absence is found early.
        bitsandbytes: Any = importlib.import_module("bitsandbytes.optim")
        eight: torch.optim.Optimizer = bitsandbytes.AdamW8bit(
            parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
        )
        return eight
    return torch.optim.AdamW(
        parameters,
        lr=spec.lr,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=True,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The optimizer's state as host tensors named `<parameter>//<key>`, for safetensors. Of sharded parameters
    all ranks must ask, and the first gets it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        # bitsandbytes counts steps in a plain int: int64, where torch's own count is a float32.
        f"{name}//{key}": whole_on_host(torch.as_tensor(value))
        for name, parameter in zip(names, parameters, strict=True)
        # All ranks in the same order: a state that was read from a file has that of the file's index, any order.
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
        if isinstance(value, torch.Tensor | int)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: dict[str, torch.Tensor]) -> None:
    """Put back the state of every named parameter found in `tensors`; others keep a fresh state."""
    state: dict[int, dict[str, torch.Tensor | int]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        prefix = f"{name}//"
        found = {
            key[len(prefix) :]: _plain(like(parameter, value))
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        if found:
            state[index] = found
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    # Files hold contiguous tensors. Fused steps walk parameter and state side by side in memory order, so a
    # channels_last parameter must get its state back in its own layout: the CPU kernel would silently mix elements.
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _plain(value: torch.Tensor) -> torch.Tensor | int:
    """A count of steps that was a plain int is one again: as a tensor it would be cast to the parameter's type."""
    return int(value) if value.ndim == 0 and value.dtype == torch.int64 else value
