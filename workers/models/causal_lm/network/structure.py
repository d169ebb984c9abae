"""Which module of a causal LM is what, found by watching the model's own forward pass.

The skeleton's layers are replaced by recorders and its own forward runs once on two tokens: what enters the first
layer, what passes between layers and what leaves the last one tells whether the model is a chain. No list of names.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from cache_store.errors import ConfigError, first_line
from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.network.link import Link
from workers.models.causal_lm.network.recording import LayerCall, Recording, has_weights, width
from workers.models.causal_lm.network.skeleton import build_skeleton, number_of_layers
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
    #: Layers are given what the one before returned beside hidden states. They may do without: that is tried.
    hands_over: bool
    link: Link


_FOLLOWED = "its forward cannot be followed"
_SHOWN = 4
#: Embeddings of so few rows are none of tokens (types, languages).
_FEW_ROWS = 8


@dataclass(frozen=True)
class _Watched:
    """What one pass of the owner showed; see `Structure`."""

    norm: str
    plain_embedding: bool
    tuples: bool
    hands_over: bool


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
        count = number_of_layers(config.to_dict())
        if count is None:
            raise self.fail("its configuration gives no number of decoder layers")
        lists = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList)}
        found = [name for name, module in lists.items() if len(module) == count]
        outer = [name for name in found if not any(name.startswith(other + ".") for other in found)]
        if len(outer) != 1:
            seen = ", ".join(f"{name} of {len(lists[name])}" for name in outer or list(lists)[:_SHOWN]) or "none"
            raise self.fail(
                f"{len(outer)} lists of {count} decoder layers were found, exactly one is needed; lists: {seen}"
            )
        return outer[0], count

    def sharing(self, layers: str) -> None:
        """Layers that take keys and values from layers before them are no chain."""
        for index, layer in enumerate(cast("nn.ModuleList", self.model.get_submodule(layers))):
            if any(getattr(module, "is_kv_shared_layer", False) is True for module in layer.modules()):
                raise self.fail(
                    f"from layer {index} on, layers take keys and values from layers before them (num_kv_shared_layers)"
                )

    def embeds(self, owner: str, embedding: str) -> None:
        """The module that runs the layers must be the one that embeds tokens, once."""
        module = self.model.get_submodule(owner)
        rows = cast("nn.Embedding", self.model.get_submodule(embedding)).num_embeddings
        for name, child in module.named_children():
            other = isinstance(child, nn.Embedding) and f"{owner}.{name}" != embedding
            if other and "embed" in name and "pos" not in name and child.num_embeddings == rows and rows > _FEW_ROWS:
                raise self.fail(f"its layers are given more of the tokens than the hidden states, by {name!r}")
        if not embedding.startswith(f"{owner}.") or "inputs_embeds" not in inspect.signature(module.forward).parameters:
            raise self.fail(f"what runs its layers ({owner}, a {type(module).__name__}) is not what embeds its tokens")

    def watch(self, owner: str, layers: str, count: int, embedding: str) -> _Watched:
        """What a pass shows, with layers that return hidden states or tuples: both ways are tried."""
        failures: list[ConfigError] = []
        for tuples in (False, True):
            try:
                return self._watch(owner, layers, count, embedding, tuples)
            except ConfigError as failure:
                failures.append(failure)
        # The way that came further says more.
        raise next((failure for failure in failures if _FOLLOWED not in failure.message), failures[0])

    def _watch(self, owner: str, layers: str, count: int, embedding: str, tuples: bool) -> _Watched:
        recording = self._recording(owner, layers, tuples)
        columns = width(self.model.get_submodule(embedding))
        inside = {name for name, child in recording.owner.named_children() if embedding in (f"{owner}.{name}", name)}
        notes = []
        for value in (0.0, 1.0):
            embedded = torch.full((1, 2, columns), value)
            # In train mode dropout between embedding and layers shows; the probe's own random numbers do not matter.
            recording.owner.train()
            with torch.random.fork_rng(devices=[]):
                try:
                    output = recording.run(embedded, torch.arange(2)[None], None)
                except Exception as e:
                    raise self.fail(f"{_FOLLOWED}: {_followed(e)}") from e
            notes.append((embedded, list(recording.calls), list(recording.weighted), output))
        embedded, calls, weighted, output = notes[-1]
        self._one_after_the_other(calls, count)
        if not _alike(notes[0][1], calls):
            raise self.fail("its layers are given more of the tokens than the hidden states")
        norm = self._norm(recording, calls[-1].hidden, output)
        before = {name for name, done, *_ in weighted if done < count}
        if norm in before:
            raise self.fail(f"its final norm {norm!r} also runs before its layers")
        plain = not (before - inside) and calls[0].hidden is embedded
        return _Watched(f"{owner}.{norm}", plain, tuples, any(call.handed for call in calls))

    def _recording(self, owner: str, layers: str, tuples: bool) -> Recording:
        try:
            return Recording(self.model, owner, layers, tuples, "cpu")
        except Exception as e:  # whatever the model's own rules for buffers raise
            raise self.fail(f"{_FOLLOWED}: {first_line(e)}") from e

    def _norm(self, recording: Recording, last: Tensor, output: Any) -> str:
        """Name of the one child that runs after the layers and makes the owner's output of what they give."""
        count = len(recording.calls)
        weighted = [note for note in recording.weighted if note[1] == count]
        after = weighted or [
            note
            for note in recording.weightless
            if note[1] == count and not isinstance(recording.owner.get_submodule(note[0]), nn.Dropout | nn.Identity)
        ]
        if not after:
            raise self.fail("there is no final norm after the last layer")
        if len(after) > 1:
            raise self.fail(f"after the last layer there is more than a norm: {', '.join(note[0] for note in after)}")
        name, _, given, made = after[0]
        module = recording.owner.get_submodule(name)
        if isinstance(module, nn.Linear | nn.Embedding | nn.ModuleList):
            raise self.fail(f"after the last layer there is no norm but {name!r}, a {type(module).__name__}")
        if not _is(given, last) or not _is(_last(output), made):
            raise self.fail("its final norm does not make its output of what the last layer gives")
        return name

    def _one_after_the_other(self, calls: list[LayerCall], count: int) -> None:
        if [call.index for call in calls] != list(range(count)):
            raise self.fail("its layers do not run once each, in order")
        if not all(_is(call.hidden, calls[0].hidden) for call in calls):
            raise self.fail("something changes the hidden states between its layers")

    def nothing_else(self, parts: tuple[str, ...]) -> None:
        """All weights must be inside the parts at these paths."""
        names = self.model.state_dict()
        left = [name for name in names if not any(name.startswith(f"{path}.") for path in parts)]
        if left:
            raise self.fail(f"{len(left)} of its weights belong to none of these, first {left[0]!r}")

    def link(self, owner: str, lm_head: str) -> Link:
        """What the model's forward does with hidden states before, and with logits after its LM head."""
        model = self.model
        root = owner.partition(".")[0]
        between = [n for n, child in model.named_children() if n not in (root, lm_head) and has_weights(child)]
        if between:
            raise self.fail(
                f"beside its layers and its LM head ({lm_head!r}) there is {between[0]!r}, which has weights"
            )
        hidden = torch.ones((1, 1, width(model.get_submodule(lm_head))), dtype=torch.float64)
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


def _followed(error: Exception) -> str:
    """Why a forward stopped. Weights have no memory: where they are used other than by calling a module, it fails."""
    text = first_line(error)
    return "it uses weights of its own beside its layers and its norm" if "device meta" in text else text


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


def _last(output: Any) -> Any:
    if isinstance(output, Mapping) and "last_hidden_state" in output:
        return output["last_hidden_state"]
    return output[0] if isinstance(output, tuple | list) and output else output


class _Output(BaseModelOutputWithPast):
    """What a decoder returns; whatever else a causal LM looks for in it (router logits, caches) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _constant(hidden: Tensor) -> Callable[..., _Output]:
    return lambda *args, **kwargs: _Output(last_hidden_state=hidden)


def _is(one: Any, other: Any) -> bool:
    """The same tensor, or a view of all of it in the same shape."""
    if one is other:
        return True
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.shape == other.shape and one.data_ptr() == other.data_ptr()


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
    untyped: Any = model
    head = untyped.get_output_embeddings()
    lm_head = search.path(head, "LM head")
    if not isinstance(head, nn.Linear) or "." in lm_head or not owner:
        raise search.fail("its LM head is no linear layer beside the layers")
    search.sharing(layers)
    search.embeds(owner, embedding)
    seen = search.watch(owner, layers, count, embedding)
    search.nothing_else((embedding if seen.plain_embedding else owner, layers, seen.norm, lm_head))
    link = search.link(owner, lm_head)
    return Structure(
        owner,
        layers,
        count,
        embedding,
        seen.norm,
        lm_head,
        seen.plain_embedding,
        seen.tuples,
        seen.hands_over,
        link,
    )
