"""What layers need beside hidden states (masks, rotary embeddings), made once a batch by the model's own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from cache_store.errors import first_line
from workers.device import to_device
from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.network.recording import Recording
from workers.models.causal_lm.network.skeleton import build_skeleton, master_dtype
from workers.models.causal_lm.network.structure import structure
from workers.specs.language import CausalLMSpec


@dataclass(frozen=True)
class LayerContext:
    """The arguments the model's own forward gives one layer after the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Context:
    """One batch's context for every part. No parameters, no gradients.

    position_ids: int64 (B, T), as given; at padded positions they go on counting.
    layers: one per decoder layer; layers of one kind share their tensors.
    where: int64 (N,), flat positions in B*T that carry a target; None: all of them.
    """

    position_ids: Tensor
    layers: tuple[LayerContext, ...]
    where: Tensor | None = None


class Frame:
    """Makes contexts for the model of a task's spec. Holds rotary buffers on `device` and nothing else."""

    def __init__(self, spec: CausalLMSpec, device: str | torch.device = "cpu", longest: int | None = None) -> None:
        """`longest`: tokens of the longest sample that there may be (`data.sequence_length`).

        Some models have two sets of rotary frequencies and take one or the other by the longest sample of a batch
        (longrope), so results would depend on which samples come together. With `longest` every batch is turned as one
        that holds a sample so long. None: as the model itself does.
        """
        found = structure(spec)
        model = build_skeleton(spec)
        self._recording = Recording(model, found.owner, found.layers, found.tuples, device)
        if longest is not None:
            _reach_to(self._recording.owner, longest)
        embedding = cast("torch.nn.Embedding", model.get_input_embeddings())
        self._width = embedding.embedding_dim
        self._dtype = master_dtype(spec)

    @torch.no_grad()
    def __call__(
        self,
        hidden_or_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        where: Tensor | None = None,
    ) -> Context:
        """The context of a batch; of `hidden_or_ids` only shape, device and type are looked at.

        hidden_or_ids: ids int64 (B, T) or hidden states (B, T, D); rotary embeddings take the type of the hidden
        states, or the master type. position_ids int64 (B, T): restarting ones mark packed documents, which do not
        see each other. attention_mask bool (B, T), True at tokens, or None. Padding on the right needs no mask (no
        token looks ahead, so none sees it), which keeps the attention kernels fast and packing intact; what comes
        out at padded positions is of no use. Any other padding goes to the model's own code. The last three may lie on
        the host, where looking at a mask waits for nothing; the context is on the device of `hidden_or_ids`.
        """
        batch, length = hidden_or_ids.shape[:2]
        dtype = hidden_or_ids.dtype if hidden_or_ids.is_floating_point() else self._dtype
        embedded = torch.zeros((), dtype=dtype, device=hidden_or_ids.device).expand(batch, length, self._width)
        if attention_mask is not None and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
            position_ids = _count_on(position_ids, attention_mask)
            attention_mask = None
        device = hidden_or_ids.device
        position_ids = to_device(position_ids, device)
        attention_mask = None if attention_mask is None else to_device(attention_mask, device)
        try:
            self._run(embedded, position_ids, attention_mask)
        except ImportError as e:
            raise refuse(f"needs a package that is missing: {first_line(e)}", "model.attention") from e
        layers = tuple(LayerContext(call.args, call.kwargs) for call in self._recording.calls)
        self._recording.forget()
        return Context(position_ids, layers, None if where is None else to_device(where, device))

    def _run(self, embedded: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> None:
        try:
            self._recording.run(embedded, position_ids, attention_mask)
        except RuntimeError as e:
            if "single memory location" not in str(e):
                raise
            # A model that changes its embedding in place needs one that has memory.
            self._recording.run(embedded.contiguous(), position_ids, attention_mask)


def _reach_to(owner: nn.Module, longest: int) -> None:
    """Let rotary modules that look at the largest position always see that of a sample of `longest` tokens."""
    for module in owner.modules():
        named = getattr(module, "rope_type", None)
        kinds = list(named.values()) if isinstance(named, dict) else [named]
        if any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
            module.forward = _reaching(module.forward, longest)


def _reaching(forward: Callable[..., Any], longest: int) -> Callable[..., Any]:
    """The rotary embedding of positions (…, T) with one more, the last of `longest`, that is cut off again."""

    def reaching(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        last = position_ids.new_full((*position_ids.shape[:-1], 1), longest - 1)
        made = forward(x, torch.cat((position_ids, last), dim=-1), *args, **kwargs)
        return tuple(t[..., :-1, :] for t in made) if isinstance(made, tuple) else made[..., :-1, :]

    return reaching


def _count_on(position_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Positions that go on counting over the padding: a restart there would look like another packed document."""
    steps = torch.arange(position_ids.shape[1], device=position_ids.device)
    last = (attention_mask.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    return torch.where(attention_mask, position_ids, position_ids.gather(1, last) + steps - last)
