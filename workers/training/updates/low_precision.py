"""Update rules for weights in bfloat16 that lose nothing to rounding on average, and the measure of what is lost.

A bfloat16 has eight significant bits: an update below a 512th of its weight rounds away. Fine-tuning steps are smaller
than that for most weights (learning rate 1e-6, weights around 0.02), and the second moment of Adam, which moves by a
thousandth a step, stands still the same way. Every rule here computes in float32 and differs in what it stores:

- ``nearest``: the nearest bfloat16, as torch's own optimizers do.
- ``stochastic``: one of the two neighbours, the nearer one with the higher probability, so that the expected value is
  exact (Gupta et al., 2015, arXiv 1502.02551; for Adam in bfloat16: Zamirai et al., 2020, arXiv 2010.06192). Weights
  and moments. Two bytes a number, as ``nearest``.
- ``compensated``: the nearest bfloat16 and the error that was made, itself a bfloat16, which the next step adds first
  (Kahan summation). No randomness; moments in float32: six bytes a parameter more than ``stochastic``.

The random bits of a step are drawn from a seed of the stage, the step, and (of sharded parameters) the rank: a stage
that was killed and goes on, and any gang of the same size, draws the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from workers.device import kind_of, pieces
from workers.distributed.sharded import held
from workers.seeds import derive_seed
from workers.specs.experiment import OptimizerSpec
from workers.training.updates.eight_bit import BLOCK, optimizer_class
from workers.training.updates.four_bit import adamw4bit
from workers.update_slices import slice_size

#: Every so many steps the share of the updates that rounding swallows is measured.
MEASURE_EVERY = 16
_LOW_BITS = (1 << 16) - 1


def random_bits(key: int, begin: int, count: int, device: torch.device) -> Tensor:
    """32 bits for each of the numbers `begin` .. `begin + count - 1` of a parameter: int32 (count,), a function of
    `key` and of where a number lies: the same on every device, however the work is cut."""
    # Streams of different keys are pieces of one sequence of 2^32 that begin anywhere.
    mixed = torch.arange(count, dtype=torch.int32, device=device).add_(_int32(begin + key))
    shifted = torch.empty_like(mixed)
    # The finalizer of MurmurHash3, which changes every bit of the result with probability 1/2 for any of the input.
    for shift, factor in ((16, _int32(0x85EBCA6B)), (13, _int32(0xC2B2AE35)), (16, None)):
        torch.bitwise_right_shift(mixed, shift, out=shifted)
        mixed.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))
        if factor is not None:
            mixed.mul_(factor)
    return mixed


def _int32(value: int) -> int:
    """The 32 low bits of `value` as a signed number."""
    return ((value + (1 << 31)) & ((1 << 32) - 1)) - (1 << 31)


def store_rounded(values: Tensor, target: Tensor, draws: Tensor) -> None:
    """Put float32 `values` (N,) into bfloat16 `target` (N,), up or down with the probability that keeps the expected
    value. Uses `values` up. `draws`: int32 (N,), uniform in 0 .. 65535.

    What a bfloat16 can hold stays exactly that; infinite and undefined values stay so.
    """
    # A float32 is a bfloat16 and 16 more bits of mantissa: what is added to them carries over in proportion to them.
    bits = values.view(torch.int32)
    bits.add_(draws)
    target.view(torch.int16).copy_(bits.bitwise_right_shift_(16))


@dataclass(frozen=True)
class Rule:
    """An update rule on float32 slices. `moments`: names of its states that are shaped like the parameter."""

    moments: tuple[str, ...]
    #: (weight, gradient, moments, group, step counted from 1): changes weight and moments in place.
    update: Callable[[Tensor, Tensor, Sequence[Tensor], Mapping[str, Any], int], None]


def _adamw(weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], group: Mapping[str, Any], step: int) -> None:
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), in the order of torch.optim.AdamW."""
    mean, square = moments
    (beta1, beta2), rate = group["betas"], group["lr"]
    weight.mul_(1.0 - rate * group["weight_decay"])
    mean.lerp_(gradient, 1.0 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    scale = square.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(group["eps"])
    weight.addcdiv_(mean, scale, value=-rate / (1.0 - beta1**step))


def _sgd(weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], group: Mapping[str, Any], step: int) -> None:
    """Momentum as in torch.optim.SGD, without dampening."""
    if group["weight_decay"]:
        gradient = gradient.add(weight, alpha=group["weight_decay"])
    if group["momentum"]:
        (buffer,) = moments
        buffer.copy_(gradient) if step == 1 else buffer.mul_(group["momentum"]).add_(gradient)
        gradient = gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
    weight.add_(gradient, alpha=-group["lr"])


def rule_of(spec: OptimizerSpec) -> Rule:
    """The update rule of `spec.name` (adamw or sgd)."""
    if spec.name == "sgd":
        return Rule(("momentum_buffer",) if spec.momentum else (), _sgd)
    return Rule(("exp_avg", "exp_avg_sq"), _adamw)


class Swallowed:
    """How much of the updates of some steps did not arrive in the stored weights, summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, meant: Tensor, arrived: Tensor) -> None:
        """Take in changes of weights: those that were computed and those that were stored, float32 (N,)."""
        self._sums[0] += meant.abs().sum(dtype=torch.float64)
        self._sums[1] += (arrived * meant.sign()).sum(dtype=torch.float64)

    def sums(self) -> tuple[float, float]:
        """Give what was meant and what arrived, as sums of sizes. Waits for the device."""
        meant, arrived = self._sums.tolist()
        return meant, arrived


def share_of(sums: Iterable[tuple[float, float]]) -> float | None:
    """Tell the share of the updates that did not arrive: 0 where all did (on average), 1 where none did, None where
    nothing was to be changed. `sums`: of `Swallowed`, of one rank or several."""
    pairs = list(sums)
    meant, arrived = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return min(1.0, max(0.0, 1.0 - arrived / meant)) if meant > 0 else None


#: A parameter's state, by the names of its optimizer, and the settings of its group, as torch keeps them.
ParameterState = dict[str, Any]
ParameterGroup = Mapping[str, Any]
#: Makes zeros like a tensor, of a type.
Zeros = Callable[[Tensor, torch.dtype], Tensor]


def zeros_beside(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of this type where a tensor is, laid out as it is."""
    return torch.zeros_like(tensor, dtype=dtype)


@dataclass(frozen=True)
class Place:
    """Which numbers a slice holds: parameter, step counted from 1, and the first of them in the parameter's memory."""

    index: int
    step: int
    begin: int = 0


class LowPrecisionUpdates:
    """The rules of AdamW or SGD for weights in bfloat16, on pieces of parameters (float32 ones are updated as they
    are)."""

    def __init__(self, spec: OptimizerSpec, device: torch.device, seed: Sequence[str | int]) -> None:
        """`device`: where updates are computed. `seed`: what names the stage (and, of sharded parameters, the rank) to
        `derive_seed`."""
        self._rule, self._rounding, self._seed = rule_of(spec), spec.rounding, tuple(seed)
        self._size = slice_size(kind_of(device))
        self.swallowed = Swallowed(device)

    def fresh(self, parameter: Tensor, zeros: Zeros = zeros_beside) -> ParameterState:
        """Make the state of a parameter before its first step."""
        exact = self._rounding == "compensated" and parameter.dtype != torch.float32
        kind = torch.float32 if exact else parameter.dtype
        moments: ParameterState = {name: zeros(parameter, kind) for name in self._rule.moments}
        if exact:
            moments["compensation"] = zeros(parameter, parameter.dtype)
        # A plain count: a tensor on the device would be waited for at every step.
        return {"step": 0, **moments}

    def change(
        self, weights: Tensor, gradients: Tensor, state: ParameterState, group: ParameterGroup, place: Place
    ) -> None:
        """Take a step in place. `weights`, `gradients` and the tensors of `state`: (N,), in the order of memory."""
        moments = [state[name] for name in self._rule.moments]
        errors: Tensor | None = state.get("compensation")
        for part in pieces(weights.numel(), self._size):
            weight, error = weights[part], None if errors is None else errors[part]
            exact = weight.float() if error is None else weight.float().add_(error)
            before = exact.clone() if weight.dtype != torch.float32 and place.step % MEASURE_EVERY == 1 else None
            low = [moment[part] for moment in moments]
            moving = [moment.float() for moment in low]
            self._rule.update(exact, gradients[part].float(), moving, group, place.step)
            meant = None if before is None else exact - before
            self._store(
                [exact, *moving], [weight, *low], error, Place(place.index, place.step, place.begin + part.start)
            )
            if before is not None and meant is not None:
                now = weight.float() if error is None else weight.float().add_(error)
                self.swallowed.add(meant, now - before)

    def _store(self, values: Sequence[Tensor], targets: Sequence[Tensor], error: Tensor | None, place: Place) -> None:
        """Put the weight and its moments (float32) where they are kept."""
        if targets[0].dtype == torch.float32:
            return  # changed in place
        if self._rounding == "stochastic":
            for pair in range(0, len(values), 2):
                key = derive_seed(*self._seed, "rounding", place.step, place.index, pair)
                store_pair(values[pair : pair + 2], targets[pair : pair + 2], key, place.begin)
            return
        for value, target in zip(values, targets, strict=True):
            target.copy_(value)
        if error is not None:
            error.copy_(values[0] - targets[0])


class LowPrecisionOptimizer(torch.optim.Optimizer):
    """AdamW or SGD over parameters in bfloat16 (float32 ones among them are updated as they are)."""

    def __init__(self, spec: OptimizerSpec, parameters: Iterable[nn.Parameter], seed: Sequence[str | int]) -> None:
        """`seed`: what names the stage (and, of sharded parameters, the rank) to `derive_seed`."""
        super().__init__(list(parameters), dict(settings_of(spec)))
        self._updates = LowPrecisionUpdates(spec, self.param_groups[0]["params"][0].device, seed)
        self.swallowed = self._updates.swallowed

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change every parameter that has a gradient."""
        if closure is not None:
            raise TypeError("a closure is not supported: gradients are there before the step")
        parameters = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        for index, (group, parameter) in enumerate(parameters):
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.state[parameter] = self._updates.fresh(parameter)
            state = self.state[parameter]
            state["step"] += 1
            weights, gradients = in_memory_order(held(parameter)), in_memory_order(gradient_of(parameter))
            place = Place(index, int(state["step"]))
            self._updates.change(weights, gradients, flat_state(state), group, place)
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states as they are: torch's own would cast float32 moments to the parameter's type."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.state.clear()
        for index, state in state_dict["state"].items():
            self.state[parameters[index]] = dict(state)


def settings_of(spec: OptimizerSpec) -> ParameterGroup:
    """The settings of a group of parameters."""
    settings = {"lr": spec.lr, "weight_decay": spec.weight_decay, "betas": spec.betas, "eps": spec.eps}
    return {**settings, "momentum": spec.momentum, "nesterov": spec.nesterov}


def flat_state(state: ParameterState) -> ParameterState:
    """A parameter's state with its tensors as views (N,) in the order of memory."""
    return {
        key: in_memory_order(held(value)) if isinstance(value, Tensor) and value.ndim else value
        for key, value in state.items()
    }


def store_pair(values: Sequence[Tensor], targets: Sequence[Tensor], key: int, begin: int) -> None:
    """Round one or two slices stochastically: 16 bits each of the 32 that are drawn for a number."""
    mixed = random_bits(key, begin, len(values[0]), values[0].device)
    if len(values) == 2:
        store_rounded(values[1], targets[1], (mixed >> 16).bitwise_and_(_LOW_BITS))
    store_rounded(values[0], targets[0], mixed.bitwise_and_(_LOW_BITS))


def in_memory_order(tensor: Tensor) -> Tensor:
    """A view (N,) of a dense tensor of any layout, in the order of its memory."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """What this rank has of the parameter's gradient, in the layout of the parameter's memory."""
    weight, gradient = held(parameter), None if parameter.grad is None else held(parameter.grad)
    if gradient is None:
        raise ValueError("a parameter without a gradient has no step")
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


def eight_bit_adamw(
    spec: OptimizerSpec, parameters: Sequence[nn.Parameter], seed: Sequence[str | int]
) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit moments, whose bfloat16 weights are rounded as asked (not `compensated`).

    The library's own kernel updates float32 copies of one slice of a parameter at a time; its states are the library's.
    """
    library: Any = optimizer_class()
    device = parameters[0].device
    size = slice_size(kind_of(device))

    class Faithful(library):  # type: ignore[misc]  # as above
        swallowed = Swallowed(device)

        @torch.no_grad()
        def update_step(self, group: dict[str, Any], parameter: nn.Parameter, group_index: int, index: int) -> None:
            if parameter.dtype != torch.bfloat16:
                super().update_step(group, parameter, group_index, index)
                return
            state = self.state[parameter]
            step = int(state["step"]) + 1
            key = derive_seed(*seed, "rounding", step, group_index, index)
            weights, gradients = in_memory_order(parameter.data), in_memory_order(gradient_of(parameter))
            for part in pieces(weights.numel(), size):
                copy = nn.Parameter(weights[part].float())
                copy.grad = gradients[part].float()
                self.state[copy] = _slice_of(state, part, weights.numel())
                before = copy.detach().clone() if step % MEASURE_EVERY == 1 else None
                super().update_step(group, copy, group_index, index)
                del self.state[copy]
                exact = copy.detach()
                meant = None if before is None else exact - before
                if spec.rounding == "stochastic":
                    store_pair([exact], [weights[part]], key, part.start)
                else:
                    weights[part] = exact
                if before is not None and meant is not None:
                    self.swallowed.add(meant, weights[part].float() - before)
            state["step"] = step

    made: torch.optim.Optimizer = Faithful(
        parameters, lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay
    )
    return made


def _slice_of(state: Mapping[str, Any], part: slice, numbers: int) -> dict[str, Any]:
    """Views of the states of some numbers of a parameter that has so many."""
    blocks = slice(part.start // BLOCK, -(-min(part.stop, numbers) // BLOCK))

    def cut(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or key.startswith("qmap"):
            return value
        if key.startswith("absmax"):
            return value[blocks]
        return in_memory_order(value)[part] if value.numel() == numbers else value

    return {key: cut(key, value) for key, value in state.items()}


_Maker = Callable[[OptimizerSpec, Sequence[nn.Parameter], Sequence[str | int]], torch.optim.Optimizer]
#: Name -> what makes the optimizer where some weights are in bfloat16, by its spec, the parameters and a seed.
LOW_PRECISION: dict[str, _Maker] = {
    "adamw": LowPrecisionOptimizer,
    "sgd": LowPrecisionOptimizer,
    "adamw8bit": eight_bit_adamw,
    "adamw4bit": adamw4bit,
}
