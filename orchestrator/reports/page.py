"""Write `report.html`: one file that tells what a run came to, made from its summary alone.

This module puts figures into words and rows; the template only lays them out. Nothing is loaded from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cache_store.storage.durable import write_atomically
from orchestrator.reports.figures import learning_curves, points, svg
from orchestrator.reports.figures.benchmark_curve import benchmark_curve
from orchestrator.reports.figures.layer_curve import LayerCurve, layer_curve
from orchestrator.reports.live_points import StepCurves
from orchestrator.reports.machine import environment_rows, machine_words
from orchestrator.reports.page_template import template
from orchestrator.reports.part_names import abbreviated
from orchestrator.reports.quality import (
    Improvement,
    Quality,
    improvements,
    loss_text,
    original_of,
    perplexity_text,
    quality_of,
)
from orchestrator.reports.records import (
    DataSummary,
    Metrics,
    RegimeSummary,
    StageSummary,
    Summary,
)
from orchestrator.reports.tables import benchmarks
from orchestrator.reports.tables.boundary_table import boundary_table
from orchestrator.reports.tables.class_table import class_table
from orchestrator.reports.tables.time_table import shown_groups, time_rows
from orchestrator.reports.tables.work_tables import boundary_rows, forward_rows, work_row
from orchestrator.reports.verdict import gain_text, verdict
from orchestrator.reports.words import (
    STATUS_WORDS,
    MemoryBasis,
    baseline_of,
    data_lines,
    is_baseline,
    of_kind,
    titles,
    trained_text,
)
from orchestrator.units import DASH, bytes_text, percent_text, ratio_text, seconds_text, source_words
from workers.specs.experiment import MOST_SWALLOWED

#: Files beside the report, and what they are.
FILES = {
    "config.yaml": "the configuration, every default written out",
    "summary.json": "every figure of this page",
    "log.jsonl": "what happened when",
    "tb/": "for TensorBoard",
}
#: What the template is given: texts, flags and rows of texts.
PageRow = dict[str, Any]


def write_report(summary: Summary, path: Path, steps: StepCurves | None = None) -> None:
    """Render `summary` to `path`, replacing it atomically."""
    write_atomically(path, render(summary, steps).encode())


def render(summary: Summary, steps: StepCurves | None = None) -> str:
    """Return the page of a summary. The same summary gives the same bytes. `steps`: the training curves inside stages
    of one epoch, as far as they are known."""
    # Imported late: a dry run never needs matplotlib.
    from orchestrator.reports.figures import charts, information_plane

    page, regimes = _Page(summary), summary.regimes
    curve, judged = layer_curve(summary), benchmark_curve(summary)
    drawn = {
        "curves": learning_curves.learning_curves(regimes, page.names, page.quality, steps),
        "layers": charts.layers(curve, regimes),
        "benchmarks": charts.layers(judged, regimes, "benchmarks", "Benchmarks against layer index"),
        "knowledge": information_plane.measures(regimes, page.names),
        "plane": information_plane.plane(regimes, page.names),
        "timeline": charts.timeline(summary.work, regimes),
        "predictions": charts.predictions(summary.work, regimes),
    }
    return template("report.html.j2").render(
        run=summary.run,
        figures=_figures(page, {"layers": curve, "benchmarks": judged}, steps or {}),
        status=summary.status,
        status_words=STATUS_WORDS.get(summary.status, summary.status),
        nodes=summary.nodes,
        verdict=verdict(summary),
        memory=page.memory,
        quality=page.quality,
        original=_original_row(summary, page.quality),
        cards=[_card(page, name) for name in regimes],
        stages=_stage_rows(page),
        rounded=any(stage.swallowed is not None for regime in regimes.values() for stage in regime.stages),
        forwards=forward_rows(regimes, page.names, page.palette),
        boundaries=boundary_rows(regimes, page.names, page.palette),
        resumed=any(stage.resumed for regime in regimes.values() for stage in regime.stages),
        time_groups=shown_groups(regimes),
        times=[row for name in regimes for row in time_rows(page.names[name], regimes[name], page.palette[name])],
        work=[work_row(item) for item in summary.work],
        legend=[{"title": page.names[name], "colour": page.palette[name]} for name in regimes],
        layer_legend=_layer_legend(curve, page.names, page.palette),
        benchmarks=_benchmarks(page),
        classes=class_table(summary),
        knowledge=boundary_table(summary),
        palette=page.palette,
        names=page.names,
        benchmark_legend=_layer_legend(judged, page.names, page.palette),
        tested=any(epoch.test for each in regimes.values() for stage in each.stages for epoch in stage.curve),
        reference_line=len(regimes) > 1 and any(each.done and is_baseline(each) for each in regimes.values()),
        failures=summary.failures,
        data=summary.data,
        data_rows=_data_rows(summary.data),
        data_lines=[] if summary.data is None else data_lines(summary.data),
        exports=_exports(page),
        yardstick=_yardstick(page),
        about=summary.about,
        settings=_settings(page),
        files=FILES,
        environment=environment_rows(summary.environment),
        machine=machine_words(summary.environment),
        charts={key: Markup(value) if value else None for key, value in drawn.items()},
    )


def _figures(page: _Page, layered: Mapping[str, LayerCurve | None], steps: StepCurves) -> dict[str, Any]:
    """Return the points of the page's curves by the figure they are in."""
    from orchestrator.reports.figures import information_plane

    regimes, names = page.summary.regimes, page.names
    found = {
        "curves": points.learning_points(regimes, names, page.quality, steps),
        "knowledge": information_plane.measure_points(regimes, names),
    }
    found |= {
        name: drawn
        for name, curve in layered.items()
        if (drawn := points.layer_points(curve, page.names, name)) is not None
    }
    return {name: drawn.to_json() for name, drawn in found.items() if drawn.lines}


@dataclass(frozen=True)
class _Page:
    """A summary and what all parts of its page need. `names`: regime -> title; `palette`: regime -> colour."""

    summary: Summary

    @cached_property
    def names(self) -> dict[str, str]:
        return titles(self.summary.regimes)

    @cached_property
    def palette(self) -> dict[str, str]:
        return svg.colours(self.summary.regimes)

    @cached_property
    def memory(self) -> MemoryBasis:
        return MemoryBasis(self.summary)

    @cached_property
    def quality(self) -> Quality:
        return quality_of(self.summary)


#: Figures of a split of text, in the order of the columns.
_SPLIT_COLUMNS = (
    *("read", "samples", "tokens", "shortest", "mean", "longest", "longest_read"),
    *("cut", "dropped", "without_targets", "empty"),
)


def _data_rows(data: DataSummary | None) -> list[PageRow]:
    """Return a row a split of a text data set; none of images, of which the lines say everything."""
    splits = {} if data is None or any(split.read is None for split in data.splits.values()) else data.splits
    return [
        {
            "name": name,
            "cells": [_whole_text(getattr(split, key)) for key in _SPLIT_COLUMNS],
        }
        for name, split in splits.items()
    ]


def _whole_text(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def _card(page: _Page, name: str) -> PageRow:
    summary, quality = page.summary, page.quality
    regime = summary.regimes[name]
    final, peak = regime.final, page.memory.of(regime)
    known = [quality.value(each.final.metrics) for each in summary.regimes.values()]
    value = quality.value(final.metrics)
    share, ratio = _compared(page, name)
    return {
        "name": name,
        "title": page.names[name],
        "kind": _kind_words(regime, quality),
        "colour": page.palette[name],
        "status": regime.status,
        "status_words": STATUS_WORDS.get(regime.status, regime.status),
        "best": value is not None and len(known) > 1 and value == quality.best(known),
        "headline": quality.written(value),
        **_improvement(page, name),
        **_scores(final.metrics, final.validation, quality),
        "peak": bytes_text(peak),
        "peak_share": percent_text(share, 0) if share is not None else None,
        "seconds": seconds_text(regime.seconds or None),
        "seconds_ratio": ratio_text(ratio) if ratio is not None else None,
        "wall": seconds_text(regime.wall_seconds),
        "parameters": trained_text(regime),
        "written": bytes_text(regime.snapshot.bytes_written),
        "read": bytes_text(regime.snapshot.bytes_read),
        "stages": len(regime.stages),
        "done": sum(stage.done for stage in regime.stages),
        "reused": sum(stage.reused for stage in regime.stages),
        "epochs": sum(stage.epochs for stage in regime.stages),
    }


def _kind_words(regime: RegimeSummary, quality: Quality) -> str:
    row = of_kind(regime.kind)
    words = (row.text_words if quality.text else "") or row.words
    variant = "" if regime.variant is None else f"; variant: {regime.variant}"
    return words + variant + ("; in rounds that overlap" if regime.pipeline == "wavefront" else "")


def _compared(page: _Page, name: str) -> tuple[float | None, float | None]:
    """Return a finished regime's peak memory and time over those of the finished baseline; None where not compared."""
    baseline = baseline_of(page.summary)
    if baseline is None or baseline == name:
        return None, None
    regime, reference = page.summary.regimes[name], page.summary.regimes[baseline]
    if not (regime.done and reference.done):
        return None, None
    ratio = regime.seconds / reference.seconds if regime.seconds and reference.seconds else None
    return page.memory.share(page.memory.of(regime)), ratio


def _improvement(page: _Page, name: str) -> PageRow:
    """Return what a card says of the gain over the original model, and of its share of the baseline's gain."""
    found = improvements(page.summary, page.quality).get(name)
    if found is None:
        return {"improvement": None, "improvement_share": None}
    shown = found.share is not None and found.gain > 0
    return {
        "improvement": gain_text(Improvement(found.gain, None), page.quality, ""),
        "improvement_share": percent_text(found.share, 0) if shown else None,
    }


def _scores(test: Metrics, validation: Metrics, quality: Quality) -> dict[str, str]:
    """Return the columns that say how good a model is."""
    return {
        "score": quality.written(quality.value(test)),
        "accuracy": percent_text(test.get("accuracy"), 2),
        "token_accuracy": percent_text(test.get("token_accuracy"), 2),
        "perplexity": perplexity_text(test),
        "validation": quality.written(quality.value(validation)),
        "loss": loss_text(test.get("loss")),
    }


def _original_row(summary: Summary, quality: Quality) -> dict[str, str] | None:
    """Return the model as it came, as a row above the regimes; None where it is not judged."""
    test, validation = original_of(summary), original_of(summary, "validation")
    return _scores(test, validation, quality) if test or validation else None


def _stage_rows(page: _Page) -> list[PageRow]:
    regimes, memory = page.summary.regimes, page.memory
    peaks = [memory.of(stage) or 0.0 for regime in regimes.values() for stage in regime.stages]
    scale = memory.reference or max(peaks, default=0.0)
    return [
        {
            "regime": page.names[name],
            "first": index == 0,
            "span": len(regime.stages),
            "colour": page.palette[name],
            **_stage_row(stage, page.quality),
            **_memory_cells(stage, memory, scale),
        }
        for name, regime in regimes.items()
        for index, stage in enumerate(regime.stages)
    ]


def _stage_row(stage: StageSummary, quality: Quality) -> PageRow:
    """Return what a stage did: its path, input, epochs and scores."""
    return {
        "name": stage.name,
        "status": stage.status,
        "status_words": STATUS_WORDS.get(stage.status, stage.status),
        "path": " → ".join(abbreviated(stage.path)),
        "trained": ", ".join(abbreviated(stage.trained)),
        "auxiliary": stage.auxiliary,
        "source": source_words(stage.source, text=quality.text) or DASH,
        "source_reason": stage.source_reason or "",
        "epochs": _epochs(stage),
        "exit": stage.exit or DASH,
        "swallowed": percent_text(stage.swallowed),
        "too_much": (stage.swallowed or 0.0) > MOST_SWALLOWED,
        "reached": quality.written(stage.metrics.get(f"validation_{quality.metric}")),
        "assembled": quality.written(quality.value(stage.assembled)),
        "seconds": seconds_text(stage.seconds),
        "read": bytes_text(stage.snapshot.bytes_read),
        "hits": f"{stage.snapshot.hits:,}",
        "misses": f"{stage.snapshot.misses:,}",
    }


def _memory_cells(stage: StageSummary, memory: MemoryBasis, scale: float) -> PageRow:
    """Return what a stage needed. `scale`: bytes of a full bar."""
    peak = memory.of(stage)
    share = memory.share(peak)
    return {
        "parameters": trained_text(stage),
        "resident": bytes_text(stage.resident_bytes),
        "peak_device": bytes_text(stage.peak_device_bytes),
        "reserved": bytes_text(stage.peak_device_reserved_bytes),
        "peak_host": bytes_text(stage.peak_host_bytes),
        "growth": bytes_text(stage.host_growth_bytes),
        "predicted": bytes_text(stage.estimate.predicted.peak_bytes),
        "share": percent_text(share, 0) if share is not None else None,
        "bar": round(100 * min(1.0, peak / scale / 1.1), 1) if peak and scale else None,
    }


def _epochs(stage: StageSummary) -> str:
    if not stage.epochs:
        return DASH
    text = str(stage.epochs)
    if stage.rounds > 1:
        text += f" in {stage.rounds} rounds"
    if stage.planned_epochs and stage.planned_epochs != stage.epochs:
        text += f" of {stage.planned_epochs}"
    if stage.committed_epoch is not None and stage.epochs > 1:
        text += f", kept {stage.committed_epoch + 1}"
    return text


def _layer_legend(
    curve: LayerCurve | None, names: Mapping[str, str], palette: Mapping[str, str]
) -> list[dict[str, str]]:
    """Name what stands across the figure, then each regime's two models."""
    if curve is None:
        return []
    across = list(dict.fromkeys(name for found in curve.across.values() for name, _ in found))
    lines = dict.fromkeys((line.regime, line.model) for found in curve.lines.values() for line in found)
    return [
        {
            "title": "the original model" if name is None else names[name],
            "colour": "" if name is None else palette[name],
            "style": "dotted" if name is None else "dashed",
            "width": "1.5px",
        }
        for name in across
    ] + [
        {
            "title": f"{names[regime]}, {'the whole model' if model == 'full' else 'cut off behind the layer'}",
            "colour": palette[regime],
            "style": "solid" if model == "full" else "dashed",
            "width": "2.5px",
        }
        for regime, model in lines
    ]


def _benchmarks(page: _Page) -> PageRow | None:
    """Return the scores on benchmarks: the original, what regimes come to, and their stages; None without any."""
    summary = page.summary
    names = benchmarks.asked_of(summary)
    if not names:
        return None
    rows = [
        {
            "title": "As it came",
            "colour": "#1c2733",
            "stage": "",
            "last": True,
            "cells": benchmarks.cells(summary.judged, names),
        }
    ]
    for name, regime in summary.regimes.items():
        for stage in regime.stages:
            if stage.judged:
                cells = benchmarks.cells(stage.judged, names)
                rows.append(
                    {
                        "title": page.names[name],
                        "colour": page.palette[name],
                        "stage": stage.name,
                        "last": stage is regime.stages[-1],
                        "cells": cells,
                    }
                )
    return {"heads": [benchmarks.title(name) for name in names], "rows": rows, "notes": benchmarks.notes_of(summary)}


def _yardstick(page: _Page) -> str:
    """Return what to call the regime that the others are compared with."""
    name = baseline_of(page.summary)
    return "end-to-end" if name in (None, "e2e") else page.names[name]


def _settings(page: _Page) -> dict[str, Any] | None:
    """Return what the regimes were trained with, a row each; None of summaries from before that was written down."""
    known = {name: regime.settings for name, regime in page.summary.regimes.items() if regime.settings}
    columns = list(dict.fromkeys(key for settings in known.values() for key in settings))
    rows = [
        {"title": page.names[name], "cells": [settings.get(key, DASH) for key in columns]}
        for name, settings in known.items()
    ]
    return {"columns": columns, "rows": rows} if rows else None


def _exports(page: _Page) -> list[dict[str, str]]:
    """Return where each model lies. Only the last three parts of the path: a report is for sharing."""
    found = []
    for name, regime in page.summary.regimes.items():
        if regime.export:
            path = Path(regime.export)
            folder = path.parent if path.suffix else path
            found.append({"title": page.names[name], "path": "/".join(("model", folder.name)), "name": name})
    return found
