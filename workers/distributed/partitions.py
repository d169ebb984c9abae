"""Read and write this rank's part of parameters that ZeRO-3 has split: flat float32, padded to equal lengths. Needs no
DeepSpeed to tell that a tensor is no such parameter."""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def is_partitioned(tensor: Any) -> bool:
    return hasattr(tensor, "ds_id")


def numel(parameter: Any) -> int:
    """Count the elements of the whole parameter."""
    return int(parameter.ds_numel)


def own(parameter: Any) -> Tensor:
    """Copy what this rank has of a parameter: of a trained one what updates change."""
    if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
        found = _api().safe_get_local_fp32_param(parameter)
    else:
        found = parameter.ds_tensor.data
    return cast("Tensor", found).detach().clone()


def whole(parameter: Any, part: Tensor) -> Tensor:
    """Put what all ranks have together. All must ask; the first gets it on the host, the others an empty tensor."""
    part = part.to(parameter.device)
    flat = part.new_empty(dist.get_world_size() * part.numel())
    dist.all_gather_into_tensor(flat, part)
    if dist.get_rank() != 0:
        return torch.empty(0, dtype=part.dtype)
    return flat[: numel(parameter)].view(parameter.ds_shape).to("cpu", copy=True)


def part(parameter: Any, value: Tensor) -> Tensor:
    """Take this rank's part of a whole value that is the same on all ranks."""
    length = int(parameter.ds_tensor.ds_numel)
    mine = value.new_zeros(length)
    start = dist.get_rank() * length
    flat = value.reshape(-1)[start : start + length]
    mine[: flat.numel()] = flat
    return mine


def put(parameter: Any, part: Tensor) -> None:
    """Write this rank's part back, where updates change it and where it is gathered from."""
    if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
        _api().safe_set_local_fp32_param(parameter, part)
    parameter.ds_tensor.data.copy_(part)


def _api() -> Any:
    return importlib.import_module("deepspeed.utils")
