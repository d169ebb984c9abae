"""Finds, reads and checks the weights of the parts a task was given, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from safetensors import safe_open
from torch import nn

from cache_store.errors import CorruptShard
from cache_store.records.file_record import FileRecord
from cache_store.records.nodes import NodeStore
from workers import tensor_files
from workers.device import host_beside
from workers.domains.base import Domain
from workers.models.chain import ModulePath, State, state_digest
from workers.models.host_blocks import HostBlocks
from workers.specs.memory import FrozenTier
from workers.specs.orders import Parents
from workers.specs.results import HeldParts

ADAPTER = "adapter"
AUX = "aux"
#: In the name of every parameter of a low-rank adapter, as peft calls them.
LORA = ".lora_"


class PartSource(Protocol):
    """Where the parts of a path come from."""

    def has(self, part: str) -> bool:
        """Whether there is such a part."""

    def state(self, part: str) -> State:
        """The part's tensors on the host, keyed by the model's own names."""

    def build(self, part: str, device: torch.device | None = None) -> nn.Module:
        """The part on the task's device, or on this one, with its weights."""


class Weights:
    """The parts a task's parents hold. `parents` maps `weights/<part>` to the commit that holds the part:
    an earlier stage's (one file a part) or the model node's (one file with every tensor)."""

    def __init__(
        self,
        nodes: NodeStore,
        parents: Parents,
        domain: Domain,
        device: torch.device,
    ) -> None:
        self._nodes = nodes
        self._commits = {
            role.removeprefix("weights/"): commit for role, commit in parents.items() if role.startswith("weights/")
        }
        self._domain = domain
        self._device = device
        self._digests: dict[str, str] = {}

    def has(self, part: str) -> bool:
        """Whether a parent holds this part."""
        return part in self._commits

    def digest(self, part: str) -> str:
        """Digest of the part's state: what snapshots downstream of it are addressed by."""
        if part not in self._digests:
            held = self._commits[part].read(HeldParts).parts.get(part)
            self._digests[part] = state_digest(self.state(part)) if held is None else held.digest
        return self._digests[part]

    def state(self, part: str) -> State:
        """The part's tensors on the host, keyed by the model's own names.

        Raises CorruptShard when the file does not match its commit or lacks a tensor of the part.
        """
        commit = self._commits[part]
        file = commit.read(HeldParts).file_of(part)
        return read_tensors(self._nodes, commit.files[file], self._domain.part_state_names(part))

    def build(self, part: str, device: torch.device | None = None) -> nn.Module:
        """The part on the task's device, or on this one, with its weights; frozen or not is the caller's business."""
        module = self._domain.build_part(part, self._device if device is None else device)
        module.load_state_dict(self.state(part), strict=True)
        return module


def frozen_path(
    weights: PartSource,
    names: Iterable[str],
    device: torch.device,
    *,
    tier: FrozenTier = "device",
    channels_last: bool = False,
    tie: Callable[[dict[str, nn.Module]], None] | None = None,
) -> ModulePath:
    """Build parts that run frozen, one after the other. `tier`: where their weights lie; `tie`: lets parts hold
    together what the model shares between them."""
    blocks = HostBlocks(device) if tier == "host" else None
    where = None if blocks is None else host_beside(device)
    built: Iterable[tuple[str, nn.Module]] = ((name, weights.build(name, where)) for name in names)
    if tie is not None:
        together = dict(built)
        tie(together)
        built = together.items()
    parts: dict[str, nn.Module] = {}
    for name, part in built:
        if channels_last:
            part.to(memory_format=torch.channels_last)
        parts[name] = part if blocks is None else blocks.add(part)
    return ModulePath(parts, trained=(), on_host=blocks)


def read_tensors(nodes: NodeStore, record: FileRecord, names: Iterable[str] | None = None) -> State:
    """Tensors of one committed safetensors file, verified; only `names` are read when given."""
    path = nodes.verified_path(record)
    if path is None:
        state = tensor_files.parse(nodes.read_aligned(record))
        names = list(state) if names is None else list(names)
        _require(state.keys(), names, record)
        return {name: state[name] for name in names}
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        names = sorted(keys) if names is None else list(names)
        _require(keys, names, record)
        return {name: file.get_tensor(name) for name in names}


def _require(present: Iterable[str], names: Iterable[str], record: FileRecord) -> None:
    missing = sorted(set(names) - set(present))
    if missing:
        raise CorruptShard(f"{record.path} lacks {len(missing)} tensors, first {missing[0]!r}")
