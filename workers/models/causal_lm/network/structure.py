"""Which module of a causal LM is what, found by watching the model's own forward pass.

The skeleton's layers are replaced by recorders and its own forward runs once on two tokens: what enters the first
layer, what passes between layers and what leaves the last one tells whether the model is a chain. No list of names.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from cache_store.errors import ConfigError, first_line
from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.network.link import Link
from workers.models.causal_lm.network.skeleton import allocate, build_skeleton
from workers.specs.language import CausalLMSpec


@dataclass(frozen=True)
class Structure:
    """Paths of modules inside the causal LM."""

    #: The module whose forward runs the layers, and its list of layers.
    owner: str
    layers: str
    count: int
    embedding: str
    norm: str
    lm_head: str
    #: False: something lies between the embedding and the first layer (positions, a factor, dropout).
    plain_embedding: bool
    #: Layers return a tuple that begins with the hidden states.
    tuples: bool
    #: The model's own masks keep packed documents (restarting positions) apart.
    isolates: bool
    link: Link


@dataclass
class LayerCall:
    """What the model's own code gave one layer beside the hidden states."""

    index: int
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recording(nn.Module):
    """The owner's own forward with layers that only take notes and weights that do nothing.

    Holds no parameter with memory; the buffers of rotary modules lie on `device`.
    """

    def __init__(
        self, model: PreTrainedModel, owner: str, layers: str, tuples: bool, device: str | torch.device
    ) -> None:
        super().__init__()
        self._tuples = tuples
        self.calls: list[LayerCall] = []
        #: Modules with weights, in the order they were called, and what they were given.
        self.weighted: list[tuple[str, int, Tensor | None]] = []
        self.owner = _without_layer_weights(model, owner, layers).eval()
        for name, child in self.owner.named_children():
            if name == layers.rpartition(".")[2]:
                for index, layer in enumerate(cast("nn.ModuleList", child)):
                    layer.forward = self._recorder(index)
            elif any(True for _ in child.parameters()):
                child.forward = self._stub(name, isinstance(child, nn.Embedding), _width(child))
            else:
                # Children of the meta copy: only those without parameters (rotary and the like) get memory.
                self.owner.add_module(name, allocate(child, model, device))
        # Buffers that the owner itself holds.
        for name, buffer in list(self.owner._buffers.items()):
            if buffer is not None:
                self.owner._buffers[name] = torch.empty_like(buffer, device=device)
        if self.owner._non_persistent_buffers_set:
            model._init_weights(self.owner)  # type: ignore[no-untyped-call]

    def _recorder(self, index: int) -> Callable[..., Any]:
        def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(LayerCall(index, hidden_states, args, kwargs))
            return (hidden_states, None) if self._tuples else hidden_states

        return note

    def _stub(self, name: str, embeds: bool, width: int) -> Callable[..., Tensor]:
        def stub(*args: Any, **kwargs: Any) -> Tensor:
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            self.weighted.append((name, len(self.calls), given))
            if embeds or given is None:
                device = None if given is None else given.device
                return torch.zeros(width, device=device, dtype=self._dtype)
            return given

        return stub

    @torch.no_grad()
    def run(self, embedded: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Any:
        """Run the owner on (B, T, D); returns its output. Notes are in `calls`, in order."""
        self.calls.clear()
        self.weighted.clear()
        self._dtype = embedded.dtype
        given: dict[str, Any] = {
            "inputs_embeds": embedded,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "use_cache": False,
        }
        accepted = accepts(self.owner, given)
        return self.owner(**accepted)


def accepts(module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `given` that the module's forward takes."""
    parameters = inspect.signature(module.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}


def _width(module: nn.Module) -> int:
    return next(module.parameters()).shape[-1]


def _without_layer_weights(model: PreTrainedModel, owner: str, layers: str) -> nn.Module:
    """A copy of the owner on the meta device; its layers keep their settings and lose their insides."""
    source = model.get_submodule(owner)
    memo: dict[int, Any] = {}
    for layer in cast("nn.ModuleList", model.get_submodule(layers)):
        bare = copy.copy(layer)
        bare._modules, bare._parameters, bare._buffers = {}, {}, {}
        memo[id(layer)] = bare
    return copy.deepcopy(source, memo)


@dataclass
class _Search:
    """One search through a skeleton; every step raises the ConfigError that says what was not found."""

    model: PreTrainedModel
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.model.config.model_type

    def fail(self, problem: str) -> Exception:
        return refuse(f"{self.name!r} is no chain of embedding, layers, norm and LM head: {problem}")

    def path(self, module: nn.Module | None, what: str) -> str:
        for name, candidate in self.model.named_modules():
            if candidate is module:
                return str(name)
        raise self.fail(f"no {what} was found")

    def layers(self) -> tuple[str, int]:
        config = self.model.config
        if getattr(config, "is_encoder_decoder", False):
            raise self.fail("it is an encoder with a decoder")
        count = getattr(config, "num_hidden_layers", None)
        if not isinstance(count, int):
            raise self.fail(
                "no number of decoder layers was found; of a multimodal model take the text model's own config"
            )
        found = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count and len({type(m) for m in module}) == 1
        ]
        outer = [name for name in found if not any(name.startswith(other + ".") for other in found)]
        if len(outer) != 1:
            raise self.fail(f"{len(outer)} lists of {count} decoder layers were found; exactly one is needed")
        return outer[0], count

    def watch(self, owner: str, layers: str, count: int, embedding: str) -> tuple[str, bool, bool]:
        """Path of the final norm, whether the embedding goes into the first layer as it is, and whether layers
        return tuples: both ways are tried."""
        try:
            return *self._watch(owner, layers, count, embedding, tuples=False), False
        except ConfigError as first:
            try:
                return *self._watch(owner, layers, count, embedding, tuples=True), True
            except ConfigError:
                raise first from None

    def _watch(self, owner: str, layers: str, count: int, embedding: str, tuples: bool) -> tuple[str, bool]:
        recording = Recording(self.model, owner, layers, tuples, "cpu")
        width = _width(self.model.get_submodule(embedding))
        inside = {name for name, child in recording.owner.named_children() if embedding in (f"{owner}.{name}", name)}
        notes = []
        for value in (0.0, 1.0):
            embedded = torch.full((1, 2, width), value)
            # In train mode dropout between embedding and layers shows; the probe's own random numbers do not matter.
            recording.owner.train()
            with torch.random.fork_rng(devices=[]):
                try:
                    output = recording.run(embedded, torch.arange(2)[None], None)
                except Exception as e:
                    raise self.fail(f"its forward cannot be followed: {first_line(e)}") from e
            notes.append((embedded, list(recording.calls), list(recording.weighted), output))
        embedded, calls, weighted, output = notes[-1]
        self._one_after_the_other(calls, count)
        if not _alike(notes[0][1], calls):
            raise self.fail("its layers are given more of the tokens than the hidden states")
        after = [(name, given) for name, done, given in weighted if done == count]
        last = calls[-1].hidden
        if len(after) != 1 or not _is(after[0][1], last) or not _is(_last(output), last):
            raise self.fail("no single final norm was found after the last layer")
        before = {name for name, done, _ in weighted if done < count} - inside
        plain = not before and calls[0].hidden is embedded
        return f"{owner}.{after[0][0]}".lstrip("."), plain

    def isolates(self, owner: str, layers: str, tuples: bool, width: int) -> bool:
        """Whether the masks of two documents of two tokens in one row hide the first from the second."""
        recording = Recording(self.model, owner, layers, tuples, "cpu")
        try:
            recording.run(torch.zeros((1, 4, width)), torch.tensor([[0, 1, 0, 1]]), None)
        except Exception as e:
            raise self.fail(f"its forward cannot be followed: {first_line(e)}") from e
        return all(any(_hides(t) for t in _tensors([call.args, call.kwargs])) for call in recording.calls)

    def _one_after_the_other(self, calls: list[LayerCall], count: int) -> None:
        if [call.index for call in calls] != list(range(count)):
            raise self.fail("its layers do not run once each, in order")
        if not all(_is(call.hidden, calls[0].hidden) for call in calls):
            raise self.fail("something changes the hidden states between its layers")

    def link(self, owner: str, lm_head: str) -> Link:
        """What the model's forward does with hidden states before, and with logits after its LM head."""
        model = self.model
        hidden = torch.ones((1, 1, _width(model.get_submodule(lm_head))), dtype=torch.float64)
        scores = torch.tensor([-1e9, -1e-3, 0.0, 1e-3, 1.0, 3.0, 1e9], dtype=torch.float64)[None, None]
        seen: list[Tensor] = []

        def head(given: Tensor) -> Tensor:
            seen.append(given)
            return scores.clone()

        bare = shallow(shallow(model, owner.split("."), _constant(hidden)), [lm_head], head)
        try:
            with torch.no_grad():
                logits = bare(input_ids=torch.zeros((1, 1), dtype=torch.int64)).logits.double().flatten()
        except Exception as e:
            raise self.fail(f"its way from hidden states to logits cannot be followed: {first_line(e)}") from e
        if len(seen) != 1:
            raise self.fail(f"its LM head is called {len(seen)} times a pass")
        before = float(seen[0].flatten()[0])
        if not torch.equal(seen[0], hidden * before):
            raise self.fail("its LM head is not given the normed hidden states")
        return self._fit(before, scores.flatten(), logits)

    def _fit(self, before: float, scores: Tensor, logits: Tensor) -> Link:
        if logits.shape != scores.shape:
            raise self.fail("it has another number of logits than its LM head")
        # Models that compute logits in float32 give 1e-3 back with rounding: round numbers are tried first.
        exact = float(logits[3] / scores[3])
        cap = float(logits[-1]) if math.isfinite(float(logits[-1])) and float(logits[-1]) < 1e6 else None
        candidates = [Link(before, scale, cap) for scale in (1.0, float(f"{exact:.6g}"), exact)]
        for link in candidates:
            made = scores * link.scale
            if link.cap is not None:
                made = link.cap * torch.tanh(made / link.cap)
            if torch.allclose(made, logits, rtol=1e-6, atol=1e-12):
                return link
        raise self.fail("its logits are no scaled or soft-capped output of its LM head")


def _alike(first: list[LayerCall], second: list[LayerCall]) -> bool:
    """Whether two passes over different hidden states gave the layers the same context."""

    pairs = zip(first, second, strict=True)
    return all(
        torch.equal(a, b)
        for one, two in pairs
        for a, b in zip(_tensors([one.args, one.kwargs]), _tensors([two.args, two.kwargs]), strict=True)
    )


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _hides(mask: Tensor) -> bool:
    """Whether this is an attention mask over four tokens in which the third does not see the first two."""
    if mask.ndim < 3 or mask.shape[-2:] != (4, 4):
        return False
    seen = mask if mask.dtype == torch.bool else mask > -1e3
    return not bool(seen[..., 2, :2].any()) and bool(seen[..., 3, 2].all())


def _last(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


class _Output(BaseModelOutputWithPast):
    """What a decoder returns; whatever else a causal LM looks for in it (router logits, caches) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _constant(hidden: Tensor) -> Callable[..., _Output]:
    return lambda *args, **kwargs: _Output(last_hidden_state=hidden)


def _is(one: Tensor | None, other: Tensor) -> bool:
    """The same tensor, or a view of all of it in the same shape."""
    return one is other or (one is not None and one.shape == other.shape and one.data_ptr() == other.data_ptr())


def shallow(module: nn.Module, path: list[str], forward: Callable[..., Any]) -> nn.Module:
    """The module with another forward at `path`; nothing but the modules on the way is copied."""
    bare = copy.copy(module)
    if not path:
        bare.forward = forward
        return bare
    bare._modules = dict(module._modules)
    bare._modules[path[0]] = shallow(cast("nn.Module", module._modules[path[0]]), path[1:], forward)
    return bare


_FOUND: dict[int, tuple[PreTrainedModel, Structure]] = {}


def structure(spec: CausalLMSpec) -> Structure:
    """The parts of the model of a task's spec; ConfigError that says which part was not found."""
    model = build_skeleton(spec)
    known = _FOUND.get(id(model))
    if known is None or known[0] is not model:
        _FOUND.clear()
        known = _FOUND[id(model)] = (model, _find(model))
    return known[1]


def _find(model: PreTrainedModel) -> Structure:
    search = _Search(model)
    layers, count = search.layers()
    owner = layers.rpartition(".")[0]
    embedding = search.path(model.get_input_embeddings(), "token embedding")
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    lm_head = search.path(head, "LM head")
    if not isinstance(head, nn.Linear) or "." in lm_head or not owner:
        raise search.fail("its LM head is no linear layer beside the layers")
    norm, plain, tuples = search.watch(owner, layers, count, embedding)
    isolates = search.isolates(owner, layers, tuples, _width(model.get_input_embeddings()))
    link = search.link(owner, lm_head)
    return Structure(owner, layers, count, embedding, norm, lm_head, plain, tuples, isolates, link)
