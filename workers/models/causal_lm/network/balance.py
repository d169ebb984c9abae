"""The balance loss of mixture-of-experts models: what keeps routers from sending every token to the same experts.

transformers counts it where `output_router_logits` is set; here it is counted whenever a router trains. Which outputs
are router logits, and what the loss over them is, the model's own code says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from cache_store.errors import first_line
from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.network.skeleton import build_skeleton
from workers.models.causal_lm.network.structure import shallow, structure
from workers.specs.language import CausalLMSpec


class BalanceLoss:
    """Compute transformers' own balance loss of one model from router logits, times the configured coefficient."""

    def __init__(self, model: PreTrainedModel, owner: str, lm_head: str, coefficient: float) -> None:
        self._model, self._owner, self._lm_head = model, owner, lm_head
        self._width = cast("nn.Linear", model.get_submodule(lm_head)).in_features
        self._coefficient = coefficient

    def __call__(self, logits: tuple[Tensor, ...], tokens: Tensor | None) -> Tensor:
        """The loss over all given routers together, float32. `tokens` bool (B, T): False at padding; None: no padding.

        Runs the causal LM's own forward with everything cut out of it but what it does with router logits.
        """
        hidden = torch.zeros((1, 1, self._width))

        def decoder(*args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
            # In float32, as under autocast.
            return MoeModelOutputWithPast(
                last_hidden_state=cast("torch.FloatTensor", hidden),
                router_logits=cast("tuple[torch.FloatTensor]", tuple(each.float() for each in logits)),
            )

        model = shallow(self._model, self._owner.split("."), decoder)
        model = shallow(model, [self._lm_head], lambda given: given)
        try:
            output = model(
                input_ids=torch.zeros((1, 1), dtype=torch.int64), attention_mask=tokens, output_router_logits=True
            )
        except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError) as e:
            name = self._model.config.model_type
            raise refuse(f"{name!r}: the balance loss of its experts cannot be followed: {first_line(e)}") from e
        return self._coefficient * cast("Tensor", output.aux_loss)


class Routing:
    """Collect the router logits of one batch, layer by layer, until its loss is taken.

    Layers that run again in the backward pass (activation checkpointing) find it closed and add nothing.
    """

    def __init__(self, balance: BalanceLoss, tokens: Tensor | None) -> None:
        self._balance, self._tokens = balance, tokens
        self._logits: list[Tensor] | None = []

    def add(self, logits: list[Tensor]) -> None:
        """Take in what one layer's routers gave, in the order in which they ran."""
        if self._logits is not None:
            self._logits += logits

    def loss(self) -> Tensor | None:
        """The weighted balance loss over what was collected; None where no router trains. Closes the collection."""
        logits, self._logits = self._logits, None
        return self._balance(tuple(logits), self._tokens) if logits else None


def balance_loss(spec: CausalLMSpec) -> BalanceLoss | None:
    """The balance loss of a task's model; None for models that have none, or a coefficient of zero."""
    model, found = build_skeleton(spec), structure(spec)
    coefficient = float(getattr(model.config.get_text_config(), "router_aux_loss_coef", None) or 0.0)
    if coefficient == 0.0 or not _recorders(model, found.owner):
        return None
    return BalanceLoss(model, found.owner, found.lm_head, coefficient)


def routers(spec: CausalLMSpec, part: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Modules of a built part that give router logits: name, module, and at which place of its output."""
    found = structure(spec)
    for recorder in _recorders(build_skeleton(spec), found.owner):
        for name, module in part.named_modules():
            inside = recorder.layer_name is None or f".{recorder.layer_name.strip('.')}." in f".{name}."
            if inside and isinstance(module, recorder.target_class):
                yield name, module, recorder.index


def _recorders(model: PreTrainedModel, owner: str) -> list[Any]:
    """transformers' own records of which modules give router logits."""
    from transformers.utils.output_capturing import OutputRecorder

    said = getattr(model.get_submodule(owner), "_can_record_outputs", None) or {}
    given = said.get("router_logits", [])
    given = given if isinstance(given, list) else [given]
    # A class alone stands for the second thing that it returns.
    return [each if isinstance(each, OutputRecorder) else OutputRecorder(each, index=1) for each in given]
