"""Block coordinates as an ordinary loop has them: parameters frozen by hand, a fresh torch.optim.AdamW a turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from workers.specs.experiment import OptimizerSpec
from workers.specs.tasks import BlockSchedule
from workers.training.updates.active_parts import active_parts

Parts = Mapping[str, Sequence[nn.Parameter]]


def chosen_by_hand(schedule: BlockSchedule, seed: tuple[str | int, ...]) -> Callable[[int], set[str]]:
    """Turn -> the parts that take it, without those that are always trained. Of orders that are drawn the draws are
    ours; that they are the method's is for their own tests."""

    def chosen(turn: int) -> set[str]:
        blocks = [set(block) for block in schedule.blocks]
        if schedule.order == "ascending":
            return blocks[turn % len(blocks)]
        if schedule.order == "descending":
            return blocks[::-1][turn % len(blocks)]
        return set(active_parts(schedule, seed, turn)) - set(schedule.always)

    return chosen


class OrdinaryTurns:
    """Two optimizers: one for what is always trained, made once, and one for the blocks whose turn it is."""

    def __init__(self, schedule: BlockSchedule, seed: tuple[str | int, ...], parts: Parts, spec: OptimizerSpec) -> None:
        self._steps, self._chosen = schedule.steps, chosen_by_hand(schedule, seed)
        self._parts, self._spec = parts, spec
        always = list({id(parameter): parameter for name in schedule.always for parameter in parts[name]}.values())
        self._lasting = self._optimizer(always) if always else None
        self._always = {id(parameter) for parameter in always}
        self._current: torch.optim.Optimizer | None = None

    def _optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        spec = self._spec
        return torch.optim.AdamW(
            parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=True
        )

    def begin(self, step: int) -> None:
        """Before the forward pass of a step."""
        if step % self._steps:
            return
        names = self._chosen(step // self._steps)
        for name, parameters in self._parts.items():
            for parameter in parameters:
                parameter.requires_grad_(name in names or id(parameter) in self._always)
        unique = {id(parameter): parameter for name in self._parts if name in names for parameter in self._parts[name]}
        for parameter in unique.values():
            parameter.requires_grad_(True)  # shared with a part that is not chosen
        self._current = self._optimizer(list(unique.values()))

    def step(self, rate: float) -> None:
        for optimizer in (self._lasting, self._current):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
