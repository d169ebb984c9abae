"""Build the path of one stage, name what it trains, take its state and put it back."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from cache_store.errors import ConfigError
from workers.device import host_beside
from workers.distributed.gang import ALONE, Gang
from workers.distributed.sharded import assembled, held, like, mesh_of, numel, on_host, put_back, release, shard
from workers.distributed.sync_batch_norm import synchronize
from workers.distributed.zero3 import Partitioner
from workers.domains.base import Domain
from workers.models.chain import ModulePath, State, module_bytes
from workers.models.host_blocks import HostBlocks
from workers.seeds import derive_seed
from workers.specs.tasks import StageTask
from workers.weights import ADAPTER, AUX, PartSource


class StagePath:
    """The path of a stage on its device. `names` and `parameters`: what is updated in time, in forward order;
    `active`: what of it is trained now, with names. In a gang whose ranks share the parameters, states are this rank's
    part, but for `whole` and `final`."""

    def __init__(
        self, task: StageTask, domain: Domain, weights: PartSource, device: torch.device, gang: Gang = ALONE
    ) -> None:
        self._task, self._domain, self._weights, self._device = task, domain, weights, device
        self._gang = gang
        mesh = mesh_of(gang, device)
        #: Who splits parameters in a gang of `zero3`.
        self.partitioner = Partitioner(gang, device) if gang.partitions else None
        trained = {*task.trained, *({ADAPTER, AUX} & set(task.path))}
        parts: dict[str, nn.Module] = {}
        trains: dict[str, set[str]] = {}
        sharing = set(domain.sharing_parts()) if task.tied else set()
        together = bool(sharing) and sharing <= set(task.path)
        on_host = HostBlocks(device) if task.tiers.frozen == "host" else None
        for index, name in enumerate(task.path):
            if on_host is not None and name not in trained | sharing:
                parts[name] = on_host.add(self._on_host(name))
                continue
            parts[name] = self._training_only(name, index) if name in (ADAPTER, AUX) else weights.build(name)
            if name not in trained or task.train.lora is not None:
                # At once: a stretch of frozen matrices that only fits in 4 bits never lies there whole.
                domain.prepare_frozen(name, parts[name], task.train)
            if name in trained:
                # Before it is split: low-rank adapters are split with what they adapt.
                trains[name] = self._prepare(name, parts[name])
            # At once, too: a model that is shared because it fits nowhere is never whole but for one part, and for
            # parts that hold a tensor together: those are split as one.
            if not (together and name in sharing):
                self._split(parts[name], mesh, keep_gathered=name == task.path[-1])
        self.module = ModulePath(parts, trained, activations=task.activations, on_host=on_host)
        for name, chosen in trains.items():
            for key, parameter in parts[name].named_parameters():
                parameter.requires_grad_(key in chosen)
        self.module.to(device)
        if task.train.channels_last and not gang.shards:
            # Parts of a weight have no such layout; what they are gathered into is laid out as it comes.
            self.module.to(memory_format=torch.channels_last)
        if task.tied:
            domain.tie(parts, task.train)
        self._split(self.module, mesh, keep_gathered=together)
        synchronize(self.module, gang)
        self._named = self.module.trained_parameters()
        self.names = [name for name, _ in self._named]
        self.parameters = [parameter for _, parameter in self._named]
        self.active = self._named
        #: Part -> names of what changes in it: later some of it may be frozen for a while.
        self._changing_names = {name: _changing_names(part) for name, part in self._trained()}
        #: Later name -> the one in `names`, of what parts of the path share.
        self.shared_names = self.module.shared_names()

    def _prepare(self, name: str, part: nn.Module) -> set[str]:
        """Make a part ready to be trained; return the names of what of it trains."""
        for parameter in part.parameters():
            # Packed matrices are integers.
            parameter.requires_grad_(parameter.is_floating_point())
        seed = derive_seed(self._task.experiment.seed, "lora", self._task.name, name)
        self._domain.prepare_training(name, part, self._task.train, seed)
        return {key for key, parameter in part.named_parameters() if parameter.requires_grad}

    def _on_host(self, name: str) -> nn.Module:
        """Build a frozen part in the host's memory, laid out as the path is."""
        part = self._weights.build(name, host_beside(self._device))
        return part.to(memory_format=torch.channels_last) if self._task.train.channels_last else part

    def _split(self, module: nn.Module, mesh: Any, *, keep_gathered: bool) -> None:
        """Leave this rank with its part of a module's parameters, where they are shared out."""
        if self.partitioner is not None:
            self.partitioner.split(module)
        else:
            shard(module, mesh, keep_gathered=keep_gathered)

    def close(self) -> None:
        """Remove files that parameters and states were in, where they were: nothing of the stage is needed any more."""
        if self.partitioner is not None:
            self.partitioner.close()

    @property
    def last(self) -> nn.Module:
        """The part whose output is the path's own."""
        return self.module.parts[self._task.path[-1]]

    @property
    def trained_numbers(self) -> int:
        """How many numbers training changes, on all ranks together."""
        return sum(numel(parameter) for parameter in self.parameters)

    def _training_only(self, name: str, index: int) -> nn.Module:
        """Make the adapter (to whatever follows it in the path) or the local head, fresh from its own seed."""
        task, domain = self._task, self._domain
        blocks = domain.part_names()
        if index > 0:
            source = blocks.index(task.path[index - 1]) + 1
        else:  # right after the stored boundary: the base is taken as it comes
            source = sum(len(hop) for hop in task.stored_boundary.hops)
        seed = derive_seed(task.experiment.seed, name, task.name)
        if name == AUX:
            head = self._weights.state("head") if self._weights.has("head") else None
            return domain.build_aux(source, seed, self._device, head)
        return domain.build_adapter(source, blocks.index(task.path[index + 1]), seed, self._device)

    def activate(self, parts: Collection[str]) -> None:
        """Train these of the trained parts from now on, and freeze the others, whose gradients are dropped. ConfigError
        where that leaves nothing to train."""
        chosen = self._parameters_of(parts)
        self.active = [(name, parameter) for name, parameter in self._named if id(parameter) in chosen]
        if not self.active:
            raise ConfigError(f"{self._task.name}: nothing of {', '.join(sorted(parts))} is trained; leave it out")
        for parameter in self.parameters:
            parameter.requires_grad_(id(parameter) in chosen)
            if id(parameter) not in chosen:
                parameter.grad = None

    def parameters_of(self, parts: Collection[str]) -> int:
        """Count the parameters that are updated where these parts are active."""
        chosen = self._parameters_of(parts)
        return sum(parameter.numel() for parameter in self.parameters if id(parameter) in chosen)

    def _parameters_of(self, parts: Collection[str]) -> set[int]:
        """By identity: what another part shares belongs to both."""
        return {id(parameter) for name in parts for parameter in self.module.parts[name].parameters()}

    def changing(self, *, uncommitted: bool = False) -> State:
        """Name everything that changes while the stage trains `<part>/<tensor>`, not copied; or only what of it no
        commit holds, the parts that live as long as the stage. What parts share is one tensor under both names."""
        seen: State = {}
        own: dict[int, torch.Tensor] = {}
        for part, module in self._trained(uncommitted):
            for name, tensor in self._changing(part, module).items():
                if id(tensor) not in own:
                    own[id(tensor)] = held(tensor)
                seen[f"{part}/{name}"] = own[id(tensor)]
        return seen

    def buffers(self) -> set[str]:
        """Name those of `changing` that forward passes change, and updates do not."""
        return {f"{part}/{name}" for part, module in self._trained() for name, _ in module.named_buffers()}

    def state(self) -> State:
        """Copy everything that changes while the stage trains to the host, named as `changing` does."""
        changing = self.changing()
        copies = {id(tensor): tensor for tensor in changing.values()}
        copies = {key: on_host(tensor) for key, tensor in copies.items()}
        return {name: copies[id(tensor)] for name, tensor in changing.items()}

    def whole(self, state: State) -> State:
        """Put what `changing()` or `state()` gave together from all ranks: on the first one only."""
        if not self._gang.shards or not state:
            return state
        return {
            f"{part}/{name}": assembled(tensor, state[f"{part}/{name}"])
            for part, module in self._trained()
            for name, tensor in self._changing(part, module).items()
        }

    def own(self, state: State) -> State:
        """Take this rank's part of what `whole` gave."""
        if not self._gang.shards or not state:
            return state
        return {
            f"{part}/{name}": on_host(like(tensor, state[f"{part}/{name}"]))
            for part, module in self._trained()
            for name, tensor in self._changing(part, module).items()
        }

    def load(self, state: State, *, uncommitted: bool = False) -> None:
        """Put back what `state()` gave."""
        for part, module in self._trained(uncommitted):
            prefix = f"{part}/"
            own = {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
            expected = self._changing(part, module)
            if own.keys() != expected.keys():
                raise ValueError(f"{part}: a state of other tensors, {sorted(own.keys() ^ expected.keys())[:3]}")
            put_back(module, own)

    def final(self, part: str) -> State:
        """Give the part's own tensors as they are committed, to be written before they change."""
        return self._domain.final_state(self.module.parts[part])

    def adapters(self, part: str) -> State:
        """Give the low-rank adapters that `final` has merged, to be written before they change."""
        return self._domain.adapter_state(self.module.parts[part])

    def resident_bytes(self) -> int:
        release(self.module)
        return module_bytes(self.module)

    def _trained(self, uncommitted: bool = False) -> list[tuple[str, nn.Module]]:
        names = self.module.trained - set(self._task.trained) if uncommitted else self.module.trained
        return [(name, part) for name, part in self.module.parts.items() if name in names]

    def _changing(self, part: str, module: nn.Module) -> State:
        names = self._changing_names[part]
        return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name in names}


def _changing_names(module: nn.Module) -> set[str]:
    """Trained parameters and buffers: a frozen matrix under a low-rank adapter need not be saved again, nor what
    belongs to its packing in few bits."""
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return names | {name for name, _ in module.named_buffers()}
