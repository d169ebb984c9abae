"""`report.html`: one file that tells what a run came to, made from `summary.json` alone.

This module puts figures into words and rows; the template only lays them out. Nothing is loaded from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cache_store.storage.durable import write_atomically
from orchestrator.reports import learning_curves, svg
from orchestrator.reports.layer_curve import LayerCurve, layer_curve
from orchestrator.reports.machine import environment_rows, machine_words
from orchestrator.reports.part_names import abbreviated, follows, in_order
from orchestrator.reports.quality import (
    Improvement,
    Quality,
    improvements,
    loss_text,
    original_of,
    perplexity_text,
    quality_of,
)
from orchestrator.reports.verdict import _gain_text, verdict
from orchestrator.reports.words import KINDS, STATUS_WORDS, TEXT_KINDS, Json, MemoryBasis, finished, titles
from orchestrator.units import DASH, bytes_text, count_text, percent_text, ratio_text, seconds_text, source_words


def write_report(summary: Json, path: Path) -> None:
    """Render `summary` (the value of `summary.json`) to `path`, replacing it atomically."""
    write_atomically(path, render(summary).encode())


def render(summary: Json) -> str:
    # Imported late: a dry run never needs matplotlib.
    from orchestrator.reports import figures

    regimes: Mapping[str, Json] = summary["regimes"]
    names = titles(regimes)
    memory = MemoryBasis(summary)
    quality = quality_of(summary)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    palette = svg.colours(regimes)
    curve = layer_curve(summary)
    charts = {
        "curves": learning_curves.learning_curves(regimes, names, quality),
        "layers": figures.layers(curve, regimes, names),
        "timeline": figures.timeline(summary["work"], regimes, names),
        "predictions": figures.predictions(summary["work"], regimes),
    }
    return environment.get_template("report.html.j2").render(
        run=summary["run"],
        status=summary["status"],
        status_words=STATUS_WORDS.get(summary["status"], summary["status"]),
        nodes=summary["nodes"],
        verdict=verdict(summary),
        memory=memory,
        quality=quality,
        original=_original_row(summary, quality),
        cards=[_card(summary, memory, quality, name, names, palette) for name in regimes],
        stages=_stage_rows(summary, memory, quality, names, palette),
        forwards=_forward_rows(regimes, names, palette),
        boundaries=_boundary_rows(regimes, names, palette),
        work=_work_rows(summary["work"]),
        legend=[{"title": names[name], "colour": palette[name]} for name in regimes],
        layer_legend=_layer_legend(curve, names, palette),
        reference_line=len(regimes) > 1 and any(finished(r) and r["kind"] == "e2e" for r in regimes.values()),
        failures=summary["failures"],
        exports=_exports(regimes, names),
        environment=environment_rows(summary["environment"]),
        machine=machine_words(summary["environment"]),
        charts={key: Markup(value) if value else None for key, value in charts.items()},
    )


def _card(
    summary: Json,
    memory: MemoryBasis,
    quality: Quality,
    name: str,
    names: Mapping[str, str],
    palette: Mapping[str, str],
) -> dict[str, Any]:
    regimes = summary["regimes"]
    regime = regimes[name]
    final = regime["final"]
    known = [quality.value(r["final"]["metrics"]) for r in regimes.values()]
    value = quality.value(final["metrics"])
    improvement = improvements(summary, quality).get(name)
    reference = next((r for r in regimes.values() if r["kind"] == "e2e"), None)
    peak = memory.of(regime)
    compared = reference is not None and regime is not reference and finished(regime) and finished(reference)
    ratio = None
    if reference is not None and compared and regime["seconds"] and reference["seconds"]:
        ratio = regime["seconds"] / reference["seconds"]
    share = memory.share(peak) if compared else None
    snapshot = regime["snapshot"]
    return {
        "name": name,
        "title": names[name],
        "kind": (TEXT_KINDS if quality.text else KINDS).get(regime["kind"], regime["kind"])
        + ("; in rounds that overlap" if regime["pipeline"] == "wavefront" else ""),
        "colour": palette[name],
        "status": regime["status"],
        "status_words": STATUS_WORDS.get(regime["status"], regime["status"]),
        "best": value is not None and len(known) > 1 and value == quality.best(known),
        "headline": quality.written(value),
        "improvement": None if improvement is None else _gain_text(Improvement(improvement.gain, None), quality, ""),
        "improvement_share": None
        if improvement is None or improvement.share is None or improvement.gain <= 0
        else percent_text(improvement.share, 0),
        **_scores(final["metrics"], final["validation"], quality),
        "peak": bytes_text(peak),
        "peak_share": percent_text(share, 0) if share is not None else None,
        "seconds": seconds_text(regime["seconds"] or None),
        "seconds_ratio": ratio_text(ratio) if ratio is not None else None,
        "wall": seconds_text(regime["wall_seconds"]),
        "parameters": count_text(regime["trainable_parameters"]),
        "written": bytes_text(snapshot["bytes_written"]),
        "read": bytes_text(snapshot["bytes_read"]),
        "stages": len(regime["stages"]),
        "done": sum(stage["status"] in ("done", "reused") for stage in regime["stages"]),
        "reused": sum(stage["reused"] for stage in regime["stages"]),
        "epochs": sum(stage["epochs"] for stage in regime["stages"]),
    }


def _scores(test: Json, validation: Json, quality: Quality) -> dict[str, str]:
    """The columns that say how good a model is."""
    return {
        "accuracy": percent_text(test.get("accuracy"), 2),
        "token_accuracy": percent_text(test.get("token_accuracy"), 2),
        "perplexity": perplexity_text(test),
        "validation": quality.written(quality.value(validation)),
        "loss": loss_text(test.get("loss")),
    }


def _original_row(summary: Json, quality: Quality) -> dict[str, str] | None:
    """The model as it came, as a row above the regimes; None where it is not judged."""
    test, validation = original_of(summary), original_of(summary, "validation")
    return _scores(test, validation, quality) if test or validation else None


def _stage_rows(
    summary: Json, memory: MemoryBasis, quality: Quality, names: Mapping[str, str], palette: Mapping[str, str]
) -> list[dict[str, Any]]:
    largest = max(
        (memory.of(stage) or 0.0 for regime in summary["regimes"].values() for stage in regime["stages"]),
        default=0.0,
    )
    rows = []
    for name, regime in summary["regimes"].items():
        for index, stage in enumerate(regime["stages"]):
            peak = memory.of(stage)
            share = memory.share(peak)
            scale = memory.reference or largest
            rows.append(
                {
                    "regime": names[name],
                    "first": index == 0,
                    "span": len(regime["stages"]),
                    "colour": palette[name],
                    "name": stage["name"],
                    "status": stage["status"],
                    "status_words": STATUS_WORDS.get(stage["status"], stage["status"]),
                    "path": " → ".join(abbreviated(stage["path"])),
                    "trained": ", ".join(abbreviated(stage["trained"])),
                    "auxiliary": stage["auxiliary"],
                    "source": source_words(stage["source"], text=quality.text) or DASH,
                    "source_reason": stage["source_reason"] or "",
                    "epochs": _epochs(stage),
                    "exit": stage["exit"] or DASH,
                    "reached": quality.written(stage["metrics"].get(f"validation_{quality.metric}")),
                    "assembled": quality.written(quality.value(stage["assembled"])),
                    "seconds": seconds_text(stage["seconds"]),
                    "parameters": count_text(stage["trainable_parameters"]),
                    "resident": bytes_text(stage["resident_bytes"]),
                    "peak_device": bytes_text(stage["peak_device_bytes"]),
                    "reserved": bytes_text(stage["peak_device_reserved_bytes"]),
                    "peak_host": bytes_text(stage["peak_host_bytes"]),
                    "growth": bytes_text(stage["host_growth_bytes"]),
                    "predicted": bytes_text(stage["estimate"]["predicted"].get("peak_bytes")),
                    "share": percent_text(share, 0) if share is not None else None,
                    "bar": round(100 * min(1.0, peak / scale / 1.1), 1) if peak and scale else None,
                    "read": bytes_text(stage["snapshot"]["bytes_read"]),
                    "hits": f"{stage['snapshot']['hits']:,}",
                    "misses": f"{stage['snapshot']['misses']:,}",
                }
            )
    return rows


def _epochs(stage: Json) -> str:
    if not stage["epochs"]:
        return DASH
    planned = stage["planned_epochs"]
    text = str(stage["epochs"])
    if stage["rounds"] > 1:
        text += f" in {stage['rounds']} rounds"
    if planned and planned != stage["epochs"]:
        text += f" of {planned}"
    if stage["committed_epoch"] is not None and stage["epochs"] > 1:
        text += f", kept {stage['committed_epoch'] + 1}"
    return text


def _layer_legend(
    curve: LayerCurve | None, names: Mapping[str, str], palette: Mapping[str, str]
) -> list[dict[str, str]]:
    """What stands across the figure, then each regime's two models."""
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


def _forward_rows(
    regimes: Mapping[str, Json], names: Mapping[str, str], palette: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row a block; neighbours that ran equally often share one."""
    return [
        {
            "regime": names[name],
            "colour": palette[name],
            "block": ", ".join(abbreviated(blocks)),
            "samples": f"{counted['samples']:,}",
            "pairs": f"{counted['sample_views']:,}" if counted["sample_views"] else DASH,
            "ratio": ratio_text(counted["per_sample_view"]),
        }
        for name, regime in regimes.items()
        for blocks, counted in _equal_neighbours(regime["forwards"])
    ]


def _boundary_rows(
    regimes: Mapping[str, Json], names: Mapping[str, str], palette: Mapping[str, str]
) -> list[dict[str, str]]:
    """What was decided for every boundary, with what it was predicted to cost and what it did."""
    rows = []
    for name, regime in regimes.items():
        for item in regime.get("boundaries", []):
            row = {
                "regime": names[name],
                "colour": palette[name],
                "label": item["label"],
                "source": item["source"],
                "reason": item["reason"],
                "basis": item["basis"],
            }
            for key, value in item["predicted"].items():
                text = bytes_text if key == "bytes" else seconds_text
                row[f"{key}_predicted"], row[f"{key}_measured"] = text(value), text(item["measured"][key])
            rows.append(row)
    return rows


def _equal_neighbours(forwards: Mapping[str, Json]) -> list[tuple[list[str], Json]]:
    groups: list[tuple[list[str], Json]] = []
    for block in in_order(list(forwards)):
        if groups and block.startswith("layer") and follows(groups[-1][0][-1], block):
            blocks, counted = groups[-1]
            if counted == forwards[block]:
                blocks.append(block)
                continue
        groups.append(([block], forwards[block]))
    return groups


def _work_rows(work: list[Json]) -> list[dict[str, str]]:
    texts = {"peak_bytes": bytes_text, "snapshot_bytes": bytes_text, "seconds": seconds_text}
    rows = []
    for item in work:
        row = {"label": item["label"], "status": STATUS_WORDS.get(item["status"], item["status"])}
        for key, text in texts.items():
            relevant = {
                "peak_bytes": ("train",),
                "snapshot_bytes": ("materialize",),
                "seconds": ("train", "materialize", "evaluate", "average", "data", "model"),
            }[key]
            shown = item["kind"] in relevant
            predicted, measured = item["predicted"].get(key), item["measured"].get(key)
            row[f"{key}_predicted"] = text(predicted) if shown else ""
            row[f"{key}_measured"] = text(measured) if shown else ""
        rows.append(row)
    return rows


def _exports(regimes: Mapping[str, Json], names: Mapping[str, str]) -> list[dict[str, str]]:
    """Where each model lies. Only the last three parts of the path: a report is for sharing."""
    found = []
    for name, regime in regimes.items():
        if regime["export"]:
            path = Path(regime["export"])
            folder = path.parent if path.suffix else path
            found.append({"title": names[name], "path": "/".join(("model", folder.name)), "name": name})
    return found
