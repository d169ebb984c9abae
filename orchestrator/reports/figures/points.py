"""List the points of the curves that a page draws, for those who want the values: a line for each path of a figure.

Ids are those that `learning_curves` and `charts.layers` give their lines; points that have no value are left out, as
there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

from orchestrator.reports.figures.layer_curve import LayerCurve
from orchestrator.reports.figures.svg import slug
from orchestrator.reports.live_points import Points, StepCurves
from orchestrator.reports.quality import Quality
from orchestrator.reports.records import EpochSummary, RegimeSummary
from workers.domains.metrics import METRICS

#: Which curve of a stage -> what it is called, in the order in which they are listed.
_CURVES = {
    "validation": "validation",
    "train": "training",
    "test": "test, whole network",
    "test_auxiliary": "test, own path",
    "steps": "training by steps",
}
_MODELS = {"full": "the whole model", "truncated": "cut off behind the layer"}


@dataclass(frozen=True)
class Line:
    """One line of a figure. `id`: of its group in the page; `key`: what it is, a cell of CSV each; `points`: x and
    value; `share`: values are 0..1 of a whole."""

    id: str
    name: str
    key: tuple[str, ...]
    points: tuple[tuple[float | str, float], ...]
    share: bool


@dataclass(frozen=True)
class FigurePoints:
    """One figure. `columns`: heads of its CSV, the last two for x and value; `x`: what x is, in a word."""

    columns: tuple[str, ...]
    x: str
    lines: tuple[Line, ...]

    def to_json(self) -> dict[str, object]:
        """Write it for the page's script."""
        return asdict(self)


def drawn_metrics(quality: Quality) -> tuple[str, ...]:
    """Name the metrics that learning curves are drawn of, the one that leads first."""
    score = "accuracy" if quality.text else quality.metric
    return tuple(dict.fromkeys(("loss", score) if quality.text else (score, "loss")))


def learning_points(
    regimes: Mapping[str, RegimeSummary], titles: Mapping[str, str], quality: Quality, steps: StepCurves
) -> FigurePoints:
    """Return the points of the learning curves, whose epochs are counted over all stages of a regime. `steps`: as
    `learning_curves` has them."""
    lines = tuple(
        line
        for name, regime in regimes.items()
        for metric in drawn_metrics(quality)
        for line in _of_regime(
            titles[name],
            slug(name),
            regime,
            metric,
            {stage: curves[metric] for (of, stage), curves in steps.items() if of == name and metric in curves},
        )
    )
    return FigurePoints(("regime", "stage", "curve", "epoch", "value"), "epoch", lines)


def _of_regime(title: str, key: str, regime: RegimeSummary, metric: str, steps: Mapping[str, Points]) -> Iterator[Line]:
    start, called = 0, METRICS[metric].title
    for index, stage in enumerate(regime.stages):
        curves: dict[str, tuple[tuple[float | str, float], ...]] = {
            curve: tuple(_finite(start, (_value(epoch, curve, metric) for epoch in stage.curve)))
            for curve in _CURVES
            if curve != "steps"
        }
        curves["steps"] = tuple((round(start + share, 4), value) for share, value in steps.get(stage.name, ()))
        for curve, points in curves.items():
            if points:
                words = f"{called}, {_CURVES[curve]}"
                name = f"{title}, {stage.name}: {words}"
                share = METRICS[metric].share
                yield Line(f"curves-{key}-{index}-{curve}-{metric}", name, (title, stage.name, words), points, share)
        start += len(stage.curve)


def _value(epoch: EpochSummary, curve: str, metric: str) -> float | None:
    scored = {"test": epoch.test, "test_auxiliary": epoch.test_auxiliary}
    return (scored[curve] or {}).get(metric) if curve in scored else epoch.figure(f"{curve}_{metric}")


def _finite(start: int, values: Iterable[float | None]) -> Iterator[tuple[int, float]]:
    for position, value in enumerate(values):
        if value is not None and math.isfinite(value):
            yield start + position + 1, float(value)


def layer_points(curve: LayerCurve | None, titles: Mapping[str, str], figure: str) -> FigurePoints | None:
    """Return the points of a figure of scores against layer index, called `figure`; None where nothing is drawn."""
    if curve is None:
        return None
    ticks = dict(curve.ticks)
    lines = tuple(
        Line(
            id=f"{figure}-{slug(line.regime)}-{line.model}-{slug(metric)}",
            name=f"{titles[line.regime]}, {_MODELS[line.model]}: {metric}",
            key=(titles[line.regime], _MODELS[line.model], metric),
            points=tuple((ticks.get(place, str(place)), value) for place, value in line.points),
            share=metric in curve.shares,
        )
        for metric, found in curve.lines.items()
        for line in found
    )
    return FigurePoints(("regime", "model", "score", "layer", "value"), "layer", lines) if lines else None
