"""Frozen parts whose weights lie in the host's memory and come to the device one after the other, while it computes.

A part's weights are there while it runs, the next part's are on their way: two parts at a time, however many there are.
Where gradients flow through a part, the path runs it again in the backward pass (`saved_activations`), for which it
asks for its weights again, now in reverse order. So autograd keeps no weight, and results have the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from workers.transfers import Copy, Transfers


class HostBlocks:
    """The frozen parts of one path that lie on the host. Add them in forward order; call `begin` before every pass."""

    def __init__(self, device: torch.device) -> None:
        self._transfers = Transfers(device)
        self._blocks: list[HostBlock] = []
        #: Weights on their way, by the number of their part: of one part, but for a moment.
        self._coming: dict[int, Copy] = {}
        #: Parts that will run again in the backward pass.
        self._returning: set[int] = set()
        self._last = -1

    def add(self, part: nn.Module) -> nn.Module:
        """Take a part with its weights, wherever they are; give what stands for it in the path."""
        old = _tensors(part)
        held = self._transfers.to_host(tensor.detach() for tensor in old.values()).result()
        _replace(part, {id(tensor): _like(tensor, on_host) for tensor, on_host in zip(old.values(), held, strict=True)})
        block = HostBlock(part, self, len(self._blocks))
        self._blocks.append(block)
        return block

    def tensors(self) -> list[Tensor]:
        """List all weights and buffers on the host."""
        return [tensor for block in self._blocks for tensor in block.tensors.values()]

    def begin(self) -> None:
        """Let the first part's weights come: a forward pass begins."""
        self._coming.clear()
        self._returning.clear()
        self._last = -1
        self._let_come(0)

    def weights(self, number: int, *, returning: bool) -> tuple[Tensor, ...]:
        """Give the weights of a part on the device, and let those of the next one in the direction of the pass come:
        backward where this part or a later one was asked for last. `returning`: the pass will come back to it."""
        if returning:
            self._returning.add(number)
        backward = self._last >= number
        self._last = number
        if number not in self._coming:
            self._let_come(number)
        copy = self._coming.pop(number)
        if not backward:
            self._let_come(number + 1)
        elif number - 1 in self._returning:
            self._let_come(number - 1)
        return copy.result()

    def _let_come(self, number: int) -> None:
        if number < len(self._blocks):
            self._coming[number] = self._transfers.to_device(self._blocks[number].tensors.values())


class HostBlock(nn.Module):
    """A frozen part of a path, called as the part itself is. It has no parameters: they are not on the device."""

    def __init__(self, part: nn.Module, blocks: HostBlocks, number: int) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule: its weights stay where they are, wherever the path is moved.
        self._held = (part.requires_grad_(False).eval(),)
        self._blocks, self._number = blocks, number
        #: The part's parameters and buffers, on the host.
        self.tensors = _tensors(part)
        #: On the device, for the next run.
        self._brought: tuple[Tensor, ...] | None = None

    @property
    def held(self) -> nn.Module:
        """The part itself, with its weights on the host."""
        return self._held[0]

    def bring_for_both(self) -> None:
        """Bring the weights for a run that the backward pass will repeat, or for its repetition."""
        self._brought = self._blocks.weights(self._number, returning=True)

    def forward(self, *inputs: Any) -> Any:
        brought, self._brought = self._brought, None
        if brought is None:
            brought = self._blocks.weights(self._number, returning=False)
        return functional_call(self.held, dict(zip(self.tensors, brought, strict=True)), inputs)


def carries_gradient(boundary: tuple[Tensor, ...]) -> bool:
    """Tell whether gradients will flow back to a boundary."""
    return any(tensor.requires_grad for tensor in boundary)


def _tensors(part: nn.Module) -> dict[str, Tensor]:
    return {**dict(part.named_parameters()), **dict(part.named_buffers())}


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """A frozen parameter for a parameter, a buffer for a buffer."""
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values


def _replace(part: nn.Module, others: Mapping[int, Any]) -> None:
    """Put other tensors, by the `id` of those there are, in their places."""
    for module in part.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = others[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = others[id(buffer)]
