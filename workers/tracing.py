"""Step a stage whose tensors have shapes and no bytes, and count what a device would hold meanwhile.

The stage is built by the code that trains: its path, its loss, its optimizer, its accumulation (`StagePath`,
`StageStep`). Only the weights are not read, and the batch is made up. torch's memory tracker
(`torch.distributed._tools.mem_tracker`) watches every operation and says what is held of which kind, so a machine
without a GPU, and without the memory, can tell what an 8B model needs. The tensors say that they are on a CPU, since
torch takes no backward pass on a device that is not there; where our own code works in larger pieces on a device it
does so here too (`workers.device.standing_in_for`).

Not counted: the device's context, what a kernel takes inside one operation, and gaps between allocations.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import _TOTAL_KEY, MemTracker, _MemRefType
from torch.distributed._tools.mod_tracker import ModTracker

from cache_store.errors import SegpropError, UserError
from cache_store.formats.torch_dtypes import TORCH
from workers.device import autocast, standing_in_for
from workers.distributed.gang import ALONE, Gang
from workers.domains.base import Batch, Domain
from workers.domains.registry import domain_of
from workers.domains.sums import Sums
from workers.models.chain import Boundary, ModulePath, State
from workers.models.counting import Shape
from workers.specs.tasks import StageTask
from workers.training.batches import MicroBatch
from workers.training.optimizer import StageStep
from workers.training.stage_path import StagePath
from workers.weights import frozen_path

_HOST = torch.device("cpu")


class _Calls(ModTracker):
    """Passes on that modules are called, and keeps no names of those that are being called."""

    def _fw_pre_hook(self, mod: nn.Module, input: Any) -> None:
        if self._user_pre_fw_hook is not None:
            self._user_pre_fw_hook(mod, input)

    def _fw_post_hook(self, mod: nn.Module, input: Any, output: Any) -> None:
        if self._user_post_fw_hook is not None:
            self._user_post_fw_hook(mod, input, output)


class _Tracker(MemTracker):  # type: ignore[no-untyped-call, unused-ignore]  # torch's
    """torch's tracker for paths with frozen parts and for parts that are called again, without its figures by module:
    nobody asks for them, and they take most of its time."""

    def __init__(self, path: StagePath) -> None:
        """`path`: what gets gradients."""
        super().__init__()
        #: Where it is not 0 nothing is counted.
        self.paused = 0
        self._mod_tracker = _Calls()  # type: ignore[no-untyped-call]  # torch's
        # A hook is refused for what is frozen until its turn.
        waiting = [parameter for parameter in path.parameters if not parameter.requires_grad]
        for parameter in waiting:
            parameter.requires_grad_(True)
        self._track_module_params_and_buffers(nn.ParameterList(path.parameters), install_grad_hooks=True)
        for parameter in waiting:
            parameter.requires_grad_(False)

    def give_gradients(self, path: StagePath) -> None:
        """Let all that is trained now have a gradient, as after a backward pass."""
        for _, parameter in path.active:
            parameter.grad = torch.empty_like(parameter)
            self._update_and_maybe_create_winfos(parameter.grad, _MemRefType.GRAD)

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        """What is called in a backward pass is computed again: what it makes are activations."""
        if self._mod_tracker.is_bw and self._ac_mod is None:
            self._ac_mod = weakref.ref(module)
            self._in_ac = True

    def _post_fw_hook(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._ac_mod is not None and self._ac_mod() is module:
            self._ac_mod = None
            self._in_ac = False

    def _update_peak_stats(self, peak_state: Any) -> None:
        """Note what is held where it is more than ever."""
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now[_TOTAL_KEY]:
                self._peak_mem[device] = now[_TOTAL_KEY]
                self._peak_mem_snap[device] = dict(now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As torch's, without a look through results that are no tensors, of which there are most."""
        if func.namespace == "prim" or self.paused:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]  # torch's


@dataclasses.dataclass(frozen=True)
class TracedMemory:
    """What a stage held at its worst moment, in bytes, by kind."""

    peak: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    #: Gradients of activations, and all else that lives for a moment.
    temporary: int
    #: The batch.
    inputs: int
    #: The most that lay on the host beside the device at one time.
    host: int
    #: What tracing took.
    seconds: float


class _Shapes:
    """Stand for a stage's weights: parts as they are built, whose tensors hold nothing."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def has(self, part: str) -> bool:
        return part in self._domain.part_names()

    def state(self, part: str) -> State:
        return dict(self.build(part).state_dict())

    def build(self, part: str, device: torch.device | None = None) -> nn.Module:
        return self._domain.build_part(part, _HOST if device is None else device)


def trace_stage(task: StageTask, sample: Shape, device: str = "cuda", gang: Gang = ALONE) -> TracedMemory:
    """Take two steps of a stage with tensors without bytes; return what a device of this kind would hold at most.

    `sample`: shape of one sample before the first block. `gang`: the rank whose device it is; what the others would
    send is never asked for. Steps of several micro-batches are taken as steps of two, fp16
    is traced as bf16, which has as many bytes. Of a stage whose parts take turns, two steps of as many turns as it has
    blocks. UserError for matrices, and optimizer states, whose libraries make no tensors without bytes, and for ranks
    of `zero3`, for which DeepSpeed needs tensors with them.
    """
    if task.train.frozen_weights != "full":
        raise UserError(
            f"{task.name}: training.frozen_weights {task.train.frozen_weights} cannot be traced: bitsandbytes makes no "
            "tensors without bytes; allowed: full"
        )
    if task.train.optimizer.name == "adamw4bit":
        raise UserError(
            f"{task.name}: training.optimizer.name adamw4bit cannot be traced: torchao makes its tables of codes of "
            "numbers, which tensors without bytes do not have; the plan's own figure counts its states. Traced: "
            "adamw, sgd, adamw8bit"
        )
    if gang.partitions:
        raise UserError(
            f"{task.name}: resources.gang.strategy zero3 cannot be traced: DeepSpeed needs tensors with bytes; "
            "allowed: ddp, fsdp2"
        )
    started = time.perf_counter()
    micro = task.train.micro
    # Of many micro-batches two: gradients that grow are there with the second. A rank has its part of a step.
    rows = -(-task.train.batch_size // gang.size)
    micro = min(micro, rows)
    batch_size = min(rows, 2 * micro)
    train = dataclasses.replace(task.train, batch_size=batch_size, micro_batch=micro, accumulate=1, compile=False)
    if train.precision == "fp16":
        train = dataclasses.replace(train, precision="bf16")
    task = dataclasses.replace(task, train=train)
    domain = domain_of(task.experiment)
    batch = _batch(task, domain, micro, sample)
    with (
        standing_in_for(device),
        _alone_in(gang),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        given = _without_bytes(batch, mode, {})
        with _tensors_replaced():
            weights = _Shapes(domain)
            path = StagePath(task, domain, weights, _HOST, gang)
            prefix = _prefix(task, weights)
        step = StageStep(task, path, domain, _HOST, gang)
        path.module.train(True)
        tracker = _Tracker(path)
        modules = [path.module, *([] if prefix is None else [prefix])]
        away = [tensor for module in modules for tensor in module.tensors_on_host()]
        tracker.track_external(*modules, *away, *given.boundary, given.targets)
        with tracker, _shapes_not_counted(tracker, gang):
            for first in _first_steps(task):
                step.enter(first)
                # The first step makes the optimizer's state; the second one holds it throughout.
                if task.tiers.moves_updates:
                    # Gradients have to leave as they are made.
                    _micro_batch(task, domain, step, prefix, given)
                else:
                    tracker.give_gradients(path)
                step.update(train.optimizer.lr)
                if train.micro < train.batch_size and not task.tiers.updates_on_host:
                    # Gradients of an earlier micro-batch, to which those of this one are added.
                    if task.tiers.moves_updates:
                        _micro_batch(task, domain, step, prefix, given)
                    else:
                        tracker.give_gradients(path)
                _micro_batch(task, domain, step, prefix, given)
                step.update(train.optimizer.lr)
    return _figures(tracker, time.perf_counter() - started)


@contextmanager
def _alone_in(gang: Gang) -> Iterator[None]:
    """Make a process group of this rank and others that are not there: what they send arrives at once, as it is."""
    if gang.size == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise SegpropError("a rank that is alone cannot be traced in a process that belongs to a gang")
    dist.init_process_group("fake", store=FakeStore(), rank=gang.rank, world_size=gang.size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Pause:
    """A context in which a tracker counts nothing."""

    def __init__(self, tracker: _Tracker) -> None:
        self._tracker = tracker

    def __enter__(self) -> None:
        self._tracker.paused += 1

    def __exit__(self, *error: object) -> None:
        self._tracker.paused -= 1


@contextmanager
def _shapes_not_counted(tracker: _Tracker, gang: Gang) -> Iterator[None]:
    """Count nothing where torch finds out the shape of a sharded result by an operation on whole tensors: nobody holds
    those."""
    if not gang.shards:
        yield
        return
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    # torch takes it around exactly those operations.
    with patch.object(ShardingPropagator, "_fake_mode_lock", _Pause(tracker)):
        yield


@contextmanager
def _tensors_replaced() -> Iterator[None]:
    """Let modules that are moved or cast take new parameters. torch's own way for tensors without bytes, to swap what
    is in them, is refused for those that anything else has noted."""

    def apply(module: nn.Module, made: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            apply(child, made)
        with torch.no_grad():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                own = parameter.detach()
                changed = made(own)
                # What is where it belongs stays: those who split it have noted it.
                if changed is not own:
                    module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = made(buffer)
        return module

    with patch.object(nn.Module, "_apply", apply):
        yield


def _batch(task: StageTask, domain: Domain, samples: int, sample: Shape) -> Batch:
    """Make up a batch on the host, by the domain's own code: rotary embeddings, masks and types are those of training.
    Boundaries are left unset, so they take no memory."""
    made = domain.stand_in(samples, sample)
    boundary = made.boundary
    stored = task.source == "snapshots"
    if stored:
        spec = task.stored_boundary
        fields = domain.fields(sum(len(hop) for hop in spec.hops), spec.dtype)
        boundary = tuple(torch.empty((made.set_rows, *field.shape), dtype=TORCH[field.dtype]) for field in fields)
    train = task.train
    return domain.batch(
        made.rows,
        boundary,
        stored=stored,
        device=_HOST,
        precision=train.precision,
        channels_last=train.channels_last,
    )


def _prefix(task: StageTask, weights: _Shapes) -> ModulePath | None:
    if task.source != "recompute":
        return None
    blocks = [name for hop in task.stored_boundary.hops for name in hop]
    return frozen_path(weights, blocks, _HOST, tier=task.tiers.frozen_tier)


def _first_steps(task: StageTask) -> range:
    """Give the step of the stage at which each turn begins that is traced: cycles have all their blocks in them."""
    schedule = task.schedule
    return range(1) if schedule is None else range(0, schedule.steps * len(schedule.blocks), schedule.steps)


def _micro_batch(task: StageTask, domain: Domain, step: StageStep, prefix: ModulePath | None, batch: Batch) -> None:
    entering = batch
    if prefix is not None:
        with torch.no_grad(), autocast(task.train.precision, _HOST):
            outputs: Boundary = prefix(batch.boundary, batch.context)
        entering = dataclasses.replace(batch, boundary=domain.as_input(outputs, task.train.precision))
    share = task.train.micro / task.train.batch_size
    step.backward(MicroBatch(1, entering, share, True), Sums(_HOST))


def _without_bytes(value: Any, mode: FakeTensorMode, known: dict[int, Any]) -> Any:
    """The same with tensors that hold nothing; what is shared stays shared."""
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = mode.from_tensor(value)
        return known[id(value)]
    if isinstance(value, tuple | list):
        return type(value)(_without_bytes(item, mode, known) for item in value)
    if isinstance(value, dict):
        return {key: _without_bytes(item, mode, known) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {
            field.name: _without_bytes(getattr(value, field.name), mode, known)
            for field in dataclasses.fields(value)
            if field.init
        }
        return dataclasses.replace(value, **changed)
    return value


def _beside(tracker: MemTracker) -> int:
    """The peak of all that is not the device, which the CPU stands for."""
    peaks = tracker.get_tracker_snapshot("peak")
    return sum(found["Total"] for device, found in peaks.items() if device != _HOST)


def _figures(tracker: MemTracker, seconds: float) -> TracedMemory:
    found = tracker.get_tracker_snapshot("peak").get(_HOST, {})
    by_kind = {getattr(kind, "name", str(kind)): size for kind, size in found.items()}
    return TracedMemory(
        peak=by_kind["Total"],
        parameters=by_kind["PARAM"] + by_kind["BUFFER"],
        gradients=by_kind["GRAD"],
        optimizer=by_kind["OPT"],
        activations=by_kind["ACT"],
        temporary=by_kind["TEMP"],
        inputs=by_kind["OTH"],
        host=_beside(tracker),
        seconds=seconds,
    )
