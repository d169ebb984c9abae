"""Update rules that take a step of one parameter after another, piece by piece, wherever its state lies.

Each gives the bits of the optimizer that updates all parameters at once on the same device. Pieces begin where a vector
register of the kernels does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from workers.device import pieces as pieces_of
from workers.specs.experiment import OptimizerSpec
from workers.training.updates.eight_bit import adamw8bit
from workers.training.updates.low_precision import (
    LowPrecisionUpdates,
    ParameterGroup,
    ParameterState,
    Place,
    Swallowed,
    Zeros,
    eight_bit_adamw,
    flat_state,
    gradient_of,
    in_memory_order,
)

#: Numbers of a piece. Those of narrow weights are cut further (`workers.update_slices`), into whole slices.
PIECE = 1 << 22


class Stepper(Protocol):
    """What changes a parameter."""

    @property
    def swallowed(self) -> Swallowed | None:
        """How much of the updates rounding took; None where nothing is rounded."""

    def fresh(self, parameter: nn.Parameter, zeros: Zeros) -> ParameterState:
        """Make the state of a parameter before its first step, out of what `zeros` makes."""

    def update(
        self, index: int, parameter: nn.Parameter, state: ParameterState, group: ParameterGroup
    ) -> Iterator[slice]:
        """Take a step with the parameter's gradient, in place; yields what of its memory is done, piece by piece."""


def stepper_of(spec: OptimizerSpec, parameters: Sequence[nn.Parameter], seed: Sequence[str | int]) -> Stepper:
    """Return what updates these parameters, which lie where they are updated. `seed`: as for `build_optimizer`."""
    narrow = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    if spec.name == "adamw8bit":
        return EightBitStepper(eight_bit_adamw(spec, parameters, seed) if narrow else adamw8bit(spec, parameters))
    if narrow:
        return LowPrecisionStepper(spec, parameters[0].device, seed)
    return FusedStepper(_MOMENTS[spec.name](spec), _KERNELS[spec.name])


class FusedStepper:
    """torch's fused kernels over float32."""

    swallowed = None

    def __init__(self, moments: Sequence[str], kernel: _Kernel) -> None:
        self._moments, self._kernel = tuple(moments), kernel

    def fresh(self, parameter: nn.Parameter, zeros: Zeros) -> ParameterState:
        state: ParameterState = {name: zeros(parameter, parameter.dtype) for name in self._moments}
        # As torch.optim.AdamW counts; its SGD counts nothing.
        return {"step": torch.zeros(()), **state} if "exp_avg" in state else state

    def update(
        self, index: int, parameter: nn.Parameter, state: ParameterState, group: ParameterGroup
    ) -> Iterator[slice]:
        weights, gradients = in_memory_order(parameter.detach()), in_memory_order(gradient_of(parameter))
        moments = [in_memory_order(state[name]) for name in self._moments]
        taken: Tensor | None = state.get("step")
        for part in pieces(weights.numel()):
            # The kernel counts by itself.
            step = None if taken is None else taken.to(weights.device, copy=True)
            self._kernel(weights[part], gradients[part], [moment[part] for moment in moments], step, group)
            yield part
        if taken is not None:
            taken.add_(1)


class LowPrecisionStepper:
    """Our rules for bfloat16 weights."""

    def __init__(self, spec: OptimizerSpec, device: torch.device, seed: Sequence[str | int]) -> None:
        self._updates = LowPrecisionUpdates(spec, device, seed)
        self.swallowed: Swallowed | None = self._updates.swallowed

    def fresh(self, parameter: nn.Parameter, zeros: Zeros) -> ParameterState:
        return self._updates.fresh(parameter, zeros)

    def update(
        self, index: int, parameter: nn.Parameter, state: ParameterState, group: ParameterGroup
    ) -> Iterator[slice]:
        state["step"] += 1
        weights, gradients = in_memory_order(parameter.detach()), in_memory_order(gradient_of(parameter))
        flat = flat_state(state)
        for part in pieces(weights.numel()):
            own = {key: value[part] if isinstance(value, Tensor) else value for key, value in flat.items()}
            place = Place(index, int(state["step"]), part.start)
            self._updates.change(weights[part], gradients[part], own, group, place)
            yield part


class EightBitStepper:
    """bitsandbytes' AdamW with moments in 8 bits, a whole parameter at a time. Its states lie where the library makes
    them: beside the parameter."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer: Any = optimizer
        self.swallowed: Swallowed | None = getattr(optimizer, "swallowed", None)

    def fresh(self, parameter: nn.Parameter, zeros: Zeros) -> ParameterState:
        group = self._optimizer.param_groups[0]
        index = next(place for place, each in enumerate(group["params"]) if each is parameter)
        self._optimizer.init_state(group, parameter, 0, index)
        state: ParameterState = self._optimizer.state[parameter]
        return state

    def update(
        self, index: int, parameter: nn.Parameter, state: ParameterState, group: ParameterGroup
    ) -> Iterator[slice]:
        self._optimizer.state[parameter] = state
        self._optimizer.update_step(group, parameter, 0, index)
        yield slice(0, parameter.numel())


def pieces(numbers: int) -> Iterator[slice]:
    """Cut a parameter of so many numbers."""
    return pieces_of(numbers, PIECE)


#: Changes weights and moments in place: (weights, gradients, moments, steps taken, settings).
_Kernel = Callable[[Tensor, Tensor, list[Tensor], Tensor | None, ParameterGroup], None]


def _adamw(
    weights: Tensor, gradients: Tensor, moments: list[Tensor], step: Tensor | None, group: ParameterGroup
) -> None:
    (beta1, beta2), (mean, square) = group["betas"], moments
    adamw(
        [weights],
        [gradients],
        [mean],
        [square],
        [],
        [] if step is None else [step],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _sgd(weights: Tensor, gradients: Tensor, moments: list[Tensor], step: Tensor | None, group: ParameterGroup) -> None:
    # A buffer of zeros gives in the first step what torch gives without one.
    sgd(
        [weights],
        [gradients],
        [moments[0] if moments else None],
        fused=True,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=False,
    )


_KERNELS: dict[str, _Kernel] = {"adamw": _adamw, "sgd": _sgd}
#: Name -> moments, as torch names them.
_MOMENTS: dict[str, Callable[[OptimizerSpec], Sequence[str]]] = {
    "adamw": lambda spec: ("exp_avg", "exp_avg_sq"),
    "sgd": lambda spec: ("momentum_buffer",) if spec.momentum else (),
}
