"""Which modules of a text classifier are its embedding, its layers and its head, found by watching its own forward.

The network runs once on the meta device, where nothing is computed: what enters a layer, what a layer gives, and which
modules run before the first and after the last one tells whether it is a chain. No list of names.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from cache_store.errors import first_line
from workers.models.causal_lm.errors import refuse

#: Samples and tokens of the pass that is watched: both odd, so that nothing is a size by chance.
_BATCH, _TOKENS = 3, 7
#: What a forward may take of a batch, as transformers calls it.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Structure:
    """Paths of modules inside the network."""

    #: The list of layers, and how many it has.
    layers: str
    count: int
    #: Modules with weights that run before the first layer, and after the last one.
    front: tuple[str, ...]
    back: tuple[str, ...]
    #: Modules without weights that run before the first layer and draw random numbers.
    drawing: tuple[str, ...]
    #: Layers return a tuple of so many that begins with the hidden states; 0: hidden states.
    tuples: int
    #: Width of the hidden states.
    hidden: int
    #: Those of `INPUTS` that the forward takes.
    inputs: tuple[str, ...]


class _NothingSpecial(TorchFunctionMode):
    """Answers yes where a forward asks something of elements that there are none of: that all tokens are seen, that no
    documents are packed. What a network does with padding is tried with numbers before it trains."""

    def __torch_function__(self, function: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = args[0] if args else None
        asked = function in (Tensor.__bool__, Tensor.item, Tensor.__contains__)
        if asked and isinstance(given, Tensor) and given.is_meta:
            return function is not Tensor.__contains__
        return function(*args, **(kwargs or {}))


@dataclass
class _Seen:
    """What one pass showed."""

    #: Of every call of a layer: its index, what it was given first, what else, and what it gave.
    calls: list[tuple[int, Any, list[Tensor], Any]] = field(default_factory=list)
    #: Path of every other module that was called -> layers that had run before.
    ran: dict[str, set[int]] = field(default_factory=dict)


def find_structure(model: PreTrainedModel) -> Structure:
    """Find the parts of a network on the meta device. ConfigError that says why it is no chain."""
    try:
        return _found(model)
    except _NoChainError as error:
        name = model.config.model_type
        raise refuse(f"{name!r} is no chain of embedding, layers and head: {error}", "model.config") from error


class _NoChainError(Exception):
    """Why there is no chain, in words."""


def _found(model: PreTrainedModel) -> Structure:
    path = _layers(model)
    layers = cast("nn.ModuleList", model.get_submodule(path))
    inputs = tuple(name for name in INPUTS if name in inspect.signature(type(model).forward).parameters)
    if "input_ids" not in inputs or "attention_mask" not in inputs:
        raise _NoChainError("its forward takes no input_ids and attention_mask")
    seen = _watched(model, path)
    if [index for index, *_ in seen.calls] != list(range(len(layers))):
        raise _NoChainError("its layers do not run once each, in order")
    outputs = [_first(output) for *_, output in seen.calls]
    first = seen.calls[0][1]
    if not isinstance(first, Tensor) or first.ndim != 3 or first.shape[:2] != (_BATCH, _TOKENS):
        raise _NoChainError("its layers are not given a hidden state for every token")
    if any(call[1] is not output for call, output in zip(seen.calls[1:], outputs, strict=False)):
        raise _NoChainError("something changes the hidden states between its layers")
    if any(not isinstance(output, Tensor) or output.shape != first.shape for output in outputs):
        raise _NoChainError("its layers do not give hidden states of one shape")
    if any(tensor.requires_grad for _, _, beside, _ in seen.calls for tensor in beside):
        raise _NoChainError("its layers are given, beside hidden states, what weights outside them make")
    front, back, drawing = _around(model, path, seen)
    _check_weights(model, (*front, path, *back))
    return Structure(
        layers=path,
        count=len(layers),
        front=front,
        back=back,
        drawing=drawing,
        tuples=len(seen.calls[0][3]) if isinstance(seen.calls[0][3], tuple) else 0,
        hidden=first.shape[-1],
        inputs=inputs,
    )


def _layers(model: PreTrainedModel) -> str:
    config = model.config
    count = getattr(config, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False):
        raise _NoChainError("it is an encoder with a decoder")
    if not isinstance(count, int):
        raise _NoChainError("its configuration gives no number of layers")
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [name for name, module in lists.items() if len(module) == count]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        seen = ", ".join(f"{name} of {len(module)}" for name, module in list(lists.items())[:4]) or "none"
        raise _NoChainError(f"{len(outer)} lists of {count} layers were found, exactly one is needed; lists: {seen}")
    return str(outer[0])


def _watched(model: PreTrainedModel, path: str) -> _Seen:
    """Run the network once and take notes."""
    seen = _Seen()
    hooks = []
    for index, layer in enumerate(cast("nn.ModuleList", model.get_submodule(path))):
        hooks.append(layer.register_forward_hook(_noting_layer(seen, index), with_kwargs=True))
    for name, module in model.named_modules():
        if name and not f"{name}.".startswith(f"{path}.") and not path.startswith(f"{name}."):
            hooks.append(module.register_forward_pre_hook(_noting(seen, name)))
    ids = torch.zeros((_BATCH, _TOKENS), dtype=torch.int64, device="meta")
    try:
        with torch.enable_grad(), _NothingSpecial():
            model(input_ids=ids)
    except Exception as error:  # whatever a forward raises at tensors without elements
        words = first_line(error)
        if "meta" in words:
            words = "what it does depends on the elements of tensors"
        raise _NoChainError(f"its forward cannot be followed: {words}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _noting_layer(seen: _Seen, index: int) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [*args, *kwargs.values()]
        named = next((kwargs[name] for name in ("hidden_states", "x") if name in kwargs), None)
        first = args[0] if args else named
        beside = [tensor for value in given if value is not first for tensor in _tensors(value)]
        seen.calls.append((index, first, beside, output))

    return note


def _noting(seen: _Seen, name: str) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.ran.setdefault(name, set()).add(len(seen.calls))

    return note


def _around(model: PreTrainedModel, path: str, seen: _Seen) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The outermost modules beside the layers: those with weights that run before and after them, and those without
    that draw before them."""
    front: list[str] = []
    back: list[str] = []
    drawing: list[str] = []
    count = len(seen.calls)
    way = path.split(".")
    for depth in range(len(way)):
        holder = ".".join(way[:depth])
        for name, child in model.get_submodule(holder).named_children():
            full = f"{holder}.{name}".lstrip(".")
            if name == way[depth] or full not in seen.ran:
                continue
            when = seen.ran[full]
            if not any(True for _ in child.parameters()):
                draws = isinstance(child, nn.Dropout) and 0 in when
                drawing += [full] if draws else []
            elif when == {0}:
                front.append(full)
            elif when == {count}:
                back.append(full)
            else:
                raise _NoChainError(f"{full} runs between its layers")
    if not back or not front:
        raise _NoChainError(f"nothing with weights runs {'after' if front else 'before'} its layers")
    return tuple(front), tuple(back), tuple(drawing)


def _check_weights(model: PreTrainedModel, paths: tuple[str, ...]) -> None:
    """All weights must be inside these parts, each in one of them."""
    names = [name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]]
    kept = [name for name in names if name in model.state_dict()]
    left = [name for name in kept if not any(name.startswith(f"{path}.") for path in paths)]
    if left:
        raise _NoChainError(f"{len(left)} of its weights belong to none of these, first {left[0]!r}")
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next(path for path in paths if name.startswith(f"{path}."))
        if owners.setdefault(id(parameter), owner) != owner:
            raise _NoChainError(f"its parts share {name!r}")


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []
