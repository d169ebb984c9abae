"""`report.html`: one file that tells what a run came to, made from `summary.json` alone.

This module puts figures into words and rows; the template only lays them out. Nothing is loaded from outside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.layer_curve import LayerCurve, layer_curve
from orchestrator.part_names import abbreviated, follows, in_order
from orchestrator.quality import (
    Improvement,
    Quality,
    improvements,
    loss_text,
    original_of,
    perplexity_text,
    quality_of,
)
from orchestrator.summary import write_atomically
from orchestrator.units import DASH, bytes_text, count_text, percent_text, ratio_text, seconds_text, source_words

Json = Mapping[str, Any]

TITLES = {"e2e": "End-to-end", "lw": "Layer-wise", "segprop": "SegProp"}
KINDS = {
    "e2e": "all blocks at once, one loss",
    "lw": "block after block, each with a local classifier",
    "segprop": "segment after segment, each with the network's own head",
}
TEXT_KINDS = {**KINDS, "lw": "block after block, each with its own copy of the head"}
STATUS_WORDS = {
    "done": "finished",
    "reused": "finished earlier, reused",
    "failed": "failed",
    "stopped": "stopped; the same command goes on",
    "partial": "incomplete",
    "pending": "not started",
}


def write_report(summary: Json, path: Path) -> None:
    """Render `summary` (the value of `summary.json`) to `path`, replacing it atomically."""
    write_atomically(path, render(summary).encode())


def render(summary: Json) -> str:
    # Imported late: a dry run never needs matplotlib.
    from orchestrator import figures

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
    palette = figures.colours(regimes)
    curve = layer_curve(summary)
    charts = {
        "curves": figures.learning_curves(regimes, names, quality),
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


def titles(regimes: Mapping[str, Json]) -> dict[str, str]:
    """What to call each regime: the kind's own name where the regime is named after its kind."""
    return {name: TITLES.get(name, name) for name in regimes}


class MemoryBasis:
    """Which figure stands for peak memory: the device's where there is one, else growth of the process."""

    def __init__(self, summary: Json) -> None:
        stages = [stage for regime in summary["regimes"].values() for stage in regime["stages"]]
        self.device = any(stage["peak_device_bytes"] for stage in stages)
        self.key = "peak_device_bytes" if self.device else "host_growth_bytes"
        self.words = "peak device memory" if self.device else "peak host memory above idle"
        whole = [regime for regime in summary["regimes"].values() if regime["kind"] == "e2e"]
        baseline = next((regime for regime in whole if regime[self.key] and finished(regime)), None)
        self.reference: float | None = baseline[self.key] if baseline else None

    def of(self, item: Json) -> float | None:
        value = item[self.key]
        return None if value is None else float(value)

    def share(self, value: float | None) -> float | None:
        """Of the end-to-end peak."""
        return value / self.reference if value is not None and self.reference else None


def verdict(summary: Json) -> list[str]:
    """The outcome in sentences, from the figures alone."""
    regimes: Mapping[str, Json] = summary["regimes"]
    names = titles(regimes)
    memory = MemoryBasis(summary)
    quality = quality_of(summary)
    values = {
        name: value
        for name, regime in regimes.items()
        if (value := quality.value(regime["final"]["metrics"])) is not None
    }
    ranked = quality.ranked(values)
    sentences = _incomplete(summary, [names[name] for name in regimes if name not in values])
    if not ranked:
        return [*sentences, "No regime has a final test result yet, so there is nothing to compare."]
    best = ranked[0]
    scores = {name: _score(quality, regimes[name]["final"]["metrics"]) for name in ranked}
    if len(regimes) == 1:
        regime = regimes[best]
        sentences.append(
            f"{names[best]} reached {scores[best]} after "
            f"{seconds_text(regime['seconds'])} of training, with {bytes_text(memory.of(regime))} "
            f"{memory.words} in its largest stage. Only this regime was run, so nothing is compared."
        )
        return [
            *sentences,
            *_against_original(summary, quality, names),
            *_overlaps(regimes, names),
            *_ended_early(regimes, names),
        ]
    if len(ranked) > 1:
        sentences += _ranking(values, ranked, names, regimes, quality)
    else:
        sentences.append(f"{names[best]} reached {scores[best]}.")
    return [
        *sentences,
        *_against_original(summary, quality, names),
        *_costs(regimes, names, memory),
        *_overlaps(regimes, names),
        *_ended_early(regimes, names),
    ]


def _score(quality: Quality, metrics: Json) -> str:
    """`95.50 % test accuracy`, `a test loss of 2.1034 (perplexity 8.19)`."""
    text = quality.written(quality.value(metrics))
    if quality.metric == "accuracy":
        return f"{text} test accuracy"
    return f"a test loss of {text} (perplexity {perplexity_text(metrics)})"


def _ranking(
    values: Mapping[str, float], ranked: list[str], names: Json, regimes: Mapping[str, Json], quality: Quality
) -> list[str]:
    """Who is best and how far the others are behind, and what of that may be chance."""
    top = values[ranked[0]]
    equal = [name for name in ranked if quality.written(values[name]) == quality.written(top)]
    behind = [name for name in ranked if name not in equal]
    if quality.metric == "accuracy":
        what = f"the best test accuracy, {quality.written(top)}"
        others = [
            f"{names[name]} {quality.written(values[name])} (−{100 * (top - values[name]):.2f} points)"
            for name in behind
        ]
    else:
        written = {name: perplexity_text(regimes[name]["final"]["metrics"]) for name in ranked}
        what = f"the lowest test loss, {quality.written(top)} (perplexity {written[ranked[0]]})"
        others = [
            f"{names[name]} {quality.written(values[name])} (+{values[name] - top:.4f}, perplexity {written[name]})"
            for name in behind
        ]
    verb = "has" if len(equal) == 1 else "share"
    tail = f"; {', '.join(others)}" if others else ""
    sentences = [f"{_list([names[name] for name in equal])} {verb} {what}{tail}."]
    if not quality.text:
        return sentences + _noise(values, ranked, names, regimes[ranked[0]]["final"].get("rows"))
    if behind:
        # Neither tokens nor candidates are independent of each other: their number says nothing of the noise.
        sentences.append(
            "One seed is one seed: how much of these differences another seed would turn round was not measured."
        )
    return sentences


def _against_original(summary: Json, quality: Quality, names: Mapping[str, str]) -> list[str]:
    """What training added to the model as it came, and how much of end-to-end's gain each regime has."""
    found = improvements(summary, quality)
    if not found:
        return []
    base = next((names[name] for name, regime in summary["regimes"].items() if regime["kind"] == "e2e"), "")
    told = [f"{names[name]} is {_gain_text(item, quality, base)}" for name, item in found.items()]
    before = original_of(summary)
    beside = "" if quality.metric == "accuracy" else f" (perplexity {perplexity_text(before)})"
    return [
        f"The model as it came has a test {quality.metric} of {quality.written(quality.value(before))}{beside}: "
        f"{', '.join(told)}."
    ]


def _gain_text(item: Improvement, quality: Quality, base: str) -> str:
    """`0.6912 better (99 % of End-to-end's improvement)`, `0.0488 worse`."""
    size = abs(item.gain)
    gain = f"{100 * size:.2f} points" if quality.metric == "accuracy" else f"{size:.4f}"
    if item.gain <= 0:
        return f"{gain} worse" if item.gain else "no better"
    return f"{gain} better" + (
        "" if item.share is None else f" ({percent_text(item.share, 0)} of {base}'s improvement)"
    )


def _incomplete(summary: Json, missing: list[str]) -> list[str]:
    failed = len(summary["failures"])
    if failed:
        tasks = "One task" if failed == 1 else f"{failed} tasks"
        tail = f" {_list(missing)} {'has' if len(missing) == 1 else 'have'} no final result." if missing else ""
        return [f"{tasks} failed; what follows covers what was finished.{tail}"]
    if summary["status"] == "stopped":
        return ["The run was stopped before its end; the same command goes on from here."]
    return [f"{_list(missing)} {'has' if len(missing) == 1 else 'have'} no final result yet."] if missing else []


def _noise(accuracy: Mapping[str, float], ranked: list[str], names: Json, rows: int | None) -> list[str]:
    """How much of the difference the size of the test set can carry (two standard errors of a difference)."""
    if not rows:
        return []
    mean = sum(accuracy.values()) / len(accuracy)
    margin = 2 * math.sqrt(2 * max(mean * (1 - mean), 1e-9) / rows)
    top = accuracy[ranked[0]]
    behind = [name for name in ranked if percent_text(accuracy[name], 2) != percent_text(top, 2)]
    close = [name for name in behind if top - accuracy[name] < margin]
    if not behind:
        return []
    text = f"with {rows:,} test samples and one seed, anything below about {100 * margin:.1f} points is noise"
    if not close:
        return [f"The differences are larger than chance alone would explain: {text}."]
    verb = "is" if len(close) == 1 else "are"
    return [f"{_list([names[name] for name in close])} {verb} within noise of the best: {text}."]


def _costs(regimes: Mapping[str, Json], names: Json, memory: MemoryBasis) -> list[str]:
    reference = next((name for name, regime in regimes.items() if regime["kind"] == "e2e"), None)
    if reference is None:
        return []
    base = regimes[reference]
    others = {name: regime for name, regime in regimes.items() if name != reference and finished(regime)}
    if not others or not finished(base):
        return []
    sentences = []
    peaks = [
        f"{names[name]} {percent_text(share, 0)}"
        for name, regime in others.items()
        if (share := memory.share(memory.of(regime))) is not None
    ]
    if peaks:
        sentences.append(
            f"Of {names[reference]}'s {memory.words} ({bytes_text(memory.of(base))}), the largest stage of "
            f"{'each of the others took' if len(peaks) > 1 else 'the other took'}: {', '.join(peaks)}."
        )
    times = [
        f"{names[name]} {ratio_text(regime['seconds'] / base['seconds'])}"
        for name, regime in others.items()
        if regime["seconds"] and base["seconds"]
    ]
    if times:
        sentences.append(
            f"Training time against {names[reference]}'s {seconds_text(base['seconds'])}: {', '.join(times)}."
        )
    return sentences


def _overlaps(regimes: Mapping[str, Json], names: Mapping[str, str]) -> list[str]:
    """How much of a wave's work ran at the same time as more of it."""
    return [
        f"{names[name]} did {seconds_text(regime['seconds'])} of training in {seconds_text(regime['wall_seconds'])} on "
        f"the clock: its stages overlap ({ratio_text(regime['seconds'] / regime['wall_seconds'])})."
        for name, regime in regimes.items()
        if regime["pipeline"] == "wavefront" and finished(regime) and regime["seconds"] and regime["wall_seconds"]
    ]


def _ended_early(regimes: Mapping[str, Json], names: Mapping[str, str]) -> list[str]:
    sentences = []
    for name, regime in regimes.items():
        ended = regime["ended_early"]
        if ended:
            words = {"accuracy": lambda value: percent_text(value, 2), "loss": loss_text}
            had = _list([f"{key} {words[key](value)}" for key, value in ended["reached"].items()])
            asked = _list([words[key](value) for key, value in ended["target"].items()])
            count = ended["stages_left_out"]
            left = f"the {count} stages after it were" if count > 1 else "the last stage was"
            sentences.append(
                f"{names[name]} ended early: after {ended['after']} the whole network had reached validation {had} "
                f"(asked for: {asked}), so {left} left out."
            )
    return sentences


def finished(regime: Json) -> bool:
    return regime["status"] in ("done", "reused")


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


def environment_rows(environment: Json) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in environment.items():
        label = key.replace("_", " ")
        if value in (None, "", [], {}):
            continue
        if key.endswith("_bytes") and isinstance(value, int | float):
            rows.append((label.removesuffix(" bytes"), bytes_text(value)))
        elif key == "gpus":
            rows.append(("GPUs", ", ".join(_gpu(gpu) for gpu in value)))
        elif isinstance(value, Mapping):
            rows.append((label, ", ".join(f"{name} {item}" for name, item in value.items() if item)))
        elif isinstance(value, list | tuple):
            rows.append((label, ", ".join(map(str, value))))
        else:
            rows.append((label, str(value)))
    return rows


def _gpu(gpu: Any) -> str:
    if not isinstance(gpu, Mapping):
        return str(gpu)
    return f"{gpu.get('name', '?')} ({bytes_text(gpu.get('memory_bytes'))})"


def machine_words(environment: Json) -> str:
    parts = [_gpu(gpu) for gpu in environment.get("gpus") or []]
    if environment.get("cpu"):
        cores = environment.get("cores")
        parts.append(f"{environment['cpu']}" + (f", {cores} core{'s' if cores > 1 else ''}" if cores else ""))
    if environment.get("memory_bytes"):
        parts.append(f"{bytes_text(environment['memory_bytes'])} memory")
    return " · ".join(parts)


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
