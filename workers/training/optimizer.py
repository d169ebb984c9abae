"""Make optimizers by name, turn their state into tensors and back, and take the steps of one stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workers.device import autocast
from workers.distributed.gang import Gang, GradientSum
from workers.distributed.sharded import gathered, like
from workers.distributed.sync_batch_norm import holds_norms
from workers.distributed.zero3 import Zero3, by_part
from workers.domains.base import Domain
from workers.domains.sums import Sums
from workers.models.chain import State, Within, at_once
from workers.specs.experiment import OptimizerSpec
from workers.specs.tasks import StageTask
from workers.training.batches import MicroBatch
from workers.training.stage_path import StagePath
from workers.training.tiers.optimizer import TieredOptimizer
from workers.training.timing.stage_times import UNTIMED, Phases
from workers.training.updates.active_parts import active_parts, turn_of
from workers.training.updates.eight_bit import adamw8bit
from workers.training.updates.four_bit import adamw4bit, is_packed, plain_state
from workers.training.updates.low_precision import LOW_PRECISION, Swallowed, share_of
from workers.training.updates.reached import check_loss, check_reached


def _sgd(spec: OptimizerSpec, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters,
        lr=spec.lr,
        momentum=spec.momentum,
        nesterov=spec.nesterov,
        weight_decay=spec.weight_decay,
        fused=True,
    )


def _adamw(spec: OptimizerSpec, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=spec.lr,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=True,
    )


#: Name -> what makes the optimizer. A new one is a row here, its name in `OptimizerSpec`, and its bytes of state in
#: the memory estimates of the model families.
OPTIMIZERS: dict[str, Callable[[OptimizerSpec, Sequence[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "adamw8bit": adamw8bit,
    "adamw4bit": adamw4bit,
}


def build_optimizer(
    spec: OptimizerSpec, parameters: Sequence[nn.Parameter], seed: Sequence[str | int] = ()
) -> torch.optim.Optimizer:
    """Make the optimizer over exactly these parameters (state is never kept for anything frozen).

    `seed`: what the draws of stochastic rounding derive from, where some weights are in bfloat16.
    """
    if any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        return LOW_PRECISION[spec.name](spec, parameters, seed)
    return OPTIMIZERS[spec.name](spec, parameters)


class StageStep:
    """Take the optimization steps of a stage: gradients of micro-batches, then one update. Never waits for the
    device."""

    def __init__(
        self,
        task: StageTask,
        path: StagePath,
        domain: Domain,
        device: torch.device,
        gang: Gang,
        times: Phases = UNTIMED,
    ) -> None:
        """`times`: is told whether a step computes its forward pass, its loss or its gradients."""
        self._times = times
        train, seed = task.train, (task.experiment.seed, "stage", task.name)
        # Ranks that hold the same weights must round them the same way; those that hold parts draw for their own.
        rank = ("rank", gang.rank) if gang.shards else ()
        self._seed = (*seed, *rank)
        self._schedule, self._turn = task.schedule, 0
        if task.schedule is not None:
            path.activate(active_parts(task.schedule, self._seed, 0))
        #: Norm of the gradients of the last step, before they were clipped; None where they are not.
        self.gradient_norm: torch.Tensor | None = None
        self._tiered: TieredOptimizer | None = None
        self._zero3: Zero3 | None = None
        if task.tiers.moves_updates:
            self._tiered = TieredOptimizer(train.optimizer, path.parameters, seed, task.tiers, device)
        made: torch.optim.Optimizer | None = self._tiered
        if path.partitioner is not None:
            groups: Any = [{"params": members} for members in by_part(path.names, path.parameters)]
            made = OPTIMIZERS[train.optimizer.name](train.optimizer, groups)
            self._zero3 = Zero3(path.module, path.last, made, path.partitioner, device, train.clip)
        parameters = [parameter for _, parameter in path.active]
        self.optimizer = made or build_optimizer(train.optimizer, parameters, self._seed)
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
        self._train, self._path, self._domain, self._device, self._gang = train, path, domain, device, gang
        # Where gradients stay with their parameters; all ranks of a gang run the same code, so one device tells.
        self._stage, self._unchecked = task.name, made is None and gang.size == 1
        self._forward: Callable[..., Any] = torch.compile(path.module) if train.compile else path.module
        replicated = gang.size > 1 and not gang.shards
        self._gradients = GradientSum(path.parameters) if replicated else None
        # Each rank takes as many samples at once as a single device would. With batch normalization what a micro-batch
        # is made of decides its statistics, so there it stays the same and each rank takes a part of it.
        ranks = 1 if holds_norms(path.module) else gang.size
        self.micro = min(train.batch_size, train.micro * ranks)

    @property
    def names(self) -> list[str]:
        """Name what the optimizer updates, in its order."""
        return [name for name, _ in self._path.active]

    def enter(self, step: int) -> None:
        """Train from step `step` of the stage on what its schedule says. With another choice a new optimizer begins,
        that keeps the state of what is always trained and of nothing else."""
        schedule = self._schedule
        if schedule is None or turn_of(schedule, step) == self._turn:
            return
        self._turn = turn_of(schedule, step)
        before, kept = self.optimizer, set(schedule.always)
        self._path.activate(active_parts(schedule, self._seed, self._turn))
        # With a seed of its own: draws of stochastic rounding do not repeat from turn to turn.
        self.optimizer = build_optimizer(
            self._train.optimizer, [parameter for _, parameter in self._path.active], (*self._seed, "turn", self._turn)
        )
        for name, parameter in self._path.active:
            if name.partition("/")[0] in kept and parameter in before.state:
                self.optimizer.state[parameter] = before.state[parameter]
        if isinstance(getattr(before, "swallowed", None), Swallowed):
            self.optimizer.swallowed = before.swallowed  # type: ignore[attr-defined]  # both of `LOW_PRECISION`

    def trained_at_once(self, steps: int) -> int | None:
        """Count the parameters that the largest choice of the first `steps` steps trains; None without a schedule."""
        if self._schedule is None:
            return None
        turns = range(turn_of(self._schedule, max(0, steps - 1)) + 1)
        choices = {active_parts(self._schedule, self._seed, turn) for turn in turns}
        return max(self._path.parameters_of(parts) for parts in choices)

    def backward(self, micro: MicroBatch, sums: Sums) -> Tensor:
        """Add the gradients of one micro-batch, weighted by its share of the step; returns its loss (on the device)."""
        batch = micro.batch
        loss, correct = self._loss(micro)
        if self._unchecked:
            check_loss(self._stage, loss)
        if batch.counts:
            sums.add(loss, correct, len(batch.targets))
        weight = micro.share * self._gang.loss_scale
        weighted = loss if weight == 1.0 else loss * weight
        self._times.at("backward")
        if micro.last and self._gradients is not None:
            self._gradients.begin()
        if self._zero3 is not None:
            self._zero3.backward(weighted)
        else:
            torch.autograd.backward(self.scaler.scale(weighted))
        return loss.detach()

    def _loss(self, micro: MicroBatch) -> tuple[Tensor, Tensor | None]:
        batch, zero3 = micro.batch, self._zero3

        def run() -> Any:
            self._times.at("forward")
            with autocast(self._train.precision, self._device):
                return self._forward(batch.boundary, batch.context)

        def use(output: Any) -> tuple[Tensor, Tensor | None]:
            self._times.at("loss")
            loss, correct = self._domain.loss(output, batch.targets, self._train)
            return (loss + zero3.anchor(), correct) if zero3 is not None and not len(batch.targets) else (loss, correct)

        found: tuple[Tensor, Tensor | None]
        found = use(run()) if zero3 is None else zero3.forward(run, use, last=micro.last)
        return found

    @property
    def within(self) -> Within:
        """What keeps the path's weights there until what it gave was used, beside training."""
        return at_once if self._zero3 is None else self._zero3.score

    def update(self, rate: float) -> None:
        """Take one optimizer step with the gradients there are."""
        if self._gradients is not None:
            self._gradients.finish()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self._zero3 is not None:
            self._zero3.update()
            return
        if self._tiered is not None:
            self._tiered.gather()
        if self._unchecked:
            check_reached(self._stage, self._path.active)
            self._unchecked = False
        if self._train.clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(self._updated(), self._train.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def between_updates(self) -> bool:
        """Whether no gradient of a step that is not over is there."""
        if self._tiered is not None:
            return not self._tiered.gathering
        if self._zero3 is not None:
            return self._zero3.between_updates
        return all(parameter.grad is None for parameter in self._path.parameters)

    def _updated(self) -> list[nn.Parameter]:
        """What is updated, in the order of the path: its parameters, or copies of them elsewhere."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def swallowed(self) -> float | None:
        """Tell which share of the updates rounding to bfloat16 took, over all ranks and the steps that were measured;
        None where all weights are in float32. Every rank of a gang must ask."""
        measured = getattr(self.optimizer, "swallowed", None)
        if not isinstance(measured, Swallowed):
            return None
        return share_of(self._gang.gather(measured.sums()))

    def scaler_state(self) -> dict[str, float]:
        """Give the state of the gradient scaler as JSON values; empty where there is none."""
        state: dict[str, float] = self.scaler.state_dict() if self.scaler.is_enabled() else {}
        return state

    def load_scaler(self, state: Mapping[str, float]) -> None:
        """Put back what `scaler_state` gave."""
        if state:
            self.scaler.load_state_dict(dict(state))

    def close(self) -> None:
        """Take the hooks off the parameters again."""
        if self._gradients is not None:
            self._gradients.close()
        if self._tiered is not None:
            self._tiered.close()
        if self._zero3 is not None:
            self._zero3.close()

    def optimizer_tensors(self) -> State:
        """Name the optimizer's own tensors, as the function of this name does. Every rank of a gang must ask."""
        if self._zero3 is not None:
            return self._zero3.optimizer_state(self._path.names)
        return optimizer_tensors(self.optimizer, self.names)

    def restore_optimizer(self, tensors: State) -> None:
        """Put back what `optimizer_tensors` gave, as the function of this name does."""
        if self._zero3 is not None:
            self._zero3.restore(self._path.names, tensors)
        else:
            restore_optimizer(self.optimizer, self.names, tensors)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Name the optimizer's own tensors `<parameter>//<key>`, for safetensors. Of sharded parameters all ranks must ask,
    and the first gets them, as copies on the host."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        # bitsandbytes counts steps in a plain int: int64, where torch's own count is a float32.
        f"{name}//{key}": gathered(torch.as_tensor(value))
        for name, parameter in zip(names, parameters, strict=True)
        # All ranks in the same order: a state that was read from a file has that of the file's index, any order.
        for key, value in sorted(plain_state(optimizer.state.get(parameter, {})).items())
        if isinstance(value, torch.Tensor | int)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: dict[str, torch.Tensor]) -> None:
    """Put back the state of every named parameter found in `tensors`; others keep a fresh state."""
    if isinstance(optimizer, TieredOptimizer):
        optimizer.restore(names, tensors)
        return
    state: dict[int, dict[str, torch.Tensor | int]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        prefix = f"{name}//"
        found = {
            key[len(prefix) :]: _plain(like(parameter, value))
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        if found:
            state[index] = found
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    # Files hold contiguous tensors. Fused steps walk parameter and state side by side in memory order, so a
    # channels_last parameter must get its state back in its own layout: the CPU kernel would silently mix elements.
    # What is shaped otherwise is copied too: nothing that goes on may hang on a file that will be pruned.
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and not is_packed(value):
                alike = value.shape == parameter.shape
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value) if alike else value.clone()
    if isinstance(optimizer, torch.optim.SGD) and state:
        # Its fused step takes all buffers or none. Zeros give in the first step what none gives.
        for parameter in parameters:
            if optimizer.param_groups[0]["momentum"] and "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _plain(value: torch.Tensor) -> torch.Tensor | int:
    """A count of steps that was a plain int is one again: as a tensor it would be cast to the parameter's type."""
    return int(value) if value.ndim == 0 and value.dtype == torch.int64 else value
