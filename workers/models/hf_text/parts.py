"""The parts of a text classifier, each made of the network's own modules: what they compute is its own forward.

`embed` and `head` are copies of the whole network with all other weights taken out. Its own forward runs in both: in
`embed` up to the first layer, in `head` with layers that hand on the hidden states they were given. So whatever the
network does around its layers (positions, pooling, masks of means) stays its own business. A layer is called alone,
with what the network's forward gives it beside the hidden states, which `Frame` finds out once a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.models.base import SequenceParts
from workers.models.causal_lm.network.parts import layer_index, place
from workers.models.causal_lm.network.skeleton import allocate
from workers.models.counting import Shape
from workers.models.hf_text.skeleton import build_skeleton
from workers.models.hf_text.structure import Structure, find_structure
from workers.specs.language import HFTextSpec

Boundary = tuple[Tensor, ...]


@dataclass(frozen=True)
class LayerContext:
    """What the network's own forward gives one layer after the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Context:
    """One batch's context for every part. No parameters, no gradients.

    inputs: what the network's forward takes, by name, int64 (B, T) each. layers: one per layer.
    """

    inputs: Mapping[str, Tensor]
    layers: tuple[LayerContext, ...]


class _Reached(Exception):  # noqa: N818  no error
    """The network's own forward has come to a layer after which nothing is asked of it."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Held:
    """The hidden states that a copy of the network works on while it runs, and the notes that it takes."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.layers: list[LayerContext] = []

    def given(self) -> Tensor:
        if self.hidden is None:
            raise RuntimeError("a part of a text classifier ran outside its own forward")
        return self.hidden


class _Stub(nn.Module):
    """In place of a module that makes hidden states: gives those that are held."""

    def __init__(self, held: _Held) -> None:
        super().__init__()
        self._held = held

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._held.given()


class _Unchanged(nn.Module):
    """In place of a module that must draw no random numbers: its part does that."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def _hand_on(self: Any, *args: Any, **kwargs: Any) -> Any:
    hidden = self._held.given()
    return (hidden, *[None] * (self._tuples - 1)) if self._tuples else hidden


def _stop(self: Any, *args: Any, **kwargs: Any) -> Any:
    hidden = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    raise _Reached(hidden)


def _note(self: Any, *args: Any, **kwargs: Any) -> Any:
    if args:
        args = args[1:]
    else:
        first = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        kwargs = {name: value for name, value in kwargs.items() if name != first}
    self._held.layers.append(LayerContext(args, kwargs))
    if self._last:
        raise _Reached(self._held.given())
    return _hand_on(self)


def _copied(
    model: PreTrainedModel,
    found: Structure,
    layer: Callable[..., Any],
    *,
    stubbed: Iterable[str] = (),
    unchanged: Iterable[str] = (),
    dropped: Iterable[str] = (),
) -> tuple[PreTrainedModel, _Held]:
    """A copy of the network whose layers have no weights and `layer` for a forward, with some modules replaced."""
    held = _Held()
    memo: dict[int, Any] = {}
    layers = cast("nn.ModuleList", model.get_submodule(found.layers))
    for index, own in enumerate(layers):
        bare = copy.copy(own)
        bare._modules, bare._parameters, bare._buffers = {}, {}, {}
        bare._non_persistent_buffers_set = set()
        kind = type(own)
        bare.__class__ = type(kind.__name__, (kind,), {"forward": layer, "__module__": kind.__module__})
        for name, value in (("_held", held), ("_tuples", found.tuples), ("_last", index == len(layers) - 1)):
            object.__setattr__(bare, name, value)
        memo[id(own)] = bare
    for path in stubbed:
        memo[id(model.get_submodule(path))] = _Stub(held)
    for path in unchanged:
        memo[id(model.get_submodule(path))] = _Unchanged()
    for path in dropped:
        memo[id(model.get_submodule(path))] = nn.Identity()
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if isinstance(module, PreTrainedModel) and not any(True for _ in module.parameters()):
            # It asks its weights for their type.
            inner: Any = type(module)
            typed = {"dtype": property(lambda self: torch.float32), "__module__": inner.__module__}
            module.__class__ = type(inner.__name__, (inner,), typed)
    return copied, held


def _with_forward(model: PreTrainedModel, held: _Held, forward: Callable[..., Any]) -> nn.Module:
    """Make `forward(self, boundary, context)` the network's; names in its state stay its own."""
    kind = type(model)
    own = {"forward": forward, "__module__": kind.__module__, "_own_forward": kind.forward}
    model.__class__ = type(kind.__name__, (kind,), own)
    object.__setattr__(model, "_held", held)
    return model


def _embed(self: Any, boundary: Boundary, context: Context) -> Boundary:
    """Token ids int64 (B, T) -> hidden states (B, T, D)."""
    (ids,) = boundary
    try:
        self._own_forward(**{**context.inputs, "input_ids": ids})
    except _Reached as reached:
        return (reached.hidden,)
    raise RuntimeError(f"the forward of {type(self).__name__} did not reach its first layer")


def _head(self: Any, boundary: Boundary, context: Context) -> Tensor:
    """Hidden states (B, T, D) -> scores (B, classes)."""
    (hidden,) = boundary
    self._held.hidden = hidden
    try:
        scores: Tensor = self._own_forward(**context.inputs).logits
    finally:
        self._held.hidden = None
    return scores


class Layer(nn.Module):
    """One encoder layer: hidden states (B, T, D) -> (B, T, D)."""

    def __init__(self, model: PreTrainedModel, found: Structure, index: int) -> None:
        super().__init__()
        self._index, self._path = index, f"{found.layers}.{index}"
        place(self, self._path, copy.deepcopy(model.get_submodule(self._path)))

    def forward(self, boundary: Boundary, context: Context) -> Boundary:
        (hidden,) = boundary
        own = context.layers[self._index]
        output: Any = self.get_submodule(self._path)(hidden, *own.args, **own.kwargs)
        return (output[0] if isinstance(output, tuple) else output,)


class Frame:
    """Makes contexts. Holds the buffers of modules without weights on `device` and nothing else."""

    def __init__(self, model: PreTrainedModel, found: Structure, device: torch.device) -> None:
        shell, self._held = _copied(
            model, found, _note, stubbed=found.front, unchanged=found.drawing, dropped=found.back
        )
        self._shell = allocate(shell, model, device).eval()
        self._inputs, self._width = found.inputs, found.hidden

    @torch.no_grad()
    def __call__(self, value: Tensor, inputs: Mapping[str, Tensor]) -> Context:
        """The context of a batch. `value`: ids (B, T) or hidden states (B, T, D), of which only device and type are
        looked at; `inputs` int64 (B, T): of ids, attention mask and token types those that there are, on any device."""
        device = value.device
        given = {name: inputs[name].to(device, non_blocking=True) for name in self._inputs if name in inputs}
        dtype = value.dtype if value.is_floating_point() else torch.float32
        batch, length = given["input_ids"].shape
        self._held.hidden = torch.zeros((), dtype=dtype, device=device).expand(batch, length, self._width)
        try:
            self._shell(**given)
        except _Reached:
            return Context(given, tuple(self._held.layers))
        finally:
            self._held.hidden, self._held.layers = None, []
        raise RuntimeError(f"the forward of {type(self._shell).__name__} did not reach its last layer")


class HFTextParts(SequenceParts):
    """See `workers.models.base.SequenceParts`."""

    def __init__(self, model: HFTextSpec, classes: int) -> None:
        self._spec = model
        self._model = build_skeleton(model, classes)
        self._found = find_structure(self._model)

    def names(self) -> list[str]:
        return part_names(self._found)

    def state_names(self, part: str) -> list[str]:
        return list(assemble(self._model, self._found, part).state_dict())

    def build(self, part: str, device: torch.device) -> nn.Module:
        return allocate(assemble(self._model, self._found, part), self._model, device).train()

    def boundary(self, blocks: int) -> Mapping[str, Shape]:
        return {"x": (self._found.hidden,)}

    def build_aux(self, source: int, seed: int, device: torch.device, head: Mapping[str, Tensor] | None) -> nn.Module:
        """A copy of the network's own head."""
        if head is None:
            raise ValueError("a local head starts as a copy of the network's own, whose state was not given")
        module = self.build("head", device)
        module.load_state_dict(head, strict=True)
        return module

    def identity(self) -> Any:
        # The names in the states' digests say the depth; the rest of the computation is in the configuration.
        config = {key: value for key, value in (self._spec.config or {}).items() if key != "num_hidden_layers"}
        return {"config": config, "attention": self._spec.attention}

    def context(self, device: torch.device) -> Callable[[Tensor, Mapping[str, Tensor]], Any]:
        return Frame(self._model, self._found, device)


def part_names(found: Structure) -> list[str]:
    """`embed`, the layers in order, `head`."""
    return ["embed", *(f"layer{index}" for index in range(found.count)), "head"]


def assemble(model: PreTrainedModel, found: Structure, name: str) -> nn.Module:
    """The part on the meta device; ValueError for a part the network does not have."""
    if name == "embed":
        return _with_forward(*_copied(model, found, _stop, dropped=found.back), _embed)
    if name == "head":
        return _with_forward(*_copied(model, found, _hand_on, stubbed=found.front, unchanged=found.drawing), _head)
    index = layer_index(name)
    if index >= found.count:
        raise ValueError(f"no part {name!r} in a network of {found.count} layers, layer0 to layer{found.count - 1}")
    return Layer(model, found, index)
