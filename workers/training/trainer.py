"""Train one stage of any regime: some parts under the task loss, the rest of the path frozen.

E2E, layer-wise and SegProp differ only in the `StageTask` they are given. The loop keeps these promises:
only the named parts change; nothing in it waits for the device between reports; a stage killed at any moment
and run again ends with the same bits (same machine, same thread count, deterministic mode). All ranks of a gang run the
same `StageTrainer`, each on its part of every batch; the first of them decides, reports and writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import torch
from torch import Tensor

from cache_store.crashpoints import reach
from cache_store.errors import Interrupted, TrainingDiverged
from cache_store.records.nodes import Attempt, Commit
from workers.control import Update
from workers.device import name_emulated
from workers.domains.registry import domain_of
from workers.domains.sums import Sums
from workers.environment import WorkerEnvironment
from workers.seeds import derive_seed
from workers.snapshots.production import Made
from workers.specs.orders import ALONE, Parents, Production
from workers.specs.results import EpochFigures
from workers.specs.tasks import StageTask
from workers.training.batches import in_order, micro_batches
from workers.training.checkpoint import StageState
from workers.training.clocks import Clock, Looks, Waits
from workers.training.memory import (
    SAMPLED_EPOCHS,
    Peak,
    PeakMeter,
    highest,
    load_lazily_loaded,
    settled_private_bytes,
)
from workers.training.optimizer import StageStep
from workers.training.schedules import learning_rate
from workers.training.scoring import EpochTests, score
from workers.training.stage_inputs import StageInputs
from workers.training.stage_path import StagePath
from workers.training.stage_result import Finished
from workers.training.stopping import exit_reason, is_better
from workers.training.timing.stage_times import StageTimes
from workers.weights import Weights


class _Epoch:
    """Count what happens while one epoch runs."""

    def __init__(self, sums: Sums, told: Sequence[float], earlier_s: float, steps: int, times: StageTimes) -> None:
        """`told`: the sums at the beginning."""
        self.sums = sums
        #: What the last update told of them.
        self.told = list(told)
        self.clock = Clock(earlier_s)
        self.waits = Waits(times)
        #: Steps of this epoch.
        self.steps = steps
        #: The first step with a loss that is not finite, kept on the device until the next look at it.
        self.bad_step = torch.full((), math.inf, dtype=torch.float64, device=sums.own.device)


class StageTrainer:
    """Hold all that one stage needs while it trains. Build it, then `run()`."""

    def __init__(
        self,
        task: StageTask,
        parents: Parents,
        environment: WorkerEnvironment,
        attempt: Attempt,
        production: Production = ALONE,
        *,
        warnings: tuple[str, ...] = (),
        times: StageTimes | None = None,
    ) -> None:
        """`warnings`: what the commit is to say of how the stage was trained. `times`: what counts its time; None: one
        that began with the order."""
        self._warnings = warnings
        self.times = times or StageTimes(environment.device, started=environment.started)
        self.task = task
        self.train = task.train
        self.environment = environment
        self.device = environment.device
        self.gang = environment.gang
        self.domain = domain_of(task.experiment)
        self._attempt = attempt
        self._parents = parents
        self._production = production
        self.weights = Weights(environment.nodes, parents, self.domain, self.device)
        load_lazily_loaded()
        self._host_baseline = settled_private_bytes()

        # Dropout draws from it: every rank its own masks, the first one those of a single device.
        rank = () if self.gang.leads else ("rank", self.gang.rank)
        torch.manual_seed(derive_seed(task.experiment.seed, "stage", task.name, *rank))
        self.path = StagePath(task, self.domain, self.weights, self.device, self.gang)
        self.step = StageStep(task, self.path, self.domain, self.device, self.gang, self.times)
        if not self.train.compile:  # with hooks it would be compiled again
            self.times.watch(dict(self.path.module.parts.items()))
        self.inputs = StageInputs(
            task, parents, environment, self.domain, self.weights, made=Made(attempt), production=production
        )
        self.inputs.by_split["train"].times = self.times
        self._tests = self._epoch_tests()
        self.state = StageState(task, self.path, self.step, environment, attempt)
        self._looks = Looks(self.gang)

    def run(self) -> Commit | None:
        """Train to the exit of the stage, or the end of its round, and commit. Returns the commit that counts.

        Raises TrainingDiverged when a loss is not finite (the last good checkpoint stays) and Interrupted, after
        a checkpoint, when asked to stop.
        """
        with closing(self.path):
            return self._run()

    def _run(self) -> Commit | None:
        if self.gang.leads:
            name_emulated(self.device, self.train.precision)
        self.state.restore(self._parents)
        # What lies before it is hand-over.
        first_step = time.time()
        self.times.at("rest")
        self._looks.begin(self.state.progress.global_step)
        try:
            while self.state.progress.exit is None:
                self._run_epoch()
        finally:
            self.times.at("checkpoints")
            self.times.close()
            self.step.close()
            self.state.close()
        finished = Finished(
            task=self.task,
            environment=self.environment,
            attempt=self._attempt,
            production=self._production,
            inputs=self.inputs,
            path=self.path,
            step=self.step,
            state=self.state,
            first_step=first_step,
            host_baseline=self._host_baseline,
            warnings=self._warnings,
            times=self.times,
        )
        return finished.commit()

    def first_steps(self, steps: int) -> None:
        """Train the first steps of the stage and stop: nothing is validated or committed, and no stage can be trained
        with this object afterwards. Where an epoch has fewer steps it is repeated."""
        progress = self.state.progress
        with closing(self.path):
            self.times.at("rest")
            try:
                while progress.global_step < steps:
                    self._train_epoch(self._epoch(min(self.inputs.per_epoch, steps - progress.global_step)))
                    progress.step, progress.sums = 0, [0.0, 0.0, 0.0]
            finally:
                self.times.close()
                self.step.close()
                self.state.close()

    def _epoch_tests(self) -> EpochTests | None:
        if self.task.test is None:
            return None
        return EpochTests(
            self.task,
            self.task.test,
            self._parents,
            self.environment,
            self.domain,
            self.weights,
            through=self.inputs.through,
        )

    # -- one epoch ------------------------------------------------------------------------------------------

    def _run_epoch(self) -> None:
        progress = self.state.progress
        steps = min(self.inputs.per_epoch, self.inputs.total_steps - progress.epoch * self.inputs.per_epoch)
        epoch = self._epoch(steps)
        peak = self._train_epoch(epoch)
        seconds = epoch.clock.seconds()
        train_loss, train_accuracy = epoch.sums.mean()
        self.times.at("validation")
        validation = self.gang.agree(self._validate())
        if not math.isfinite(validation["loss"]):
            # The last step's own loss was finite, but not what it made of the weights.
            self._check_finite(epoch.bad_step.clamp(max=progress.global_step - 1))
        validated = epoch.clock.seconds()
        tested = None
        if self._tests is not None:
            self.times.at("test")
            tested = self._tests.score(self.path)
        self.times.at("rest")
        figures = EpochFigures(
            epoch=progress.epoch,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            validation_loss=validation["loss"],
            validation_accuracy=validation.get("accuracy"),
            validation=validation,
            lr=self._rate(progress.global_step - 1),
            seconds=seconds,
            validation_seconds=validated - seconds,
            test=None if tested is None else tested.real,
            test_auxiliary=None if tested is None else tested.auxiliary,
            test_seconds=None if tested is None else tested.seconds,
            unit=self.domain.unit,
            rate=self.inputs.samples(steps) / max(seconds, 1e-9),
            peak_device_bytes=peak.device,
            peak_device_reserved_bytes=peak.device_reserved,
            peak_host_bytes=peak.host,
        )
        # What the stage goes on from is the first rank's on all of them, times included.
        progress.history.append(self.gang.agree(figures))
        self._end_epoch()

    def _epoch(self, steps: int) -> _Epoch:
        """Begin an epoch of so many steps, or go on with it."""
        progress = self.state.progress
        self.path.module.train(True)
        sums = Sums(self.device, progress.sums, gang=self.gang)
        return _Epoch(sums, progress.sums, progress.epoch_seconds, steps, self.times)

    def _train_epoch(self, epoch: _Epoch) -> Peak:
        """Run the steps of the epoch that are left; returns the highest peak of all ranks."""
        progress, times = self.state.progress, self.times
        times.at("measuring")
        loaded = micro_batches(
            self.inputs.by_split["train"],
            self.inputs.order(progress.epoch),
            batch_size=self.train.batch_size,
            micro=self.step.micro,
            view=progress.epoch % self.inputs.views,
            steps=range(progress.step, epoch.steps),
            device=self.device,
            gang=self.gang,
        )
        sampled = progress.epoch < SAMPLED_EPOCHS
        with PeakMeter(self.device, host=sampled) as meter, self._saved_waiting(epoch), closing(loaded):
            times.begin_steps()
            for micro in epoch.waits.timed(loaded):
                loss = self.step.backward(micro, epoch.sums)
                times.at("rest")
                at = epoch.bad_step.clamp(max=progress.global_step)
                epoch.bad_step = torch.where(loss.isfinite(), epoch.bad_step, at)
                if not micro.last:
                    continue
                times.at("checkpoints")
                self.state.before_update()
                times.at("update")
                self.step.update(self._rate(progress.global_step))
                times.at("rest")
                progress.step, progress.global_step = micro.step + 1, progress.global_step + 1
                # Now and not at the next step: a checkpoint of this moment holds no state that ended with it.
                self.step.enter(progress.global_step)
                reach("stage.step")
                if self._looks.due(progress.global_step):
                    self._look(epoch)
                times.step_done()
            times.end_steps()
            times.at("measuring")
            self._check_finite(epoch.bad_step)
            peak = highest(self.gang.gather(meter.stop()))
        times.at("rest")
        return peak

    @contextmanager
    def _saved_waiting(self, epoch: _Epoch) -> Iterator[None]:
        """Save a checkpoint when a stop comes while snapshots are waited for, if it comes between two steps."""
        try:
            yield
        except Interrupted as stop:
            reached = epoch.sums.read()
            if stop.details.get("waiting") and self.step.between_updates and math.isfinite(reached[0]):
                self._save(reached, epoch.clock, at_once=True)
            raise

    def _save(self, sums: list[float], clock: Clock, *, at_once: bool) -> None:
        """Save a checkpoint in the middle of an epoch."""
        before = self.times.at("checkpoints")
        self.state.progress.sums, self.state.progress.epoch_seconds = sums, clock.seconds()
        self.state.save(at_once=at_once)
        self.times.at(before)

    def _end_epoch(self) -> None:
        progress, monitor = self.state.progress, self.domain.monitor
        self.inputs.let_go()
        self.times.at("checkpoints")
        if is_better(progress.history, progress.best_epoch, monitor):
            progress.best_epoch = progress.epoch
            if self.train.commit == "best":
                self.state.keep_best()
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.sums, progress.epoch_seconds = [0.0, 0.0, 0.0], 0.0
        total = self.inputs.total_steps
        progress.exit = exit_reason(self.train, progress.history, progress.global_step, total, monitor)
        if progress.exit is None and progress.epoch == self.task.epochs.stop:
            progress.exit = "round"
        if progress.exit is None and self.gang.agree(self.state.due()):
            self.state.save()
        self.times.at("rest")
        reach("stage.epoch")

    def _rate(self, step: int) -> float:
        return learning_rate(self.train.optimizer.lr, self.train.schedule, step, self.inputs.total_steps)

    def _validate(self) -> dict[str, float]:
        inputs = self.inputs.by_split["validation"]
        batch_size = self.train.micro * self.gang.size
        loaded = in_order(inputs, batch_size=batch_size, device=self.device, gang=self.gang)
        scorer = self.domain.scorer(inputs.source, self.device)
        within = self.step.within
        return score(self.path.module, loaded, scorer, self.train.precision, self.device, self.gang, within)

    # -- looking up from the loop -----------------------------------------------------------------------

    def _look(self, epoch: _Epoch) -> None:
        """Report, checkpoint and stop where due. The only place inside an epoch that waits for the device."""
        before = self.times.at("measuring")
        self._check_finite(epoch.bad_step)
        self.environment.control.progress(self._reached(epoch))
        due = self.train.checkpoint_every_s is not None and self.state.due()
        stop, due = self.gang.agree((self.environment.control.should_stop(), due))
        if stop or due:
            self._save(epoch.sums.read(), epoch.clock, at_once=stop)
        if stop:
            progress = self.state.progress
            raise Interrupted(
                f"{self.task.name} stopped at epoch {progress.epoch + 1}, step {progress.step}; "
                "its checkpoint is kept: run the same command to go on"
            )
        self.times.at(before)

    def _reached(self, epoch: _Epoch) -> Update:
        """Say how far the stage is. Every rank of a gang must ask."""
        progress = self.state.progress
        sums = epoch.sums.read()
        loss, accuracy = epoch.sums.mean_of(sums)
        recent_loss, recent_accuracy = epoch.sums.mean_of(
            [now - then for now, then in zip(sums, epoch.told, strict=True)]
        )
        epoch.told = sums
        last = progress.history[-1] if progress.history else None
        norm = self.step.gradient_norm
        done = progress.epoch * self.inputs.per_epoch + progress.step
        rate = progress.step / max(epoch.clock.seconds(), 1e-9)
        counters = self.inputs.counters() if self.inputs.boundaries else None
        score = None if self.domain.monitor in ("accuracy", "loss") else self.domain.monitor
        return Update(
            phase="train",
            epoch=progress.epoch + 1,
            epochs=self.train.epochs,
            step=progress.step,
            steps=epoch.steps,
            rate=self.inputs.samples(progress.step) / max(epoch.clock.seconds(), 1e-9),
            unit=self.domain.unit,
            seconds_left=(self.inputs.last_step - done) / max(rate, 1e-9),
            loss=loss,
            accuracy=accuracy,
            stalled=epoch.waits.share(),
            # Targets of text are tokens.
            tokens_rate=sums[2] / max(epoch.clock.seconds(), 1e-9) if self.domain.row_unit == "tokens" else None,
            hits=None if counters is None else counters.hits,
            misses=None if counters is None else counters.misses,
            bytes_read=None if counters is None else counters.bytes_read,
            bytes_written=None if counters is None else counters.bytes_written,
            global_step=progress.global_step,
            recent_loss=recent_loss,
            recent_accuracy=recent_accuracy,
            lr=self._rate(progress.global_step - 1),
            gradient_norm=None if norm is None else float(norm),
            device_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
            validated=len(progress.history),
            validation_loss=None if last is None else last.validation_loss,
            validation_accuracy=None if last is None else last.validation_accuracy,
            score=score,
            validation_score=None if last is None or score is None else last.validation_of(score),
        )

    def _check_finite(self, bad_step: Tensor) -> None:
        step = self.gang.least(bad_step).item()
        if math.isfinite(step):
            epoch, within = divmod(int(step), self.inputs.per_epoch)
            raise TrainingDiverged(
                f"{self.task.name}: the loss is not finite at step {int(step)} (epoch {epoch + 1}, step {within + 1} "
                "of the epoch); the last good checkpoint is kept. Lower training.optimizer.lr, set training.clip, "
                "or use fp32",
                step=int(step),
            )
