"""Fill the dashboards people have: W&B, MLflow, trackio, SwanLab. Runs in a process of its own (`sidecar.py`), one for
each regime and service, so that nothing of theirs can stop or slow a run.

Each class opens one run of a service, going on in the one that has this id where there is one. To add a service, write
its class and add its row to `SERVICES`, and its name to `orchestrator/config/schema.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Opening:
    """What a service is told of a run. `id`: of letters and digits, the same whenever the run goes on; `folder`: for
    files of its own; `config`: what was configured, as JSON values."""

    project: str
    group: str
    name: str
    id: str
    folder: str
    config: Mapping[str, Any]


class Service(Protocol):
    """An open run of a service."""

    def log(self, step: int, when: float, figures: Mapping[str, float]) -> None:
        """Take figures by name, after `step` optimizer steps of the regime; `when`: unix seconds."""

    def close(self) -> None:
        """End this piece of the run, and send what is left."""


class _Wandb:
    """Weights & Biases; WANDB_MODE=offline writes below the run directory alone, for `wandb sync`."""

    def __init__(self, opening: Opening) -> None:
        import wandb

        self._run = wandb.init(
            project=opening.project,
            group=opening.group,
            name=opening.name,
            id=opening.id,
            dir=opening.folder,
            config=dict(opening.config),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        # Its own steps may not go back, and what was validated is known a little later than the steps after it.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, when: float, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, else files in `mlruns` below the run directory."""

    def __init__(self, opening: Opening) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        place = os.environ.get("MLFLOW_TRACKING_URI") or f"file://{opening.folder}/mlruns"
        if place.startswith("file:"):
            # Newer versions ask for this before they write plain files.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client, self._metric = MlflowClient(place), Metric
        experiment = self._client.get_experiment_by_name(opening.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(opening.project)
        found = self._client.search_runs([number], f"tags.`segprop.id` = '{opening.id}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.set_terminated(self._run, "RUNNING")
            return
        tags = {"segprop.id": opening.id, "segprop.run": opening.group}
        self._run = self._client.create_run(number, run_name=opening.name, tags=tags).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in list(opening.config.items())[:100]]
        self._client.log_batch(self._run, params=params)

    def log(self, step: int, when: float, figures: Mapping[str, float]) -> None:
        metrics = [self._metric(name, value, int(1000 * when), step) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run, "FINISHED")


class _Trackio:
    """trackio, into its own folder (TRACKIO_DIR) or Space (TRACKIO_SPACE_ID)."""

    def __init__(self, opening: Opening) -> None:
        import trackio

        self._run = trackio.init(
            project=opening.project,
            # Runs go on by name.
            name=f"{opening.name}-{opening.id[:6]}",
            group=opening.group,
            config=dict(opening.config),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, when: float, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class _SwanLab:
    """SwanLab; SWANLAB_MODE=offline or local writes below the run directory alone."""

    def __init__(self, opening: Opening) -> None:
        import swanlab

        self._swanlab = swanlab
        online = os.environ.get("SWANLAB_MODE", "cloud") == "cloud"
        swanlab.init(
            project=opening.project,
            experiment_name=opening.name,
            group=opening.group,
            config=dict(opening.config),
            logdir=os.path.join(opening.folder, "swanlog"),
            # Only its cloud goes on in a run.
            **({"id": opening.id, "resume": "allow"} if online else {}),
        )

    def log(self, step: int, when: float, figures: Mapping[str, float]) -> None:
        self._swanlab.log(dict(figures), step=step)

    def close(self) -> None:
        self._swanlab.finish()


SERVICES: Mapping[str, Callable[[Opening], Service]] = {
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
    "swanlab": _SwanLab,
}
