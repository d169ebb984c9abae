"""The optimizer of a stage whose states, or whose weights in full, lie elsewhere than the weights it computes with.

Updates are computed where the states are, on copies of the weights there, so that weights need not leave the device for
every update (Ren et al., 2021, ZeRO-Offload, arXiv 2101.06840). A copy in float32 beside weights in bfloat16 is a
master: the weight in full, of which the device has what a bfloat16 holds (Micikevicius et al., 2018, arXiv 1710.03740).
Where a weight would be its own copy there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor, nn

from workers.device import is_host
from workers.specs.experiment import OptimizerSpec
from workers.specs.memory import MemorySpec
from workers.training.tiers.gradients import Carrier, DirectCarrier, LeavingGradients
from workers.training.tiers.opening import open_places
from workers.training.tiers.places import Place
from workers.training.tiers.steppers import pieces, stepper_of
from workers.training.tiers.uploads import DirectUploads, Uploads
from workers.training.updates.low_precision import ParameterState, Swallowed, in_memory_order, settings_of

#: A master among its parameter's states.
MASTER = "master"


class TieredOptimizer(torch.optim.Optimizer):
    """Updates parameters of a device by states that lie where `memory` says. Its own parameters (`param_groups`) are
    the copies that are updated, in the order of those it is made for; they have their gradients between `gather` and
    `zero_grad`."""

    def __init__(
        self,
        spec: OptimizerSpec,
        parameters: Sequence[nn.Parameter],
        seed: Sequence[str | int],
        memory: MemorySpec,
        device: torch.device,
    ) -> None:
        """`seed`: as for `build_optimizer`. `device`: where `parameters` are."""
        self._parameters = list(parameters)
        self._places = open_places(spec, parameters, memory, device)
        apart = memory.updates_on_host and not is_host(device)
        self._copies = [_updated(parameter, memory, apart, self._places.copies) for parameter in parameters]
        super().__init__(self._copies, dict(settings_of(spec)))
        self._stepper = stepper_of(spec, self._copies, seed)
        self.swallowed: Swallowed | None = self._stepper.swallowed
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            self.state[copy] = self._stepper.fresh(copy, self._places.states.zeros)
            if copy.dtype != parameter.dtype:
                self.state[copy][MASTER] = copy.detach()
        self._gradients = LeavingGradients(
            self._parameters, self._copies, self._places.sums, _carrier(device) if apart else DirectCarrier()
        )
        self._uploads = _uploads(device) if apart else DirectUploads()
        self.take_weights()

    @torch.no_grad()
    def take_weights(self) -> None:
        """Let the copies be what the parameters are now, after these were changed by anything but an update. A master
        that its weight is the rounding of stays."""
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            if copy is parameter:
                continue
            weights, updated = in_memory_order(parameter.detach()), in_memory_order(copy.detach())
            for part in pieces(len(weights)):
                now = weights[part].to(updated.device)
                same = updated[part].to(now.dtype) == now
                updated[part] = torch.where(same, updated[part], now.to(updated.dtype))
                self._places.copies.let_go(updated, part)

    @property
    def gathering(self) -> bool:
        """Whether there are gradients of a step that is not over."""
        return self._gradients.any or any(copy.grad is not None for copy in self._copies)

    def gather(self) -> None:
        """Give the copies the gradients of the step, when all have arrived: before anything looks at them."""
        self._gradients.finish()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Change every parameter that has a gradient, one after the other: each goes to the device while the next one
        is updated."""
        if closure is not None:
            raise TypeError("a closure is not supported: gradients are there before the step")
        self._uploads.begin()
        (group,) = self.param_groups
        for index, (parameter, copy) in enumerate(zip(self._parameters, self._copies, strict=True)):
            if copy.grad is None:
                continue
            weights = in_memory_order(parameter.detach())
            updated = in_memory_order(copy.detach())
            for part in self._stepper.update(index, copy, self.state[copy], group):
                if copy is not parameter:
                    self._uploads.send(updated[part], weights[part])
                    self._places.copies.let_go(updated, part)
                self.let_go(self.state[copy], part)
        self._uploads.finish()
        return None

    def let_go(self, state: ParameterState, part: slice) -> None:
        """Let some numbers of a parameter's state leave memory."""
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and key != MASTER:
                self._places.states.let_go(value, part)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a step without gradients."""
        super().zero_grad(set_to_none)
        self._gradients.clear()

    @torch.no_grad()
    def restore(self, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of every parameter that `tensors` names `<parameter>//<key>`, in place; others keep
        theirs."""
        for name, copy in zip(names, self._copies, strict=True):
            state = self.state[copy]
            for key, value in state.items():
                found = tensors.get(f"{name}//{key}")
                if found is None:
                    continue
                if not isinstance(value, Tensor):
                    state[key] = int(found)
                elif value.ndim == 0:
                    value.copy_(found)
                else:
                    self._fill(value, found, self._places.copies if key == MASTER else self._places.states)
        self.take_weights()

    def _fill(self, target: Tensor, values: Tensor, place: Place) -> None:
        """Copy piece by piece, in the target's order of memory: neither need be in memory at once."""
        if values.stride() != target.stride():
            target.copy_(values)
            return
        flat, source = in_memory_order(target), in_memory_order(values)
        for part in pieces(len(flat)):
            flat[part] = source[part]
            place.let_go(flat, part)

    def close(self) -> None:
        """Take the hooks off the parameters again."""
        self._gradients.close()


def _updated(parameter: nn.Parameter, memory: MemorySpec, apart: bool, place: Place) -> nn.Parameter:
    """What updates change: a copy of the parameter, or itself."""
    dtype = parameter.dtype if memory.masters == "none" else torch.float32
    if dtype == parameter.dtype and not apart:
        return parameter
    return nn.Parameter(place.zeros(parameter, dtype), requires_grad=False)


def _carrier(device: torch.device) -> Carrier:
    if device.type != "cuda":
        return DirectCarrier()
    from workers.training.tiers.cuda import CudaCarrier

    return CudaCarrier(device)


def _uploads(device: torch.device) -> Uploads:
    if device.type != "cuda":
        return DirectUploads()
    from workers.training.tiers.cuda import CudaUploads

    return CudaUploads(device)
