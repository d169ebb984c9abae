"""Compute scores on public benchmarks against layer index (the source's figures 4 and 5), from a summary alone.

A regime is a line through the whole network after each of its stages; the original, and regimes whose stages stand for
no layer (end to end), are lines across.
"""

from __future__ import annotations

from orchestrator.reports.figures.layer_curve import LayerCurve, Line, ticks_of
from orchestrator.reports.records import BenchmarkScore, RegimeSummary, StageSummary, Summary
from orchestrator.reports.tables.benchmarks import asked_of, title


def benchmark_curve(summary: Summary) -> LayerCurve | None:
    """Return the curves, one panel a benchmark; None where no stage that stands for a layer was judged."""
    staged = {name: regime for name, regime in summary.regimes.items() if _judged(regime)}
    if not staged:
        return None
    ticks, head = ticks_of(stage for regime in staged.values() for stage in _judged(regime))
    names = asked_of(summary)
    lines = {
        title(benchmark): tuple(
            line for name, regime in staged.items() if (line := _line(name, regime, benchmark, head)).points
        )
        for benchmark in names
    }
    across = {title(benchmark): _across(summary, benchmark) for benchmark in names}
    return LayerCurve(ticks, lines, across, frozenset(lines))


def _judged(regime: RegimeSummary) -> list[StageSummary]:
    return [stage for stage in regime.stages if stage.layer is not None and stage.judged]


def _line(name: str, regime: RegimeSummary, benchmark: str, head: int) -> Line:
    """Collect one line. A layer that several stages finish counts as the last of them left it."""
    points: dict[int, tuple[float, float | None]] = {}
    for stage in _judged(regime):
        score = (stage.judged or {}).get(benchmark)
        if score is not None and stage.layer is not None:
            points[head if stage.layer == "head" else stage.layer] = (score.value, score.stderr)
    places = sorted(points)
    errors = [error for place in places if (error := points[place][1]) is not None]
    return Line(
        name,
        "full",
        tuple((place, points[place][0]) for place in places),
        tuple(errors) if len(errors) == len(places) else (),
    )


def _across(summary: Summary, benchmark: str) -> tuple[tuple[str | None, float], ...]:
    found: list[tuple[str | None, BenchmarkScore | None]] = [(None, (summary.judged or {}).get(benchmark))]
    found += [(name, regime.judged.get(benchmark)) for name, regime in summary.regimes.items() if not _judged(regime)]
    return tuple((name, score.value) for name, score in found if score is not None)
