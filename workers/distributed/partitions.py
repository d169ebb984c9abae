"""Read and write this rank's part of parameters that ZeRO-3 has split: flat float32, padded to equal lengths. Needs no
DeepSpeed to tell that a tensor is no such parameter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from workers.distributed.swap_files import read_numbers, write_numbers


def is_partitioned(tensor: Any) -> bool:
    return hasattr(tensor, "ds_id")


def numel(parameter: Any) -> int:
    """Count the elements of the whole parameter."""
    return int(parameter.ds_numel)


@dataclass(frozen=True)
class Stretch:
    """Where this rank's part of a trained parameter lies in the flat pieces of DeepSpeed's optimizer, which are in
    memory, or in files between updates."""

    optimizer: Any
    index: int
    start: int
    length: int

    @property
    def piece(self) -> Tensor:
        """The float32 weights that updates change; empty while they are in a file."""
        return cast("Tensor", self.optimizer.fp32_partitioned_groups_flat[self.index])

    def read(self, flat: Tensor) -> Tensor:
        """Copy this stretch of the weights, or of a state."""
        path = self._file(flat)
        if path is None:
            return flat.narrow(0, self.start, self.length).detach().clone()
        return read_numbers(path, self.start, self.length)

    def write(self, values: Tensor) -> None:
        """Change this stretch of the weights."""
        path = self._file(self.piece)
        if path is None:
            self.piece.data.narrow(0, self.start, self.length).copy_(values)
        else:
            write_numbers(path, self.start, values)

    def _file(self, flat: Tensor) -> str | None:
        """Name the file that a piece, or its state, is in; None where it is in memory."""
        if not self.optimizer._swappable_optimizer_subgroup(self.index):
            return None
        piece: Any = self.piece
        kept = self.optimizer.optimizer_swapper.swap_params_info[piece.ds_id]
        return next((str(each.swap_path) for each in kept.tensors if each.compute_tensor is flat), None)


def stretch(parameter: Any) -> Stretch:
    """Find where updates change this rank's part of a trained parameter."""
    optimizer = parameter._z3_optimizer
    index, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return Stretch(optimizer, int(index), int(start), int(length))


@contextmanager
def at_hand(optimizer: Any, index: int) -> Iterator[Tensor]:
    """Have a flat piece, and its state, in memory while they are worked with."""
    piece = optimizer.fp32_partitioned_groups_flat[index]
    if not optimizer._swappable_optimizer_subgroup(index):
        yield piece
        return
    optimizer._optimizer_states_and_gradient_swap_in(index)
    yield piece
    optimizer._optimizer_states_and_gradient_swap_out(index)


def own(parameter: Any) -> Tensor:
    """Copy what this rank has of a parameter: of a trained one what updates change."""
    if _updated(parameter):
        place = stretch(parameter)
        return place.read(place.piece)
    path = _file(parameter)
    return parameter.ds_tensor.data.detach().clone() if path is None else read_numbers(path, 0, _length(parameter))


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
    length = _length(parameter)
    mine = value.new_zeros(length)
    start = dist.get_rank() * length
    flat = value.reshape(-1)[start : start + length]
    mine[: flat.numel()] = flat
    return mine


def put(parameter: Any, part: Tensor) -> None:
    """Write this rank's part back, where updates change it and where it is gathered from."""
    if _updated(parameter):
        stretch(parameter).write(part)
    path = _file(parameter)
    if path is None:
        parameter.ds_tensor.data.copy_(part)
    else:
        write_numbers(path, 0, part)


def _updated(parameter: Any) -> bool:
    return bool(parameter.requires_grad and hasattr(parameter, "_z3_optimizer"))


def _length(parameter: Any) -> int:
    return int(parameter.ds_tensor.ds_numel)


def _file(parameter: Any) -> str | None:
    """Name the file that this rank's part is gathered from; None where it is in memory."""
    if parameter.ds_tensor.status.name != "NOT_AVAILABLE":
        return None
    return str(parameter.nvme_swapper.get_path(parameter, must_exist=True))
