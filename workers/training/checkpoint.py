"""Save and load mid-stage checkpoints: all that a killed stage needs to go on bit for bit, as safetensors and JSON.

Tensors are named by what they are: `model/<part>/<name>`, `best/<part>/<name>`, `optimizer/<parameter>//<key>`,
`rng/cpu`, `rng/cuda` (`rng/cpu/<rank>` of a gang). Everything else (position, scaler, history, running
sums) is the manifest's JSON.

`StageState` is what of a stage changes while it trains. It is written beside the steps (`checkpoints/`), and read back
by `load`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cache_store.records.checkpoints import Checkpoint
from cache_store.records.nodes import Attempt, Commit, NodeStore
from workers import tensor_files
from workers.distributed.gang import ALONE, Gang
from workers.distributed.sharded import held, on_host
from workers.environment import WorkerEnvironment
from workers.models.chain import State
from workers.specs.as_json import read_record, write_record
from workers.specs.orders import Parents
from workers.specs.results import EpochFigures, StageResult
from workers.specs.tasks import StageTask
from workers.training.checkpoints.interval import ASSUMED_SPEED, cost_s, interval_s
from workers.training.checkpoints.live import LiveTensors
from workers.training.checkpoints.writer import CheckpointWriter
from workers.training.optimizer import StageStep
from workers.training.stage_path import StagePath
from workers.weights import ADAPTER, AUX, LORA, read_tensors

#: The one file of a checkpoint.
FILE = "state.safetensors"
#: Checkpoints of a node that are kept: the newest may turn out to be damaged.
KEPT = 2
OPTIMIZER_FILE = "optimizer.safetensors"
#: What the next round of a stage needs beside the parts: adapter, optimizer and random state.
CONTINUE_FILE = "continue.safetensors"


@dataclass
class StageProgress:
    """Say where a stage is. `epoch` and `step` (within the epoch) name the next step to run."""

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    #: Sums over the steps of the current epoch so far: loss * samples, correct, samples.
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    #: Seconds spent in the current epoch by earlier attempts.
    epoch_seconds: float = 0.0
    history: list[EpochFigures] = field(default_factory=list)
    best_epoch: int | None = None
    exit: str | None = None
    resumed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Write the position as JSON values."""
        return write_record(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StageProgress:
        """Inverse of `to_json`."""
        progress = read_record(cls, data)
        # A list goes through as it is: what is in it is read here.
        progress.history = [EpochFigures.from_json(epoch) for epoch in data["history"]]
        return progress


@dataclass(frozen=True)
class Loaded:
    """Hold what a checkpoint says. Tensors are those of its file, which will be pruned."""

    progress: StageProgress
    model: State
    best: State
    optimizer: State
    scaler: dict[str, Any]


def random_state() -> State:
    """Take the random state of this process: `cpu`, and `cuda` where there is one."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load(nodes: NodeStore, node_id: str, gang: Gang = ALONE) -> Loaded | None:
    """Load the newest intact checkpoint of any attempt and put its random state back; None when there is none. All
    ranks load the same one. A rank that it has no random state for (there were fewer) keeps its own."""
    found = gang.agree(nodes.latest_checkpoint(node_id, usable=_is_stage) if gang.leads else None)
    if found is None:
        return None
    tensors = read_tensors(nodes, found.files[FILE])
    model, optimizer = resume_running_state(tensors, gang.rank)
    progress = StageProgress.from_json(found.data["progress"])
    progress.resumed += 1
    return Loaded(
        progress=progress,
        model=model,
        best=_under("best/", tensors),
        optimizer=optimizer,
        scaler=found.data["scaler"],
    )


def _is_stage(checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint says where its stage is. One that does not would train its epochs a second time."""
    try:
        progress = checkpoint.data["progress"]
        place = [progress[key] for key in ("global_step", "epoch", "step")]
        read = StageProgress.from_json(progress)
        whole = all(type(number) is int and number >= 0 for number in place) and len(read.sums) == 3
        return whole and place == list(checkpoint.position) and isinstance(checkpoint.data["scaler"], dict)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def running_state(model: State, optimizer: State, random: Sequence[State]) -> State:
    """Name what training goes on with as the tensors of one file. `random`: `random_state()` of every rank."""
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


class StageState:
    """Hold what of a stage changes while it trains: where it is, the best state so far, and the path's, the optimizer's
    and the scaler's own. Saves it as checkpoints, hands it on to the next round, puts it back."""

    def __init__(
        self, task: StageTask, path: StagePath, step: StageStep, environment: WorkerEnvironment, attempt: Attempt
    ) -> None:
        self._task, self._path, self._step = task, path, step
        self._environment, self._attempt = environment, attempt
        self._nodes, self._gang = environment.nodes, environment.gang
        self.progress = StageProgress()
        self.best: State = {}
        self._saved = time.monotonic()
        self._writer = CheckpointWriter()

    def restore(self, parents: Parents) -> None:
        """Put back what the stage goes on from: an optimizer that is carried, the round before, its own checkpoint."""
        if self._task.train.head_optimizer == "carry" and "optimizer" in parents:
            record = parents["optimizer"].files.get(OPTIMIZER_FILE)
            if record is not None:
                carried = _carried(read_tensors(self._nodes, record))
                self._step.restore_optimizer(carried)
        if "continue" in parents:
            self._continue(parents["continue"])
        found = load(self._nodes, self._attempt.node_id, self._gang)
        if found is None:
            return
        # Copies: nothing that goes on may hang on a file that will be pruned.
        self.progress, self.best = found.progress, {n: on_host(t) for n, t in self._path.own(found.best).items()}
        self._path.load(self._path.own(found.model))
        self._step.enter(self.progress.global_step)
        self._step.restore_optimizer(found.optimizer)
        self._step.load_scaler(found.scaler)

    def _continue(self, before: Commit) -> None:
        """Go on where the round before stopped. The parts are loaded already, perhaps not as it left them: the head
        may be an average. The optimizer's state is this segment's own either way."""
        result = before.read(StageResult)
        model, optimizer = resume_running_state(read_tensors(self._nodes, before.files[CONTINUE_FILE]))
        self._path.load(model, uncommitted=True)
        self._step.restore_optimizer(optimizer)
        self._step.load_scaler(result.scaler or {})
        self.progress = StageProgress(
            epoch=self._task.epochs.start,
            global_step=result.steps,
            history=list(result.epochs),
            best_epoch=result.best_epoch,
        )

    def due(self) -> bool:
        """Say whether a checkpoint is due, by this rank's clock; always after an epoch where no interval is set."""
        if self._writer.failed:
            return True
        every_s = self._task.train.checkpoint_every_s
        if every_s == "auto":
            every_s = interval_s(self._cost_s(), self._environment.interruptions_every_s)
        return every_s is None or time.monotonic() - self._saved >= every_s

    def _cost_s(self) -> float:
        """Tell what a checkpoint takes from training, in seconds: as the last one did, before that by its size."""
        timing = self._writer.timing
        if timing is not None:
            return cost_s(timing.waited, timing.beside, self._environment.threads)
        # The parameters, the best ones so far and two moments.
        return 4 * sum(held(parameter).nbytes for parameter in self._path.parameters) / ASSUMED_SPEED

    def save(self, *, at_once: bool = False) -> None:
        """Begin a checkpoint of the whole state, which is written while the stage trains on; with `at_once`, and when
        the one before failed, it is in the store on return. Every rank of a gang must take part."""
        self._saved = time.monotonic()
        random = self._gang.gather(random_state())
        if not self._gang.leads and not self._gang.shards:
            return
        tensors, live = self._tensors(random)
        if not self._gang.leads:
            return
        at_once |= self._writer.failed
        stream = LiveTensors(tensors, live, self._environment.checkpoint_memory)
        position = [self.progress.global_step, self.progress.epoch, self.progress.step]
        data = {"progress": self.progress.to_json(), "scaler": self._step.scaler_state()}

        def publish() -> None:
            node, attempt = self._attempt.node_id, self._attempt.id
            self._nodes.save_checkpoint(node, attempt, files={FILE: stream}, position=position, data=data)
            self._nodes.prune_checkpoints(node, keep=KEPT)

        self._writer.begin(stream, publish)
        if at_once:
            self._writer.finish()

    def _tensors(self, random: Sequence[State]) -> tuple[State, set[str]]:
        """Name the tensors of a checkpoint, and those among them that updates change. Of sharded parameters all ranks
        must ask, and the first gets copies."""
        model, best = self._path.changing(), self._path.whole(self.best)
        optimizer = self._step.optimizer_tensors()
        live: set[str] = set()
        if self._gang.shards:
            model = self._path.whole(model)
        else:
            # Forward passes change buffers, so those are copied now.
            buffers = self._path.buffers()
            model = {name: on_host(tensor) if name in buffers else tensor for name, tensor in model.items()}
            live = {*(f"model/{name}" for name in model.keys() - buffers), *(f"optimizer/{name}" for name in optimizer)}
        tensors = running_state(model, optimizer, random)
        return tensors | {f"best/{name}": tensor for name, tensor in best.items()}, live

    def before_update(self) -> None:
        """Return as soon as an update may change what a checkpoint is being written of. Call it before each update."""
        self._writer.before_update()

    def keep_best(self) -> None:
        """Keep the state as it is now as the best so far, in place of the one before."""
        if not self.best:
            self.best = self._path.state()
            return
        self._writer.wait()
        for name, tensor in self._path.changing().items():
            self.best[name].copy_(tensor)

    def close(self) -> None:
        """Finish the checkpoint that is being written, for whoever goes on from it; give it up when the stage is over,
        whose commit is to come."""
        if self.progress.exit is None:
            self._writer.wait()
        else:
            self._writer.give_up()

    def write_optimizer(self) -> None:
        """Write the optimizer's state for a later stage that carries it; of sharded parameters all ranks must ask."""
        tensors = self._step.optimizer_tensors()
        # A later stage that holds apart what this one held together finds its state under either name.
        for name, first in self._path.shared_names.items():
            own = {key: value for key, value in tensors.items() if key.startswith(f"{first}//")}
            tensors |= {f"{name}{key.removeprefix(first)}": value for key, value in own.items()}
        tensors = _carried(tensors)
        if self._gang.leads:
            self._attempt.write(OPTIMIZER_FILE, tensor_files.TensorStream(tensors))

    def write_continue(self) -> None:
        """Write what the next round of the stage goes on from. Never in a gang."""
        state = self._path.changing(uncommitted=True)
        optimizer = self._step.optimizer_tensors()
        tensors = running_state(state, optimizer, [random_state()])
        self._attempt.write(CONTINUE_FILE, tensor_files.TensorStream(tensors))


def _carried(optimizer: State) -> State:
    """Select what the next stage takes over of an optimizer's state. What belongs to parameters that end with the stage
    is left out: the next adapter is another module under the same name, and so are low-rank adapters once theirs were
    merged."""
    return {
        name: tensor
        for name, tensor in optimizer.items()
        if not name.startswith((f"{ADAPTER}/", f"{AUX}/")) and LORA not in name
    }
