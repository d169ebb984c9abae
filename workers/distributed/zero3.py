"""Share a stage out over the ranks of a gang by DeepSpeed's ZeRO-3: parameters, gradients and optimizer states are
split, and may lie beside the device (`Zero3Spec`).

What it asks of a stage, beyond FSDP2: its gradients come by hooks on modules, so the loss must be the result of a
module's own forward, with the weights that it needs (`WithUse`); and its optimizer is one over flat pieces, whose state
is found here by parameter (`Zero3.optimizer_state`). Numbers are those of torch's own optimizers in float32.

Several attributes of DeepSpeed that are read here have no public name; `segprop[deepspeed]` names the versions that
have them.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cache_store.errors import ConfigError
from workers.distributed import partitions
from workers.distributed.gang import Gang
from workers.distributed.partitions import is_partitioned
from workers.distributed.swap_files import SwapFolder, check_room, stand_in
from workers.specs.ranks import ZERO3_BUCKET, Zero3Spec

#: Elements of the optimizer's state that are updated at a time.
GROUP = 10**8

#: Runs the path.
Run = Callable[[], Any]
#: Makes of what the path gave what is wanted of it.
Use = Callable[[Any], Any]


def deepspeed_for(device: torch.device) -> Any:
    """Return DeepSpeed, set up for this process's device and its process group. ConfigError where it is not there."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # It takes its device from there.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError:
        raise ConfigError(
            "resources.gang.strategy: zero3: needs DeepSpeed on every machine: pip install --no-build-isolation "
            "'segprop[deepspeed]'"
        ) from None
    if device.type == "cpu":
        # On CPUs it would compile a kernel for inference first, and look for compilers for all others.
        vars(importlib.import_module("deepspeed.ops"))["__compatible_ops__"] = {}
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
    return deepspeed


class Partitioner:
    """Split the parameters of a stage over the ranks, module by module; they are gathered whenever they run in a
    `Zero3`. With files it has a folder until `close`."""

    def __init__(self, gang: Gang, device: torch.device) -> None:
        """UserError where a folder for files cannot be written."""
        self.spec, self._size, self._device = gang.zero3, gang.size, device
        self._deepspeed = deepspeed_for(device)
        self._folder: SwapFolder | None = None
        #: Ranks of this machine.
        self._here = 1
        if self.spec.files and self.spec.disk is not None:
            stand_in()
            self._folder = SwapFolder(Path(self.spec.disk))
            self._here = gang.gather(socket.gethostname()).count(socket.gethostname())
        #: DeepSpeed's keeper of parameters in files; one for all, since each begins by removing what is there.
        self._swapper: Any = None

    @property
    def folder(self) -> Path | None:
        """Where this rank's files are."""
        return None if self._folder is None else self._folder.path

    def split(self, module: nn.Module) -> None:
        """Split a module's parameters, in place. StorageFull where a disk has no room for them."""
        parameters = [each for each in module.parameters() if not is_partitioned(each)]
        if not parameters:
            return
        parts = [-(-parameter.numel() // self._size) for parameter in parameters]
        widest = max(parts)
        if self.spec.parameters == "disk":
            self._check_room(4 * sum(parts))
        if self._swapper is not None:
            self._widen(widest)
        settings = configuration(self.spec, self._device, folder=self.folder, widest=widest)
        # Without a type, which makes it float32: of one that is given DeepSpeed makes bfloat16 on CPUs, in files too.
        self._deepspeed.zero.Init(module=module, config_dict_or_path=settings, param_swapper=self._swapper)
        self._swapper = getattr(parameters[0], "nvme_swapper", None)

    def check_updates(self, optimizer: torch.optim.Optimizer, numbers: int) -> None:
        """Raise StorageFull where a disk has no room for what updates of so many numbers, over all ranks, have there:
        weights, gradients and moments in float32."""
        if self.spec.optimizer == "disk":
            moments = 2 if "betas" in optimizer.defaults else int(optimizer.defaults.get("momentum", 0) > 0)
            self._check_room(4 * (2 + moments) * -(-numbers // self._size))

    def _check_room(self, needed: int) -> None:
        if self.folder is not None:
            check_room(self.folder, needed, self._here)

    def _widen(self, numbers: int) -> None:
        """Make the buffers of parameters on their way larger. Between modules none is in use."""
        keeper = self._swapper
        if numbers <= keeper.elements_per_buffer:
            return
        keeper.elements_per_buffer = numbers
        keeper.aligned_elements_per_buffer = keeper._io_aligned_numel(numbers)
        keeper.aio_read_handle.free_cpu_locked_tensor(keeper.buffers)
        whole = keeper.aligned_elements_per_buffer * keeper.param_buffer_count
        keeper.buffers = keeper.aio_read_handle.new_cpu_locked_tensor(whole, keeper.buffers)

    def close(self) -> None:
        """Remove the files. Parameters that are in some can no longer be read."""
        if self._folder is not None:
            self._folder.close()


def configuration(
    spec: Zero3Spec,
    device: torch.device,
    *,
    clip: float | None = None,
    folder: Path | None = None,
    widest: int = 0,
) -> dict[str, Any]:
    """Return DeepSpeed's configuration. `folder`: for files. `widest`: most numbers that a rank has of a parameter."""
    pinned = device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": True,
        # None stays whole: what a rank holds between steps is its part of everything.
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": ZERO3_BUCKET,
        "reduce_bucket_size": ZERO3_BUCKET,
        "sub_group_size": GROUP,
    }
    if spec.parameters == "host":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    if spec.optimizer == "host":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    on_disk = {"device": "nvme", "nvme_path": str(folder), "pin_memory": pinned}
    if spec.parameters == "disk":
        # Nothing stays in memory between uses. A weight has one of few buffers until its part of the model is through,
        # so none is kept for its next use, and none fetched ahead: DeepSpeed fails where buffers run out.
        zero["offload_param"] = {**on_disk, "buffer_size": widest, "max_in_cpu": 0}
        zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    if spec.optimizer == "disk":
        zero["offload_optimizer"] = on_disk
    return {
        # Only counts samples for its log: a step says itself where it ends, and how micro-batches are weighed.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip or 0.0,
        # torch's own update on flat pieces, on the host too: the numbers of every other strategy.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


class WithUse(nn.Module):
    """Run a path and use what it gives while its weights are still there: the loss, and scores, need the LM head
    outside of the head's own forward."""

    def __init__(self, path: nn.Module) -> None:
        super().__init__()
        self.path = path

    def forward(self, run: Run, use: Use) -> Any:
        """Return `use(run())`."""
        return use(run())


class Zero3:
    """The engine of one stage, whose parameters a `Partitioner` has split. All ranks must call everything, in the same
    order."""

    def __init__(
        self,
        path: nn.Module,
        last: nn.Module,
        optimizer: torch.optim.Optimizer,
        partitioner: Partitioner,
        device: torch.device,
        clip: float | None,
    ) -> None:
        """`path`: what `partitioner` has split. `last`: the part of the path whose weights are used outside its own
        forward. `optimizer`: one of torch's; a group of parameters has one count of steps. StorageFull where a disk has
        no room for its files."""
        deepspeed = deepspeed_for(device)
        self._inner = optimizer
        #: Of every group, which DeepSpeed empties.
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        #: Whether no gradient of a step that is not over is there.
        self.between_updates = True
        partitioner.check_updates(optimizer, sum(partitions.numel(each) for each in self.parameters))
        self._module = WithUse(path)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=self._module,
            model_parameters=self.parameters,
            optimizer=optimizer,
            config=configuration(partitioner.spec, device, clip=clip, folder=partitioner.folder),
            dist_init_required=False,
        )
        self._outside = list(last.parameters())
        for parameter in self._outside:
            deepspeed.zero.register_external_parameter(self._module, parameter)

    def forward(self, run: Run, use: Use, *, last: bool) -> Any:
        """Return `use(run())`, to go backward from. `last`: of its step."""
        self.between_updates = False
        self._engine.set_gradient_accumulation_boundary(last)
        return self._engine(run, use)

    def score(self, run: Run, use: Use) -> Any:
        """Return `use(run())`, not to go backward from."""
        return self._module(run, use)

    def anchor(self) -> Tensor:
        """Return zero, with zero gradients for the weights that are used outside their part: a rank whose rows have no
        targets must send as many gradients as the others."""
        zeros = [parameter.sum() * 0.0 for parameter in self._outside if parameter.requires_grad]
        return torch.stack(zeros).sum() if zeros else torch.zeros(())

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        self._engine.backward(loss)

    def update(self) -> None:
        """Take the step with the gradients there are."""
        self._engine.step()
        self.between_updates = True

    # -- the optimizer's state ------------------------------------------------------------------------------

    def optimizer_state(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Name the optimizer's tensors `<parameter>//<key>`: whole on the first rank's host, empty on others."""
        found: dict[str, Tensor] = {}
        for index, members in self._by_piece(names).items():
            state = self._inner.state.get(self._piece(index), {})
            for name, parameter in members:
                place = partitions.stretch(parameter)
                for key, value in sorted(state.items()):
                    # A count of steps is one number for a whole piece.
                    kept = partitions.whole(parameter, place.read(value)) if value.ndim else value.clone()
                    found[f"{name}//{key}"] = kept
        return found

    def restore(self, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Put back the state of every named parameter found in `tensors`, the same on all ranks; others get zeros."""
        for index, members in self._by_piece(names).items():
            kept = {name: _of(tensors, name) for name, _ in members if _of(tensors, name)}
            if not kept:
                continue
            with partitions.at_hand(self._zero, index) as piece:
                state = {
                    key: value.to(piece.device, copy=True) if value.ndim == 0 else torch.zeros_like(piece)
                    for key, value in next(iter(kept.values())).items()
                }
                for name, parameter in members:
                    for key, value in kept.get(name, {}).items():
                        if value.ndim:
                            self._own(state[key], parameter).copy_(partitions.part(parameter, value))
                self._inner.state[piece] = state

    def _by_piece(self, names: Sequence[str]) -> dict[int, list[tuple[str, nn.Parameter]]]:
        """Group parameters by the flat piece that they are updated in."""
        found: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in zip(names, self.parameters, strict=True):
            index, _, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            found.setdefault(index, []).append((name, parameter))
        return found

    def _piece(self, index: int) -> Tensor:
        """Return the float32 weights of a flat piece, by which the optimizer keeps its state."""
        return cast("Tensor", self._zero.fp32_partitioned_groups_flat[index])

    def _own(self, flat: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return the parameter's stretch of a flat piece."""
        _, start, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
        return flat.narrow(0, start, length)

    def close(self) -> None:
        """Take the hooks off, and what DeepSpeed changed outside. Parameters and states can still be read."""
        self._engine.destroy()
        parameter_offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
        parameter_offload.FWD_MODULE_STACK.clear()
        kept = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
        functional.linear = getattr(kept.InsertPostInitMethodToModuleSubClasses, "linear_bk", functional.linear)


def _of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}//"
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def by_part(names: Iterable[str], parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group `<part>/<name>` by part for the optimizer: a part that goes on with a state of before has its own count of
    steps."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in zip(names, parameters, strict=True):
        found.setdefault(name.partition("/")[0], []).append(parameter)
    return list(found.values())
