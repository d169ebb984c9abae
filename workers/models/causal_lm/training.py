"""A causal LM's parts as the training code asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from workers.device import DTYPES
from workers.models.base import TokenParts
from workers.models.causal_lm.network import parts
from workers.models.causal_lm.network.balance import routers
from workers.models.causal_lm.network.context import Frame
from workers.models.causal_lm.network.lora import adapter_state, add_lora, merged_state
from workers.models.causal_lm.network.quantized import quantize
from workers.models.causal_lm.network.skeleton import build_skeleton, master_dtype
from workers.models.causal_lm.tie import EMBEDDING, HEAD
from workers.models.chain import State, whole_state
from workers.models.counting import Shape
from workers.specs.experiment import TrainSpec
from workers.specs.language import CausalLMSpec


class CausalLMParts(TokenParts):
    """See `workers.models.base.Parts`; `workers.models.causal_lm.network.parts` says what the modules take and give."""

    def __init__(self, model: CausalLMSpec) -> None:
        self._model = model

    def names(self) -> list[str]:
        return parts.part_names(self._model)

    def state_names(self, part: str) -> list[str]:
        return parts.part_state_names(self._model, part)

    def build(self, part: str, device: torch.device) -> nn.Module:
        return parts.build_part(self._model, part, device)

    def build_aux(self, source: int, seed: int, device: torch.device, head: Mapping[str, Tensor] | None) -> nn.Module:
        """A copy of the model's own norm and LM head."""
        if head is None:
            raise ValueError("a local head starts as a copy of the model's own, whose state was not given")
        module = self.build("head", device)
        module.load_state_dict(head, strict=True)
        return module

    def prepare_training(self, part: str, module: nn.Module, train: TrainSpec, seed: int) -> None:
        """Put low-rank adapters in, or freeze the LM head, as the stage asks; watch the routers that train."""
        if train.lora is not None:
            add_lora(module, train.lora, seed, lm_head=train.lm_head == "lora")
        if isinstance(module, parts.Head) and train.lm_head != "lora":
            module.output_layer().requires_grad_(train.lm_head == "train" and train.lora is None)
        if isinstance(module, parts.Layer):
            for _, router, index in routers(self._model, module):
                # A frozen router keeps its balance: nothing of the loss could change how it routes.
                if any(parameter.requires_grad for parameter in router.parameters()):
                    module.watch(router, index)

    def prepare_frozen(self, part: str, module: nn.Module, train: TrainSpec) -> None:
        if train.frozen_weights != "full":
            quantize(module, train.frozen_weights, DTYPES[train.precision])

    def sharing(self) -> tuple[str, ...]:
        return (EMBEDDING, HEAD)

    def tie(self, modules: Mapping[str, nn.Module], train: TrainSpec | None) -> None:
        """Give the LM head the embedding's own matrix. A frozen LM head freezes it where it embeds, too."""
        parts.tie(modules.get(EMBEDDING), modules.get(HEAD))
        if train is not None and train.lm_head == "frozen" and EMBEDDING in modules:
            cast("parts.Embed", modules[EMBEDDING]).matrix().requires_grad_(False)

    def final_state(self, module: nn.Module) -> State:
        adapted = any("lora_" in name for name, _ in module.named_parameters())
        return merged_state(module) if adapted else whole_state(module)

    def adapter_state(self, module: nn.Module) -> State:
        return adapter_state(module)

    def boundary(self, blocks: int) -> Mapping[str, Shape]:
        return {"x": (self._hidden,)}

    def identity(self) -> Any:
        # The names in the states' digests say the depth; the rest of the computation is in the configuration.
        config = {key: value for key, value in (self._model.config or {}).items() if key != "num_hidden_layers"}
        return {"config": config, "master": self._model.master, "attention": self._model.attention}

    def context(self, device: torch.device, longest: int) -> Callable[..., Any]:
        return Frame(self._model, device, longest)

    def stream_dtype(self) -> torch.dtype:
        return master_dtype(self._model)

    @cached_property
    def _hidden(self) -> int:
        return int(build_skeleton(self._model).config.get_text_config().hidden_size)
