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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cache_store.errors import ConfigError
from workers.distributed import partitions
from workers.distributed.gang import Gang
from workers.specs.orders import Zero3Spec

#: Elements that travel together: gradients on their way to their sums, and parameters that are fetched ahead of use.
#: 64 MB of float32, held by every rank. DeepSpeed's own 500 million would be 2 GB.
BUCKET = 1 << 24
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


def partition(module: nn.Module, gang: Gang, device: torch.device) -> None:
    """Split a module's parameters over the ranks, in place; they are gathered whenever it runs in a `Zero3`."""
    deepspeed = deepspeed_for(device)
    deepspeed.zero.Init(module=module, config_dict_or_path=_configuration(gang.zero3, device), dtype=torch.float32)


def _configuration(spec: Zero3Spec, device: torch.device, clip: float | None = None) -> dict[str, Any]:
    pinned = device.type == "cuda"
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": True,
        # None stays whole: what a rank holds between steps is its part of everything.
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": BUCKET,
        "reduce_bucket_size": BUCKET,
        "sub_group_size": GROUP,
    }
    if spec.parameters == "host":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    if spec.optimizer == "host":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
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
    """The engine of one stage, whose parameters `partition` has split. All ranks must call everything, in the same
    order."""

    def __init__(
        self,
        path: nn.Module,
        last: nn.Module,
        optimizer: torch.optim.Optimizer,
        gang: Gang,
        device: torch.device,
        clip: float | None,
    ) -> None:
        """`last`: the part of the path whose weights are used outside its own forward. `optimizer`: one of torch's; a
        group of parameters has one count of steps."""
        deepspeed = deepspeed_for(device)
        self._inner = optimizer
        #: Of every group, which DeepSpeed empties.
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        #: Whether no gradient of a step that is not over is there.
        self.between_updates = True
        self._module = WithUse(path)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=self._module,
            model_parameters=self.parameters,
            optimizer=optimizer,
            config=_configuration(gang.zero3, device, clip),
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
                for key, value in sorted(state.items()):
                    own = value.clone() if value.ndim == 0 else self._own(value, parameter)
                    found[f"{name}//{key}"] = own if value.ndim == 0 else partitions.whole(parameter, own)
        return found

    def restore(self, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Put back the state of every named parameter found in `tensors`, the same on all ranks; others get zeros."""
        for index, members in self._by_piece(names).items():
            kept = {name: _of(tensors, name) for name, _ in members if _of(tensors, name)}
            if not kept:
                continue
            piece = self._piece(index)
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
