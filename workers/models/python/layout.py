"""Which axis of a map holds its channels, found by running the part that reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MAPS = 4
_FIRST = (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)


def channels_last(part: nn.Module, given: Tensor) -> bool:
    """Tell whether the maps that a part is given, (B, H, W, C) or (B, C, H, W), have their channels last: the first of
    its layers that reads maps says so. Where none does they are first."""
    if given.ndim != _MAPS:
        return False
    found: list[bool] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == _MAPS and not found:
            found.append(_reads_last(module, args[0]))

    handles = [
        module.register_forward_pre_hook(note)
        for module in part.modules()
        if isinstance(module, (*_FIRST, nn.Linear, nn.LayerNorm))
    ]
    try:
        with torch.no_grad():
            part((given.clone(),))
    finally:
        for handle in handles:
            handle.remove()
    return bool(found) and found[0]


def _reads_last(module: nn.Module, given: Tensor) -> bool:
    if isinstance(module, nn.LayerNorm):
        width = module.normalized_shape[-1]
        # Libraries derive normalizations over the second axis from it.
        plain = type(module).forward is nn.LayerNorm.forward
        return given.shape[-1] == width and (plain or given.shape[1] != width)
    return isinstance(module, nn.Linear)
