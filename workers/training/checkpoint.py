"""Mid-stage checkpoints: everything a killed stage needs to go on bit for bit, as safetensors and JSON.

Tensors are named by what they are: `model/<part>/<name>`, `best/<part>/<name>`, `optimizer/<parameter>//<key>`,
`rng/cpu`, `rng/cuda` (`rng/cpu/<rank>` of a gang). Everything else (position, scaler, history, running
sums) is the manifest's JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from cache_store.records.nodes import NodeStore
from workers.distributed.gang import ALONE, Gang
from workers.models.chain import State

FILE = "state.safetensors"


@dataclass
class StageProgress:
    """Where a stage is. `epoch` and `step` (within the epoch) name the next step to run; JSON values only."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    #: Sums over the steps of the current epoch so far: loss * samples, correct, samples.
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    #: Seconds spent in the current epoch by earlier attempts.
    epoch_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    exit: str | None = None
    resumed: int = 0


@dataclass
class Snapshot:
    """One checkpoint in memory: tensors on the host."""

    progress: StageProgress
    model: State
    best: State
    optimizer: State
    scaler: dict[str, Any]
    #: `random_state()` of every rank.
    random: list[State]


def random_state() -> State:
    """Of this process: `cpu`, and `cuda` where there is one."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def save(nodes: NodeStore, node_id: str, attempt_id: str, snapshot: Snapshot) -> None:
    """Write and publish a checkpoint; older ones of the node are pruned afterwards (two are kept)."""
    tensors: State = {
        **running_state(snapshot.model, snapshot.optimizer, snapshot.random),
        **{f"best/{name}": tensor for name, tensor in snapshot.best.items()},
    }
    position = [snapshot.progress.global_step, snapshot.progress.epoch, snapshot.progress.step]
    nodes.save_checkpoint(
        node_id,
        attempt_id,
        files={FILE: save_bytes(tensors)},
        position=position,
        data={"progress": vars(snapshot.progress), "scaler": snapshot.scaler},
    )
    nodes.prune_checkpoints(node_id, keep=2)


def load(nodes: NodeStore, node_id: str, gang: Gang = ALONE) -> Snapshot | None:
    """The newest intact checkpoint of any attempt, with the random state put back; None when there is none. All ranks
    load the same one. A rank that it has no random state for (there were fewer) keeps its own."""
    found = gang.agree(nodes.latest_checkpoint(node_id) if gang.leads else None)
    if found is None:
        return None
    tensors = load_bytes(nodes.read_file(found.files[FILE]))
    model, optimizer = resume_running_state(tensors, gang.rank)
    progress = StageProgress(**found.data["progress"])
    progress.resumed += 1
    return Snapshot(
        progress=progress,
        model=model,
        best=_under("best/", tensors),
        optimizer=optimizer,
        scaler=found.data["scaler"],
        random=[],
    )


def running_state(model: State, optimizer: State, random: Sequence[State]) -> State:
    """What training goes on with, as the tensors of one file. `random`: `random_state()` of every rank."""
    return {
        **{f"model/{name}": tensor for name, tensor in model.items()},
        **{f"optimizer/{name}": tensor for name, tensor in optimizer.items()},
        **{_random_name(device, rank): tensor for rank, state in enumerate(random) for device, tensor in state.items()},
    }


def resume_running_state(tensors: State, rank: int = 0) -> tuple[State, State]:
    """Inverse of `running_state`: (model, optimizer), with this rank's random state put back if there is one."""
    for device, put_back in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        state = tensors.get(_random_name(device, rank))
        if state is not None:
            put_back(state)
    return _under("model/", tensors), _under("optimizer/", tensors)


def _random_name(device: str, rank: int) -> str:
    return f"rng/{device}" if rank == 0 else f"rng/{device}/{rank}"


def _under(prefix: str, tensors: State) -> State:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
