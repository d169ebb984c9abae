"""Watch a model's own forward: its layers are replaced by recorders that only note what they are given."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.models.causal_lm.network.skeleton import allocate, initialize


class _Handed:
    """Stand for what a layer returns beside hidden states (attention, caches, routers' logits)."""


_HANDED = _Handed()


@dataclass
class LayerCall:
    """Hold what the model's own code gave one layer beside the hidden states."""

    index: int
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    #: Among these was what the layer before returned beside hidden states; None stands for it.
    handed: bool = False


class Recording(nn.Module):
    """Run the owner's own forward with layers that only take notes and weights that do nothing.

    Holds no parameter with memory; the buffers of rotary modules lie on `device`.
    """

    def __init__(
        self, model: PreTrainedModel, owner: str, layers: str, tuples: bool, device: str | torch.device
    ) -> None:
        super().__init__()
        self._tuples = tuples
        self.calls: list[LayerCall] = []
        #: Children with weights, and those without, as they were called: name, layers before it, what it was given and
        #: what it gave.
        self.weighted: list[tuple[str, int, Tensor | None, Any]] = []
        self.weightless: list[tuple[str, int, Tensor | None, Any]] = []
        self.owner = _without_layer_weights(model, owner, layers).eval()
        for name, child in self.owner.named_children():
            if name == layers.rpartition(".")[2]:
                for index, layer in enumerate(cast("nn.ModuleList", child)):
                    layer.forward = self._recorder(index)
            elif has_weights(child):
                child.forward = self._stub(name, child)
            else:
                # Children of the meta copy: only those without parameters (rotary and the like) get memory.
                real = allocate(child, model, device)
                real.forward = self._watched(name, real.forward)
                self.owner.add_module(name, real)
        for name, parameter in list(self.owner._parameters.items()):
            if parameter is not None:
                # A few numbers: what they do to hidden states shows, and what they are is nobody's business here.
                self.owner._parameters[name] = nn.Parameter(torch.ones_like(parameter, device=device), False)
        # Buffers that the owner itself holds.
        for name, buffer in list(self.owner._buffers.items()):
            if buffer is not None:
                self.owner._buffers[name] = torch.empty_like(buffer, device=device)
        if self.owner._non_persistent_buffers_set:
            initialize(model, self.owner)

    def _recorder(self, index: int) -> Callable[..., Any]:
        def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            own = [None if value is _HANDED else value for value in (*args, *kwargs.values())]
            handed = any(value is _HANDED for value in (*args, *kwargs.values()))
            named = dict(zip(kwargs, own[len(args) :], strict=True))
            self.calls.append(LayerCall(index, hidden_states, tuple(own[: len(args)]), named, handed))
            return (hidden_states, _HANDED) if self._tuples else hidden_states

        return note

    def _stub(self, name: str, child: nn.Module) -> Callable[..., Tensor]:
        """Return, instead of calling a child with weights, what it is given, or zeros as wide as what it would make."""
        embeds, columns = isinstance(child, nn.Embedding), width(child)
        makes = child.out_features if isinstance(child, nn.Linear) else None

        def stub(*args: Any, **kwargs: Any) -> Tensor:
            given = _first_tensor(args, kwargs)
            self.weighted.append((name, len(self.calls), given, given))
            if embeds or given is None:
                device = None if given is None else given.device
                return torch.zeros(columns, device=device, dtype=self._dtype)
            return given if makes in (None, given.shape[-1]) else given.new_zeros((*given.shape[:-1], makes))

        return stub

    def _watched(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Run a child without weights as it is. Some norms have none."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.weightless.append((name, len(self.calls), _first_tensor(args, kwargs), output))
            return output

        return watched

    @torch.no_grad()
    def run(self, embedded: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Any:
        """Run the owner on (B, T, D); returns its output. Notes are in `calls`, in order."""
        self.forget()
        self._dtype = embedded.dtype
        given: dict[str, Any] = {
            "inputs_embeds": embedded,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "use_cache": False,
        }
        accepted = accepts(self.owner, given)
        return self.owner(**accepted)

    def forget(self) -> None:
        """Drop the notes, and with them the tensors of a batch."""
        self.calls.clear()
        self.weighted.clear()
        self.weightless.clear()


def accepts(module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `given` that the module's forward takes."""
    parameters = inspect.signature(module.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)


def has_weights(module: nn.Module) -> bool:
    """Return whether a module or anything in it has parameters."""
    return any(True for _ in module.parameters())


def width(module: nn.Module) -> int:
    """Return the columns of the first weight."""
    return next(module.parameters()).shape[-1]


def _without_layer_weights(model: PreTrainedModel, owner: str, layers: str) -> nn.Module:
    """Copy the owner to the meta device; its layers keep their settings and lose their submodules."""
    source = model.get_submodule(owner)
    memo: dict[int, Any] = {}
    for layer in cast("nn.ModuleList", model.get_submodule(layers)):
        bare = copy.copy(layer)
        bare._modules, bare._parameters, bare._buffers = {}, {}, {}
        memo[id(layer)] = bare
    return copy.deepcopy(source, memo)
