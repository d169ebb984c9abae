"""What autograd really keeps of a module, to compare an outline's `saved_elements` with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def kept_elements(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Elements of the distinct storages autograd keeps, weights and buffers aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes() // tensor.element_size(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module.train()(inputs)
    last = (out if isinstance(out, tuple) else (out,))[-1]
    total = sum(count for count, _ in kept.values())
    if last.untyped_storage().data_ptr() in kept:
        total -= last.numel()  # the reader counts it
    return total
