"""One training stage of any regime: some parts train under the task loss, the rest of the path is frozen.

E2E, layer-wise and SegProp differ only in the `StageTask` they are given. The loop keeps these promises:
only the named parts change; nothing in it waits for the device between reports; a stage killed at any moment
and run again ends with the same bits (same machine, same thread count, deterministic mode). All ranks of a gang run the
same `StageTrainer`, each on its part of every batch; the first of them decides, reports and writes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_bytes
from torch import Tensor

from cache_store.crashpoints import reach
from cache_store.errors import Interrupted, TrainingDiverged
from cache_store.records.nodes import Attempt
from cache_store.snapshots.reader import RowReader
from workers.device import autocast
from workers.distributed.gang import GradientSum, add_counts
from workers.distributed.sync_batch_norm import holds_norms
from workers.domains.base import Batch, Source
from workers.domains.registry import domain_of
from workers.domains.sums import Sums
from workers.environment import WorkerEnvironment
from workers.models.chain import Boundary, ModulePath, State, module_bytes, state_digest
from workers.seeds import derive_seed
from workers.snapshots.boundary import StoredBoundary, geometry_of, snapshot_counters
from workers.snapshots.production import Made, SharedSet, commit_made_along
from workers.specs.orders import ALONE, Production
from workers.specs.tasks import StageTask, snapshot_role
from workers.training import checkpoint
from workers.training.batches import (
    Inputs,
    MicroBatch,
    RawInputs,
    StoredInputs,
    _Waits,
    in_order,
    micro_batches,
    steps_per_epoch,
)
from workers.training.checkpoint import Snapshot, StageProgress
from workers.training.clocks import _Clock
from workers.training.memory import SAMPLED_EPOCHS, PeakMeter, highest, load_lazily_loaded, settled_private_bytes
from workers.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from workers.training.schedules import learning_rate
from workers.training.scoring import score
from workers.training.shuffle import epoch_order, windowed_order
from workers.training.stage_path import StagePath
from workers.training.stopping import exit_reason, is_better
from workers.weights import ADAPTER, AUX, Weights, read_tensors

#: Seconds between looks at the loss, the stop flag and the clock. On a device each look is one synchronization.
REPORT_EVERY_S = 1.0
OPTIMIZER_FILE = "optimizer.safetensors"
#: What the next round of a stage needs beside the parts: adapter, optimizer and random state.
CONTINUE_FILE = "continue.safetensors"


class StageTrainer:
    """Everything one stage holds while it trains. Build it, then `run()`."""

    def __init__(
        self,
        task: StageTask,
        parents: Mapping[str, Mapping[str, Any]],
        environment: WorkerEnvironment,
        attempt: Attempt,
        production: Production = ALONE,
    ) -> None:
        self.task = task
        self.train = task.train
        self.environment = environment
        self.device = environment.device
        self.gang = environment.gang
        self.domain = domain_of(task.experiment)
        self._attempt = attempt
        self._parents = parents
        self._production = production
        #: What this attempt makes of the sets that nobody has finished yet.
        self._made = Made(attempt)
        self._shared: list[SharedSet] = []
        self.weights = Weights(environment.nodes, parents, self.domain, self.device)
        load_lazily_loaded()
        self._host_baseline = settled_private_bytes()

        # Dropout draws from it: every rank its own masks, the first one those of a single device.
        rank = () if self.gang.leads else ("rank", self.gang.rank)
        torch.manual_seed(derive_seed(task.experiment.seed, "stage", task.name, *rank))
        self.path = StagePath(task, self.domain, self.weights, self.device, self.gang)
        self.optimizer = build_optimizer(self.train.optimizer, self.path.parameters)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.train.precision == "fp16")
        module = self.path.module
        self.forward: Callable[..., Any] = torch.compile(module) if self.train.compile else module
        replicated = self.gang.size > 1 and not self.gang.shards
        self._gradients = GradientSum(self.path.parameters) if replicated else None
        # Each rank takes as many samples at once as a single device would. With batch normalization what a micro-batch
        # is made of decides its statistics, so there it stays the same and each rank takes a part of it.
        ranks = 1 if holds_norms(module) else self.gang.size
        self.micro = min(self.train.batch_size, self.train.micro * ranks)

        self.sources = {split: self._source(split) for split in ("train", "validation")}
        self.views = self.domain.views(self.sources["train"])
        self.per_epoch = steps_per_epoch(self.sources["train"].rows, self.train.batch_size, self.train.drop_last)
        self.total_steps = self.train.epochs * self.per_epoch
        if self.train.exit.steps is not None:
            self.total_steps = min(self.total_steps, self.train.exit.steps)
        #: Where this piece of work ends: a round before the stage does.
        self.last_step = min(self.total_steps, task.epochs.stop * self.per_epoch)
        self.boundaries: dict[tuple[str, int | None], StoredBoundary] = {}
        self._prefix: ModulePath | None = None
        self.inputs = {split: self._inputs(split) for split in ("train", "validation")}
        self.progress = StageProgress()
        self.best: State = {}
        self._saved = self._looked = time.monotonic()
        #: In a gang: the global step after which all ranks look up, and how many steps after the last look that is.
        self._look_at = self._look_every = 1
        self._waits = _Waits()
        #: When this attempt's first step began (unix seconds); what lies before it is hand-over.
        self._first_step = 0.0

    # -- building ---------------------------------------------------------------------------------------

    def _source(self, split: str) -> Source:
        return self.domain.source(self._parents["data"]["result"], self.environment.snapshots, split)

    def _inputs(self, split: str) -> Inputs:
        task, source, train = self.task, self.sources[split], self.train
        if task.source != "snapshots":
            prefix = None
            if task.source == "recompute":
                assert task.boundary is not None
                if self._prefix is None:
                    blocks = [name for hop in task.boundary.hops for name in hop]
                    self._prefix = ModulePath({name: self.weights.build(name) for name in blocks}, trained=())
                prefix = self._frozen_forward
            return RawInputs(
                self.domain,
                source,
                self.device,
                train.precision,
                channels_last=train.channels_last,
                prefix=prefix,
            )
        assert task.boundary is not None
        # Of a view that is never reached not even an empty set is made.
        epochs = range(task.epochs.start, -(-self.last_step // self.per_epoch))
        views = sorted({epoch % self.views for epoch in epochs}) if split == "train" else [None]
        readers = {}
        for view in views:
            boundary = StoredBoundary(self.environment, self.domain, task.boundary, source, self.weights, view)
            self.boundaries[split, view] = boundary
            readers[view] = self._reader(snapshot_role(split, view), boundary)
        return StoredInputs(
            self.domain,
            source,
            readers,
            boundary.geometry,
            self.device,
            train.precision,
            channels_last=train.channels_last,
            decode=boundary.encoding.decode,
        )

    def _reader(self, role: str, boundary: StoredBoundary) -> RowReader:
        if role not in self._production.unfinished:
            return boundary.reader()
        self._made.watch(role, boundary)
        shared = SharedSet(boundary, self.environment.control, self._made, alone=not self._production.shared)
        self._shared.append(shared)
        return boundary.reader(shared.obtain)

    def _frozen_forward(self, batch: Batch) -> Batch:
        assert self._prefix is not None
        with autocast(self.train.precision, self.device):
            outputs: Boundary = self._prefix(batch.boundary, batch.context)
        return dataclasses.replace(batch, boundary=self.domain.as_input(outputs, self.train.precision))

    # -- running ----------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the exit of the stage, or the end of its round, and commit. Returns the commit that counts.

        Raises TrainingDiverged when a loss is not finite (the last good checkpoint stays) and Interrupted, after
        a checkpoint, when asked to stop.
        """
        self._start()
        self._first_step = time.time()
        self._look_at = self.progress.global_step + 1
        try:
            while self.progress.exit is None:
                self._run_epoch()
        finally:
            if self._gradients is not None:
                self._gradients.close()
        return self._commit()

    def _start(self) -> None:
        if self.train.head_optimizer == "carry" and "optimizer" in self._parents:
            record = self._parents["optimizer"]["files"].get(OPTIMIZER_FILE)
            if record is not None:
                restore_optimizer(self.optimizer, self.path.names, read_tensors(self.environment.nodes, record))
        if "continue" in self._parents:
            self._continue(self._parents["continue"])
        found = checkpoint.load(self.environment.nodes, self._attempt.node_id, self.gang)
        if found is None:
            return
        self.progress, self.best = found.progress, self.path.own(found.best)
        self.path.load(self.path.own(found.model))
        restore_optimizer(self.optimizer, self.path.names, found.optimizer)
        if found.scaler:
            self.scaler.load_state_dict(found.scaler)

    def _continue(self, before: Mapping[str, Any]) -> None:
        """Go on where the round before stopped. The parts are loaded already, perhaps not as it left them: the head
        may be an average. The optimizer's state is this segment's own either way."""
        result = before["result"]
        model, optimizer = checkpoint.resume_running_state(
            read_tensors(self.environment.nodes, before["files"][CONTINUE_FILE])
        )
        self.path.load(model, uncommitted=True)
        restore_optimizer(self.optimizer, self.path.names, optimizer)
        if result["scaler"]:
            self.scaler.load_state_dict(result["scaler"])
        self.progress = StageProgress(
            epoch=self.task.epochs.start,
            global_step=result["steps"],
            history=list(result["epochs"]),
            best_epoch=result["best_epoch"],
        )

    def _run_epoch(self) -> None:
        progress = self.progress
        epoch = progress.epoch
        order = self._order(epoch)
        last = min(self.per_epoch, self.total_steps - epoch * self.per_epoch)
        sums = Sums(self.device, progress.sums, gang=self.gang)
        # The first step with a loss that is not finite, kept on the device until the next look at it.
        bad_step = torch.full((), math.inf, dtype=torch.float64, device=self.device)
        clock = _Clock(progress.epoch_seconds)
        self._waits = _Waits()
        self.path.module.train(True)
        loaded = micro_batches(
            self.inputs["train"],
            order,
            batch_size=self.train.batch_size,
            micro=self.micro,
            view=epoch % self.views,
            steps=range(progress.step, last),
            device=self.device,
            gang=self.gang,
        )
        sampled = epoch < SAMPLED_EPOCHS
        with PeakMeter(self.device, host=sampled) as meter, self._saved_waiting(sums, clock), closing(loaded):
            for micro in self._waits.timed(loaded):
                loss = self._backward(micro, sums)
                bad_step = torch.where(loss.isfinite(), bad_step, bad_step.clamp(max=progress.global_step))
                if not micro.last:
                    continue
                if self._gradients is not None:
                    self._gradients.finish()
                self._update(self._rate(progress.global_step))
                progress.step, progress.global_step = micro.step + 1, progress.global_step + 1
                reach("stage.step")
                if self._look_due():
                    self._look(bad_step, sums, clock, last)
            self._check_finite(bad_step)
            peak = highest(self.gang.gather(meter.stop()))
        seconds = clock.seconds()
        train_loss, train_accuracy = sums.mean()
        validation = self.gang.agree(self._validate())
        if not math.isfinite(validation["loss"]):
            # The last step's own loss was finite, but not what it made of the weights.
            self._check_finite(bad_step.clamp(max=progress.global_step - 1))
        record = {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "validation_loss": validation["loss"],
            "validation_accuracy": validation["accuracy"],
            "validation": validation,
            "lr": self._rate(progress.global_step - 1),
            "seconds": seconds,
            "validation_seconds": clock.seconds() - seconds,
            f"{self.domain.unit}_per_s": last * self.train.batch_size / max(seconds, 1e-9),
            "peak_device_bytes": peak.device,
            "peak_device_reserved_bytes": peak.device_reserved,
            "peak_host_bytes": peak.host,
        }
        # What the stage goes on from is the first rank's on all of them, times included.
        progress.history.append(self.gang.agree(record))
        self._end_epoch()

    @contextmanager
    def _saved_waiting(self, sums: Sums, clock: _Clock) -> Iterator[None]:
        """A stop that comes while snapshots are waited for leaves a checkpoint too, if it comes between two steps."""
        try:
            yield
        except Interrupted as stop:
            reached = sums.read()
            between = all(parameter.grad is None for parameter in self.path.parameters)
            if stop.details.get("waiting") and between and math.isfinite(reached[0]):
                self.progress.sums, self.progress.epoch_seconds = reached, clock.seconds()
                self._save()
            raise

    def _end_epoch(self) -> None:
        progress, monitor = self.progress, self.domain.monitor
        # What made missing snapshots is not needed by the steps, and every view has its own.
        for boundary in self.boundaries.values():
            boundary.let_go()
        if is_better(progress.history, progress.best_epoch, monitor):
            progress.best_epoch = progress.epoch
            if self.train.commit == "best":
                self.best = self.path.state()
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.sums, progress.epoch_seconds = [0.0, 0.0, 0.0], 0.0
        progress.exit = exit_reason(self.train, progress.history, progress.global_step, self.total_steps, monitor)
        if progress.exit is None and progress.epoch == self.task.epochs.stop:
            progress.exit = "round"
        if progress.exit is None and self.gang.agree(self._checkpoint_due()):
            self._save()
        reach("stage.epoch")

    def _order(self, epoch: int) -> np.ndarray:
        seed, source = self.task.experiment.seed, self.sources["train"]
        if self.task.window is None:
            return epoch_order(seed, epoch, source.rows)
        assert self.task.boundary is not None
        sizes = geometry_of(self.domain, self.task.boundary, source).shard_samples
        return windowed_order(seed, epoch, sizes, self.task.window)

    def _rate(self, step: int) -> float:
        return learning_rate(self.train.optimizer.lr, self.train.schedule, step, self.total_steps)

    def _backward(self, micro: MicroBatch, sums: Sums) -> Tensor:
        """Gradients of one micro-batch, weighted by its share of the step; returns its loss (on the device)."""
        batch = micro.batch
        with autocast(self.train.precision, self.device):
            output = self.forward(batch.boundary, batch.context)
        loss, correct = self.domain.loss(output, batch.targets, self.train)
        if batch.counts:
            sums.add(loss, correct, len(batch.targets))
        weight = micro.share * self.gang.loss_scale
        weighted = loss if weight == 1.0 else loss * weight
        if micro.last and self._gradients is not None:
            self._gradients.begin()
        self.scaler.scale(weighted).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _update(self, rate: float) -> None:
        """One optimizer step with the gradients there are."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.train.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.path.parameters, self.train.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _validate(self) -> dict[str, float]:
        inputs = self.inputs["validation"]
        batch_size = self.train.micro * self.gang.size
        loaded = in_order(inputs, batch_size=batch_size, device=self.device, gang=self.gang)
        scorer = self.domain.scorer(inputs.source, self.device)
        return score(self.path.module, loaded, scorer, self.train.precision, self.device, self.gang)

    # -- looking up from the loop -----------------------------------------------------------------------

    def _look(self, bad_step: Tensor, sums: Sums, clock: _Clock, last: int) -> None:
        """Report, checkpoint and stop where due. The only place inside an epoch that waits for the device."""
        self._check_finite(bad_step)
        progress = self.progress
        loss, accuracy = sums.mean()
        done = progress.epoch * self.per_epoch + progress.step
        rate = progress.step / max(clock.seconds(), 1e-9)
        counters = snapshot_counters(self.boundaries) if self.boundaries else {}
        self.environment.control.progress(
            phase="train",
            epoch=progress.epoch + 1,
            epochs=self.train.epochs,
            step=progress.step,
            steps=last,
            rate=rate * self.train.batch_size,
            unit=self.domain.unit,
            seconds_left=(self.last_step - done) / max(rate, 1e-9),
            loss=loss,
            accuracy=accuracy,
            stalled=self._waits.share(),
            # Targets of text are tokens.
            tokens_rate=sums.read()[2] / max(clock.seconds(), 1e-9) if self.domain.row_unit == "tokens" else None,
            **counters,
        )
        every_s = self.train.checkpoint_every_s
        due = every_s is not None and self._checkpoint_due()
        stop, due = self.gang.agree((self.environment.control.should_stop(), due))
        if stop or due:
            progress.sums, progress.epoch_seconds = sums.read(), clock.seconds()
            self._save()
        if stop:
            raise Interrupted(
                f"{self.task.name} stopped at epoch {progress.epoch + 1}, step {progress.step}; "
                "its checkpoint is kept: run the same command to go on"
            )

    def _look_due(self) -> bool:
        """By the stage's clock, not the epoch's: epochs may be shorter than the interval. A gang looks together,
        after a step that its first rank named at the last look: asking after every step would cost messages."""
        now = time.monotonic()
        if self.gang.size > 1:
            if self.progress.global_step < self._look_at:
                return False
            pace = (now - self._looked) / self._look_every
            ahead = min(max(1, int(REPORT_EVERY_S / max(pace, 1e-9))), 2 * self._look_every)
            self._look_every = self.gang.agree(ahead)
            self._looked, self._look_at = now, self.progress.global_step + self._look_every
            return True
        if now - self._looked < REPORT_EVERY_S:
            return False
        self._looked = now
        return True

    def _check_finite(self, bad_step: Tensor) -> None:
        step = self.gang.least(bad_step).item()
        if math.isfinite(step):
            epoch, within = divmod(int(step), self.per_epoch)
            raise TrainingDiverged(
                f"{self.task.name}: the loss is not finite at step {int(step)} (epoch {epoch + 1}, step {within + 1} "
                "of the epoch); the last good checkpoint is kept. Lower training.optimizer.lr, set training.clip, "
                "or use fp32",
                step=int(step),
            )

    # -- states -----------------------------------------------------------------------------------------

    def _checkpoint_due(self) -> bool:
        every_s = self.train.checkpoint_every_s
        return every_s is None or time.monotonic() - self._saved >= every_s

    def _save(self) -> None:
        self._saved = time.monotonic()
        random = self.gang.gather(checkpoint.random_state())
        if not self.gang.leads and not self.gang.shards:
            return
        snapshot = Snapshot(
            progress=self.progress,
            model=self.path.whole(self.path.state()),
            best=self.path.whole(self.best),
            optimizer=optimizer_tensors(self.optimizer, self.path.names),
            scaler=self.scaler.state_dict() if self.scaler.is_enabled() else {},
            random=random,
        )
        if self.gang.leads:
            checkpoint.save(self.environment.nodes, self._attempt.node_id, self._attempt.id, snapshot)

    def _commit(self) -> dict[str, Any]:
        progress, task = self.progress, self.task
        if self.train.commit == "best":
            self.path.load(self.best)
        parts: dict[str, Any] = {}
        for part in task.trained:
            tensors = self.path.final(part)
            if not self.gang.leads:
                continue
            file = f"{part}.safetensors"
            record = self._attempt.write(file, save_bytes(tensors))
            parts[part] = {"file": file, "digest": state_digest(tensors), "bytes": record["bytes"]}
        if self.train.head_optimizer == "carry":
            # Not of what ends with this stage: the next adapter is another module under the same name.
            tensors = {
                name: tensor
                for name, tensor in optimizer_tensors(self.optimizer, self.path.names).items()
                if not name.startswith((f"{ADAPTER}/", f"{AUX}/"))
            }
            if self.gang.leads:
                self._attempt.write(OPTIMIZER_FILE, save_bytes(tensors))
        measured = self._measured()
        if not self.gang.leads:
            return self.gang.agree({})
        handed_on: dict[str, Any] = {}
        if task.goes_on:  # never in a gang
            state = self.path.state(uncommitted=True)
            optimizer = optimizer_tensors(self.optimizer, self.path.names)
            tensors = checkpoint.running_state(state, optimizer, [checkpoint.random_state()])
            self._attempt.write(CONTINUE_FILE, save_bytes(tensors))
            handed_on["scaler"] = self.scaler.state_dict() if self.scaler.is_enabled() else {}
        committed = progress.best_epoch if self.train.commit == "best" else progress.epoch - 1
        boundaries = {snapshot_role(*key): boundary for key, boundary in self.boundaries.items()}
        partial = commit_made_along(
            self.environment.nodes, self._production.unfinished, boundaries, self.environment.where()
        )
        commit = self._attempt.commit(
            {
                "stage": task.name,
                "parts": parts,
                "epochs": progress.history,
                "best_epoch": progress.best_epoch,
                "committed_epoch": committed,
                "exit": progress.exit,
                "steps": progress.global_step,
                "path_is_auxiliary": ADAPTER in task.path or AUX in task.path,
                **handed_on,
                **measured,
                **({"partial": partial, "waited_s": sum(s.waited for s in self._shared)} if self._shared else {}),
            }
        )
        self.environment.nodes.drop_checkpoints(self._attempt.node_id)
        return self.gang.agree(commit)

    def _measured(self) -> dict[str, Any]:
        history = [epoch for epoch in self.progress.history if epoch["epoch"] in self.task.epochs]
        steady = history[1:] or history
        if self._shared:  # never in a gang
            forwards: dict[str, int] = self._made.total(self.environment.nodes)["forwards"]
        else:
            own = [dict(boundary.total_forwards()) for boundary in self.boundaries.values()]
            forwards = add_counts([count for counts in self.gang.gather(own) for count in counts])
        if self._prefix is not None:
            steps = self.progress.global_step - self.task.epochs.start * self.per_epoch
            samples = steps * self.train.batch_size
            samples += len(history) * self.sources["validation"].rows
            forwards = dict.fromkeys(self._prefix.parts, samples)
        where = self.environment.where()
        if self.gang.size > 1:
            ranks = self.gang.gather({key: where[key] for key in ("host", "pid", "device")})
            where |= {"strategy": self.gang.strategy, "ranks": ranks}
        # Of this attempt, like the counters of snapshots.
        inputs = [each.seconds for each in self.inputs.values()]
        return {
            "trainable_parameters": sum(parameter.numel() for parameter in self.path.parameters),
            "resident_bytes": self.path.resident_bytes() + (module_bytes(self._prefix) if self._prefix else 0),
            "peak_device_bytes": _largest(steady, "peak_device_bytes"),
            "peak_device_reserved_bytes": _largest(steady, "peak_device_reserved_bytes"),
            "peak_host_bytes": _largest(steady, "peak_host_bytes"),
            "host_baseline_bytes": self._host_baseline,
            "snapshot": add_counts(self.gang.gather(snapshot_counters(self.boundaries))),
            "forwards": forwards,
            "input_seconds": None if None in inputs else sum(inputs),
            "seconds": sum(e["seconds"] + e["validation_seconds"] for e in history),
            "resumed": self.progress.resumed,
            "train_spec": asdict(self.train),
            "where": {**where, "first_step": self._first_step},
        }


def _largest(history: list[dict[str, Any]], key: str) -> int | None:
    values = [epoch[key] for epoch in history if epoch[key] is not None]
    return max(values) if values else None
