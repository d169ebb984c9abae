"""The parts of a causal LM, built one by one from the model's own modules.

A part's state names are the checkpoint's own (`model.layers.12.self_attn.q_proj.weight`), so the parts' states
together are the state dict of `AutoModelForCausalLM`, untied. Parts are put together on the meta device and only then
allocated: building one never allocates another. `part(boundary, context)` takes and returns a tuple of one tensor.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.device import has_values
from workers.models.causal_lm.network.context import Context, Frame
from workers.models.causal_lm.network.readout import Readout
from workers.models.causal_lm.network.recording import accepts
from workers.models.causal_lm.network.skeleton import allocate, build_skeleton
from workers.models.causal_lm.network.structure import Structure, structure
from workers.specs.language import CausalLMSpec

__all__ = ["Boundary", "Context", "Frame", "build_part", "layer_index", "part_names", "part_state_names"]

Boundary = tuple[Tensor, ...]


class Embed(nn.Module):
    """Token ids int64 (B, T) -> hidden states (B, T, D): the embedding, and what the model does before its layers."""

    def __init__(self, model: PreTrainedModel, found: Structure) -> None:
        super().__init__()
        self._plain = found.plain_embedding
        self._path = found.embedding if self._plain else found.owner
        module = model.get_submodule(self._path)
        self._embedding = found.embedding
        place(self, self._path, copy.deepcopy(module) if self._plain else _front(module, found))

    def matrix(self) -> nn.Parameter:
        """The embedding's weight."""
        return cast("nn.Parameter", self.get_submodule(self._embedding).weight)

    def forward(self, boundary: Boundary, context: Context) -> Boundary:
        (ids,) = boundary
        module = self.get_submodule(self._path)
        if self._plain:
            return (module(ids),)
        given = {"input_ids": ids, "position_ids": context.position_ids, "use_cache": False}
        try:
            module(**accepts(module, given))
        except _Reached as reached:
            return (reached.hidden,)
        raise RuntimeError(f"the forward of {type(module).__name__} did not reach its first layer")


class Layer(nn.Module):
    """One decoder layer: hidden states (B, T, D) -> (B, T, D)."""

    def __init__(self, model: PreTrainedModel, found: Structure, index: int) -> None:
        super().__init__()
        self._index = index
        self._path = f"{found.layers}.{index}"
        place(self, self._path, copy.deepcopy(model.get_submodule(self._path)))
        self._router_logits: list[Tensor] = []

    def watch(self, router: nn.Module, index: int) -> None:
        """Give the router's logits, which are at `index` of what it returns, to the context's routing in train mode."""

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if module.training:
                self._router_logits.append(output[index] if isinstance(output, tuple) else output)

        router.register_forward_hook(note)

    def forward(self, boundary: Boundary, context: Context) -> Boundary:
        (hidden,) = boundary
        own = context.layers[self._index]
        try:
            output: Any = self.get_submodule(self._path)(hidden, *own.args, **own.kwargs)
            if context.routing is not None:
                context.routing.add(self._router_logits)
        finally:
            # Running again in the backward pass ends in the middle of a layer.
            self._router_logits = []
        return (output[0] if isinstance(output, tuple) else output,)


class Head(nn.Module):
    """Final norm and LM head: hidden states (B, T, D) -> Readout at `context.where`; no logits yet."""

    def __init__(self, model: PreTrainedModel, found: Structure) -> None:
        super().__init__()
        self._norm, self._lm_head, self._link = found.norm, found.lm_head, found.link
        for path in (found.norm, found.lm_head):
            place(self, path, copy.deepcopy(model.get_submodule(path)))

    def output_layer(self) -> nn.Module:
        """The LM head. (Not a property: those would hide the modules that carry the checkpoint's names.)"""
        return self.get_submodule(self._lm_head)

    def forward(self, boundary: Boundary, context: Context) -> Readout:
        (hidden,) = boundary
        hidden = hidden.flatten(0, 1)
        if context.where is not None:
            hidden = hidden.index_select(0, context.where)
        hidden, head = self.get_submodule(self._norm)(hidden), self.output_layer()
        if not torch.is_autocast_enabled(hidden.device.type):
            # Some models keep the residual stream in float32; they, too, give the LM head its own type.
            hidden = hidden.to(cast("Tensor", head.weight).dtype)
        return Readout(hidden, head, self._link, context.routing)


def tie(embed: nn.Module | None, head: nn.Module | None) -> None:
    """Make the LM head's matrix the embedding's own, where both are there and hold the same values. ValueError where
    they do not: to take either would change the network."""
    if not isinstance(embed, Embed) or not isinstance(head, Head):
        return
    layer = head.output_layer()
    if has_values(embed.matrix()) and not torch.equal(embed.matrix(), cast("Tensor", layer.weight)):
        raise ValueError("embedding and LM head are to be one matrix, but hold different values")
    layer.weight = embed.matrix()


def place(module: nn.Module, path: str, child: nn.Module) -> None:
    """Register `child` under a dotted path, making the modules on the way."""
    *way, name = path.split(".")
    for step in way:
        if step not in module._modules:
            module.add_module(step, nn.Module())
        module = cast("nn.Module", module._modules[step])
    module.add_module(name, child)


class _Reached(Exception):  # noqa: N818  no error
    """The owner's own forward has come to its first layer."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _reach(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    raise _Reached(hidden_states)


def _front(owner: nn.Module, found: Structure) -> nn.Module:
    """The owner with a first layer that ends its forward, and no other; a final norm with weights is the head's."""
    layers, norm = (path.rpartition(".")[2] for path in (found.layers, found.norm))
    first = copy.copy(next(iter(cast("nn.ModuleList", owner.get_submodule(layers)))))
    first._modules, first._parameters, first._buffers = {}, {}, {}
    first.forward = _reach
    memo: dict[int, Any] = {id(owner.get_submodule(layers)): nn.ModuleList([first])}
    if any(True for _ in owner.get_submodule(norm).parameters()):
        memo[id(owner.get_submodule(norm))] = nn.Identity()
    return copy.deepcopy(owner, memo)


def part_names(spec: CausalLMSpec) -> list[str]:
    """`embed`, the layers in order, `head`."""
    return ["embed", *(f"layer{index}" for index in range(structure(spec).count)), "head"]


def layer_index(name: str) -> int:
    """12 of `layer12`; ValueError for anything else."""
    digits = name.removeprefix("layer")
    if not name.startswith("layer") or not digits.isdecimal():
        raise ValueError(f"{name!r} is no decoder layer; those are called layer0, layer1, …")
    return int(digits)


def assemble(spec: CausalLMSpec, name: str) -> nn.Module:
    """The part on the meta device; ValueError for a part the model does not have."""
    found, model = structure(spec), build_skeleton(spec)
    if name == "embed":
        return Embed(model, found)
    if name == "head":
        return Head(model, found)
    if layer_index(name) >= found.count:
        raise ValueError(f"no part {name!r} in a model of {found.count} layers, layer0 to layer{found.count - 1}")
    return Layer(model, found, layer_index(name))


def part_state_names(spec: CausalLMSpec, name: str) -> list[str]:
    """The names in a part's state dict, the checkpoint's own, without allocating the part."""
    return list(assemble(spec, name).state_dict())


def build_part(spec: CausalLMSpec, name: str, device: str | torch.device = "cpu") -> nn.Module:
    """The part called `name`, in train mode and the master type, allocated on `device` but **not initialised**.

    Parameters hold whatever the memory held: load a state into all of them before use. ConfigError for a model that
    is no chain, ValueError for an unknown part.
    """
    return allocate(assemble(spec, name), build_skeleton(spec), device).train()
