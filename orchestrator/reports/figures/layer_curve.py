"""Compute score against layer index, as the publication draws it for language models, from a summary alone.

Fields that are read; nothing is drawn where no stage has them:

- `regimes.<name>.stages[].layer`: what the stage has just finished: the number of the last decoder layer it trained
  (its number in the model), or `"head"` for a last stage that trains the head on the finished backbone;
- `regimes.<name>.stages[].truncated` and `.full`: `{"loss": float, "accuracy": float}` (either key may be missing
  or None), the model cut off behind that layer, and the whole model, after the stage, on the validation split;
- `original.validation`: the same pair for the untouched pretrained model.

An `e2e` regime is a line across: its last stage's `full`, else `regimes.<name>.final.validation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from orchestrator.reports.records import Metrics, RegimeSummary, StageSummary, Summary
from orchestrator.reports.words import is_baseline

METRICS = ("loss", "accuracy")
#: The model cut off behind a layer, and the whole model.
MODELS = ("truncated", "full")
HEAD = "LM head"


@dataclass(frozen=True)
class Line:
    """One regime's truncated or full model: `points` are (position, value), positions as in `LayerCurve.ticks`."""

    regime: str
    model: str
    points: tuple[tuple[int, float], ...]
    #: Standard errors of the points; none where they are not known.
    errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerCurve:
    """What to draw. `ticks` are (position, label): layers stand at their own number, the LM head one further; `lines`
    and `across` (what stands for no layer: the original, E2E) by metric, the latter with None for the original."""

    ticks: tuple[tuple[int, str], ...]
    lines: Mapping[str, tuple[Line, ...]]
    across: Mapping[str, tuple[tuple[str | None, float], ...]]
    #: The metrics that are shares, 0..1.
    shares: frozenset[str] = field(default=frozenset({"accuracy"}))


def layer_curve(summary: Summary) -> LayerCurve | None:
    """Return the curves of every regime that has judged a model after a stage; None where there is none."""
    staged = {name: regime for name, regime in summary.regimes.items() if not is_baseline(regime)}
    judged = [stage for regime in staged.values() for stage in regime.stages if _is_judged(stage)]
    if not judged:
        return None
    ticks, head = ticks_of(judged)
    lines = {
        metric: tuple(
            line
            for name, regime in staged.items()
            for model in MODELS
            if (line := _line(name, regime, model, metric, head)).points
        )
        for metric in METRICS
    }
    return LayerCurve(ticks, lines, {metric: _across(summary, metric) for metric in METRICS})


def ticks_of(stages: Iterable[StageSummary]) -> tuple[tuple[tuple[int, str], ...], int]:
    """Return (position, label) of the layers that stages finish, and where the LM head stands."""
    layers = {stage.layer for stage in stages if stage.layer is not None}
    numbers = sorted(layer for layer in layers if isinstance(layer, int))
    head = numbers[-1] + 1 if numbers else 0
    ticks = [(number, str(number)) for number in numbers]
    return tuple([*ticks, (head, HEAD)] if "head" in layers else ticks), head


def _is_judged(stage: StageSummary) -> bool:
    return stage.layer is not None and any(
        _value(_scores(stage, model), metric) is not None for model in MODELS for metric in METRICS
    )


def _scores(stage: StageSummary, model: str) -> Metrics:
    return stage.truncated if model == "truncated" else stage.full


def _line(name: str, regime: RegimeSummary, model: str, metric: str, head: int) -> Line:
    """Collect one line. A layer that several stages finish (the head's own, in a global head) counts as the last of
    them left it."""
    points: dict[int, float] = {}
    for stage in regime.stages:
        value = _value(_scores(stage, model), metric)
        if value is not None and stage.layer is not None:
            points[head if stage.layer == "head" else stage.layer] = value
    return Line(name, model, tuple(sorted(points.items())))


def _across(summary: Summary, metric: str) -> tuple[tuple[str | None, float], ...]:
    found: list[tuple[str | None, float | None]] = [(None, _value(summary.original.get("validation"), metric))]
    for name, regime in summary.regimes.items():
        if is_baseline(regime):
            value = _value(regime.stages[-1].full, metric) if regime.stages else None
            found.append((name, _value(regime.final.validation, metric) if value is None else value))
    return tuple((name, value) for name, value in found if value is not None)


def _value(metrics: Metrics | None, metric: str) -> float | None:
    value = (metrics or {}).get(metric)
    return None if value is None else float(value)
