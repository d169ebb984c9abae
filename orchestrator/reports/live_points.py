"""Read what a run said while it trained, for stages of one epoch: their curve would be a single point.

`points.jsonl` is anybody's: what has another shape, or is not finite, is passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from cache_store.storage.durable import open_regular
from orchestrator.reports.records import RegimeSummary, StageSummary

#: (share of the epoch, value), in order.
Points = tuple[tuple[float, float], ...]
#: (regime, stage) -> metric -> what it was on the batches of the stage's one epoch.
StepCurves = Mapping[tuple[str, str], Mapping[str, Points]]
#: Lines that are read, and points that are kept of a curve.
_MOST_LINES, _MOST_POINTS = 2_000_000, 240
#: Characters of a line.
_LONGEST = 1 << 16
_FIGURES = {"train/loss": "loss", "train/accuracy": "accuracy"}


def step_curves(path: Path, regimes: Mapping[str, RegimeSummary]) -> StepCurves:
    """Return the training curves of stages of one epoch; none where the file is not there."""
    places = {
        (name, stage.name): (before, stage.steps)
        for name, regime in regimes.items()
        for stage, before in _with_steps_before(regime)
        if len(stage.curve) == 1 and stage.steps
    }
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for point in _lines(path) if places else ():
        key = (str(point.get("regime")), str(point.get("stage")))
        if key not in places or not isinstance(point.get("figures"), dict):
            continue
        before, steps = places[key]
        step = point.get("step")
        if not isinstance(step, int) or not before < step <= before + steps:
            continue
        for figure, metric in _FIGURES.items():
            value = point["figures"].get(figure)
            if isinstance(value, int | float) and math.isfinite(value):
                # Said again after an interruption: what counts comes last.
                found.setdefault(key, {}).setdefault(metric, {})[step - before] = float(value)
    return {
        key: {metric: _thinned(values, places[key][1]) for metric, values in metrics.items() if len(values) > 1}
        for key, metrics in found.items()
    }


def _with_steps_before(regime: RegimeSummary) -> Iterator[tuple[StageSummary, int]]:
    """Yield stages with the optimizer steps that the plan has before them: by these points are counted."""
    before = 0
    for stage in regime.stages:
        yield stage, before
        if stage.steps and stage.epochs:
            before += stage.steps // stage.epochs * (stage.planned_epochs or stage.epochs)


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with open(open_regular(path), encoding="utf-8", errors="replace") as file:
            for line in islice(iter(partial(file.readline, _LONGEST), ""), _MOST_LINES):
                if len(line) == _LONGEST:
                    return  # none of ours
                if '"train"' not in line:
                    continue
                try:
                    point = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(point, dict) and point.get("kind") == "train":
                    yield point
    except OSError:
        return


def _thinned(values: Mapping[int, float], steps: int) -> Points:
    """Return the points as shares of the epoch; of too many, the first, the last and evenly chosen ones between."""
    points = [(step / steps, value) for step, value in sorted(values.items())]
    stride = -(-len(points) // _MOST_POINTS)
    return (*points[:-1:stride], points[-1])
