"""Gradients leave their parameters as the backward pass makes them, and are added up where updates are computed.

A parameter's gradient is whole when torch calls the hook behind its accumulation: every use of the parameter has given
its share. So nothing has to be kept on the device until the pass is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workers.training.tiers.places import Place
from workers.training.updates.low_precision import in_memory_order

#: What torch calls when a parameter's gradient is whole.
_Hook = Callable[[Tensor], None]


class Carrier(Protocol):
    """What brings gradients from the device to where they are added up."""

    def take(self, gradient: Tensor, total: Tensor, *, add: bool) -> None:
        """Put a gradient (N,) into `total` (N,), or add it, by the time of `finish`."""

    def finish(self) -> None:
        """Return when all that was taken has arrived."""

    def close(self) -> None:
        """Let go of what it works with."""


class DirectCarrier:
    """Between tensors of one machine's memory, at once."""

    def take(self, gradient: Tensor, total: Tensor, *, add: bool) -> None:
        if add:
            total.add_(gradient.to(total.device))
        else:
            total.copy_(gradient)

    def finish(self) -> None:
        """Nothing is on its way."""

    def close(self) -> None:
        """There is nothing to let go of."""


class LeavingGradients:
    """Takes the gradients of `parameters` to those of `copies`, which are updated in their place."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], copies: Sequence[nn.Parameter], place: Place, carrier: Carrier
    ) -> None:
        """`copies`: of the shape and layout of `parameters`; gradients are added up in their type. None is taken of a
        parameter that is its own copy. `place`: where the sums lie."""
        self._carrier = carrier
        both = enumerate(zip(parameters, copies, strict=True))
        self._copies = {index: copy for index, (parameter, copy) in both if parameter is not copy}
        self._sums = {index: place.zeros(copy, copy.dtype) for index, copy in self._copies.items()}
        self._arrived: set[int] = set()
        noted: dict[int, Any] = {index: parameters[index] for index in self._copies}
        self._hooks = [each.register_post_accumulate_grad_hook(self._hook(index)) for index, each in noted.items()]

    def _hook(self, index: int) -> _Hook:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                self._take(index, gradient)

        return take

    def _take(self, index: int, gradient: Tensor) -> None:
        total = self._sums[index]
        if gradient.stride() != total.stride():
            gradient = torch.empty_like(total, dtype=gradient.dtype, device=gradient.device).copy_(gradient)
        add = index in self._arrived
        self._arrived.add(index)
        self._carrier.take(in_memory_order(gradient), in_memory_order(total), add=add)

    @property
    def any(self) -> bool:
        """Whether gradients of a step have been taken that was not finished."""
        return bool(self._arrived)

    def finish(self) -> None:
        """Give the copies their gradients, when all have arrived."""
        self._carrier.finish()
        for index in self._arrived:
            self._copies[index].grad = self._sums[index]

    def clear(self) -> None:
        """Begin a step without gradients."""
        self._arrived.clear()

    def close(self) -> None:
        """Take the hooks off the parameters again."""
        for hook in self._hooks:
            hook.remove()
        self._carrier.close()
