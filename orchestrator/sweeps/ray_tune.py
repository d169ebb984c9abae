"""Let Ray Tune decide which trials run and which go on; the driver does their work.

A trial of Tune is a shell here: a process that holds no device and no model. It tells the driver that it begins, waits
until the driver has its next stage done, reports the figure to Tune, and asks for the next stage when Tune lets it go
on. All stages of all trials run on one pool of workers, so a node that several trials want runs once and no two can
compute it at the same time. The shells sit on the driver's machine; Tune's own files are thrown away, because what
counts is in the store: a sweep that is run again tells Tune the same figures again.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from cache_store.errors import SegpropError
from orchestrator.config.sweep_schema import Draw, SchedulerConfig
from orchestrator.sweeps.metric import Metric
from orchestrator.sweeps.steering import Begun, Ended, Message, WentOn

#: How long Tune may take to end when everything is over.
CLOSE_S = 20.0
STAGES = "stages"
HISTORY = "history.json"


@ray.remote(num_cpus=0)
class Board:
    """Where shells and the driver leave messages for each other."""

    def __init__(self) -> None:
        self._for_driver: list[Message] = []
        self._for_trials: dict[str, asyncio.Queue[dict[str, Any]]] = {}

    async def begin(self, trial: str, parameters: dict[str, Any], history: list[dict[str, Any]]) -> None:
        self._for_trials[trial] = asyncio.Queue()  # nothing that was meant for what the trial was before
        self._for_driver.append(Begun(trial, parameters, tuple(history)))

    async def went_on(self, trial: str, stages: int) -> None:
        self._for_driver.append(WentOn(trial, stages))

    async def next(self, trial: str) -> dict[str, Any]:
        return await self._for_trials[trial].get()

    async def tell(self, trial: str, what: dict[str, Any]) -> None:
        self._for_trials[trial].put_nowait(what)

    async def drain(self) -> list[Message]:
        messages, self._for_driver = self._for_driver, []
        return messages


def shell(config: dict[str, Any], board: Any, metric: str, keeps_history: bool) -> None:
    """Run in a trial of Tune: ask for a stage, report its figure, until the trial ends."""
    trial = tune.get_context().get_trial_name()
    parameters = {key: _rounded(value) for key, value in config["point"]["parameters"].items()}
    history = _history()
    ray.get(board.begin.remote(trial, parameters, history))
    while True:
        told = ray.get(board.next.remote(trial))
        # Of a trial that failed the driver says why. Raised here, it would come out of Ray as a traceback, from each of
        # several loggers; to the scheduler both are a trial that is over.
        if told["value"] is None:
            return
        if told["last"] and keeps_history:
            return  # there is nothing left to take over or to change
        figures = {STAGES: told[STAGES], metric: told["value"]}
        # Comes back only when the scheduler lets the trial go on.
        if keeps_history:
            history = [*history, parameters]
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, HISTORY).write_text(json.dumps(history))
                tune.report(figures, checkpoint=tune.Checkpoint.from_directory(folder))
        else:
            tune.report(figures)
        if told["last"]:
            return
        ray.get(board.went_on.remote(trial, told[STAGES]))


def _rounded(value: Any) -> Any:
    """Round to four digits: what a table shows and a person types again. pbt changes numbers by a factor."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _history() -> list[dict[str, Any]]:
    """Read the settings of the stages that a trial takes over (pbt)."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        history: list[dict[str, Any]] = json.loads(Path(folder, HISTORY).read_text())
    return history


class _Listener(tune.Callback):  # type: ignore[misc]  # Ray's own has no types
    """Tells the driver which trials Tune has ended; called from Tune's thread."""

    def __init__(self, messages: queue.SimpleQueue[Message]) -> None:
        self._messages = messages

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes a copy of all it was given to its folder; that one hears nothing

    def __deepcopy__(self, memo: dict[int, Any]) -> _Listener:
        return self

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._messages.put(Ended(str(trial)))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._messages.put(Ended(str(trial)))


class _Off(tune.Stopper):  # type: ignore[misc]  # Ray's own has no types
    """Ends Tune from the driver's side: its thread must not outlive the connection to Ray."""

    def __init__(self) -> None:
        self._event: threading.Event | None = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        return {"_event": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Off:
        return self

    def set(self) -> None:
        if self._event is not None:
            self._event.set()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._event is not None and self._event.is_set()


class TuneDecider:
    """A `steering.Decider` by Ray Tune, which runs in a thread of this process."""

    def __init__(
        self,
        points: Mapping[str, Mapping[str, Any]],
        draws: Mapping[str, Draw],
        metric: Metric,
        scheduler: SchedulerConfig,
        *,
        stages: int,
        concurrency: int,
        seed: int,
    ) -> None:
        """`points`: trial -> parameters. `stages`: of the longest trial."""
        self._points = points
        self._metric = metric
        self._settings = scheduler
        self._stages = stages
        self._concurrency = len(points) if scheduler.name == "pbt" else concurrency
        self._seed = seed
        self._draws = draws
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._off = _Off()
        self._thread = threading.Thread(target=self._fit, name="segprop-tune", daemon=True)
        self._folder = ""
        self._board: Any = None

    def start(self) -> None:
        # Its loggers write what sweep.json has, and cost an import of TensorBoard each; its tables stand between ours.
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        # A trial that ends before it has a figure has none to report.
        os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
        self._folder = tempfile.mkdtemp(prefix="segprop-tune-")
        board: Any = Board  # what Ray makes of the class has no types
        self._board = board.remote()
        self._thread.start()

    def _fit(self) -> None:
        try:
            random.seed(self._seed)  # pbt draws from the global generator
            self._tuner().fit()
        except BaseException as error:  # noqa: BLE001 - whatever it was, the driver says so
            self._failure = error

    def _tuner(self) -> tune.Tuner:
        keeps_history = self._settings.name == "pbt"
        trainable = tune.with_parameters(shell, board=self._board, metric=self._metric.key, keeps_history=keeps_history)
        here = f"node:{ray.util.get_node_ip_address()}"
        return tune.Tuner(
            tune.with_resources(trainable, tune.PlacementGroupFactory([{"CPU": 0, here: 0.0001}])),
            param_space={
                "point": tune.grid_search(
                    [{"trial": trial, "parameters": dict(point)} for trial, point in self._points.items()]
                )
            },
            tune_config=tune.TuneConfig(
                metric=self._metric.key,
                mode=self._metric.mode,
                scheduler=scheduler_of(self._settings, self._draws, self._stages),
                max_concurrent_trials=self._concurrency,
                reuse_actors=True,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=self._folder,
                verbose=0,
                stop=self._off,
                callbacks=[_Listener(self._messages)],
            ),
        )

    def poll(self) -> list[Message]:
        if self._failure is not None:
            raise SegpropError(f"Ray Tune failed: {type(self._failure).__name__}: {self._failure}") from self._failure
        found: list[Message] = ray.get(self._board.drain.remote())
        while not self._messages.empty():
            found.append(self._messages.get())
        return found

    def report(self, trial: str, stages: int, value: float | None, *, last: bool) -> None:
        self._board.tell.remote(trial, {STAGES: stages, "value": value, "last": last})

    def fail(self, trial: str, message: str) -> None:
        self._board.tell.remote(trial, {"value": None})

    def close(self) -> None:
        self._off.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=CLOSE_S)
        if self._board is not None:
            ray.kill(self._board)
        shutil.rmtree(self._folder, ignore_errors=True)


def _name(trial: Any) -> str:
    name: str = trial.config["point"]["trial"]
    return name


def scheduler_of(settings: SchedulerConfig, draws: Mapping[str, Draw], stages: int) -> TrialScheduler:
    """Make Tune's scheduler. Time is counted in stages of the metric's regime."""
    if settings.name == "asha":
        return AsyncHyperBandScheduler(
            time_attr=STAGES,
            max_t=max(stages, settings.grace),
            grace_period=settings.grace,
            reduction_factor=settings.reduction,
        )
    if settings.name == "pbt":
        return PopulationBasedTraining(
            time_attr=STAGES,
            perturbation_interval=settings.interval,
            hyperparam_mutations={"point": {"parameters": {key: tune_space(draw) for key, draw in draws.items()}}},
            quantile_fraction=settings.quantile,
            resample_probability=settings.resample,
            log_config=False,
        )
    return FIFOScheduler()


def tune_space(draw: Draw) -> Any:
    """Return a parameter's values as a search space of Tune."""
    return _SPACES[draw.kind](draw.values)


_SPACES: Mapping[str, Callable[[Sequence[Any]], Any]] = {
    "grid": list,
    "choice": lambda values: tune.choice(list(values)),
    "uniform": lambda bounds: tune.uniform(*bounds),
    "loguniform": lambda bounds: tune.loguniform(*bounds),
    "randint": lambda bounds: tune.randint(*bounds),
}
