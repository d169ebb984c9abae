"""`report.html` of a sweep and the table it prints, made from `sweep.json` alone. The template only lays out."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cache_store.storage.durable import write_atomically
from orchestrator.reports.machine import environment_rows, machine_words
from orchestrator.sweeps.metric import Metric
from orchestrator.sweeps.space import value_text
from orchestrator.sweeps.summary import memory_key
from orchestrator.units import DASH, bytes_text, count_text, percent_text, ratio_text, seconds_text

Json = Mapping[str, Any]

STATUS_WORDS = {
    "done": "finished",
    "stopped": "stopped by the scheduler",
    "failed": "failed",
    "running": "interrupted",
    "waiting": "not started",
}
SWEEP_WORDS = {"done": "finished", "failed": "some trials failed", "stopped": "stopped; the same command goes on"}
SCHEDULERS = {
    "all": "every trial runs to its end",
    "asha": "asha: trials behind the others are stopped early",
    "pbt": "pbt: trials behind the others take over their stages and go on with changed settings",
}


def write_sweep_report(summary: Json, path: Path) -> None:
    """Render `summary` (the value of `sweep.json`) to `path`, replacing it atomically."""
    write_atomically(path, render(summary).encode())


def render(summary: Json) -> str:
    # Imported late: a dry run never needs matplotlib.
    from orchestrator.sweeps import figures as figures

    metric = figures.metric_of(summary)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[1] / "reports" / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = {
        "parameters": figures.parameters(summary),
        "front": figures.front(summary),
        "rungs": figures.rungs(summary),
        "shared": figures.shared(summary),
    }
    trials = summary["trials"]
    return environment.get_template("sweep.html.j2").render(
        run=summary["run"],
        status=summary["status"],
        status_words=SWEEP_WORDS.get(summary["status"], summary["status"]),
        scheduler=SCHEDULERS[summary["scheduler"]["name"]],
        scheduler_name=summary["scheduler"]["name"],
        metric=metric.key,
        mode={"max": "more is better", "min": "less is better"}[metric.mode],
        verdict=verdict(summary, metric),
        cards=_cards(summary, metric),
        parameters=[(key, summary["short"][key], _draw_words(draw)) for key, draw in summary["parameters"].items()],
        keys=[summary["short"][key] for key in summary["parameters"]],
        tested=metric.split != "test",
        trials=[_row(trial, summary, metric) for trial in _ranked(trials, metric)],
        baselines=_baselines(summary, metric),
        memory="device memory" if memory_key(trials) == "peak_device_bytes" else "host memory",
        failures=summary["failures"],
        environment=environment_rows(summary["environment"]),
        machine=machine_words(summary["environment"]),
        charts={key: Markup(value) if value else None for key, value in charts.items()},
    )


def verdict(summary: Json, metric: Metric) -> list[str]:
    """The outcome in sentences, from the figures alone."""
    trials = summary["trials"]
    counts = {status: sum(trial["status"] == status for trial in trials) for status in STATUS_WORDS}
    through = [trial for trial in trials if trial["status"] == "done" and trial["metric"] is not None]
    sentences = []
    missing = [f"{number} {STATUS_WORDS[status]}" for status, number in counts.items() if number and status != "done"]
    tail = f"; {', '.join(missing)}" if missing else ""
    sentences.append(f"{counts['done']} of {len(trials)} trials ran to their end{tail}.")
    best = next((trial for trial in through if trial["best"]), None)
    if best is None:
        return [*sentences, "No trial has a final figure yet, so there is nothing to compare."]
    settings = _settings(best, summary)
    sentence = f"{best['name']} ({settings}) is best: {metric.key} {metric.written(best['metric'])}"
    if len(through) > 1:
        worst = min(through, key=lambda trial: metric.sign * trial["metric"])
        middle = statistics.median(trial["metric"] for trial in through)
        sentence += f"; the worst has {metric.written(worst['metric'])}, the median is {metric.written(middle)}"
    sentences.append(f"{sentence}.")
    if metric.split == "validation" and metric.name in best["regimes"][metric.regime]["test"]:
        test = metric.written(best["regimes"][metric.regime]["test"][metric.name])
        sentences.append(f"On the test split, which decided nothing, it has {test}.")
    elif metric.split == "test" and len(through) > 1:
        sentences.append("The test split chose the best trial, so its figure flatters: judge it on data of its own.")
    total, stages = summary["sharing"]["total"], summary["sharing"]["kinds"].get("train")
    if stages is not None and total["asked"] > total["run"]:
        whole, saved = total["seconds_asked"], total["seconds_asked"] - total["seconds_run"]
        share = percent_text(saved / whole, 0) if whole else DASH
        sentences.append(
            f"The trials asked for {stages['asked']} training stages and {stages['run']} were run; in all "
            f"{total['run']} of {total['asked']} tasks. That saved {seconds_text(saved)} of {seconds_text(whole)} of "
            f"computing ({share})."
        )
    abandoned = summary["sharing"]["abandoned"]
    if abandoned["tasks"]:
        sentences.append(
            f"{abandoned['tasks']} tasks ({seconds_text(abandoned['seconds'])}) were done for trials that took over "
            "another's stages afterwards; they are not counted in this."
        )
    return sentences


def _settings(trial: Json, summary: Json) -> str:
    return ", ".join(f"{summary['short'][key]} {value_text(value)}" for key, value in trial["parameters"].items())


def _cards(summary: Json, metric: Metric) -> list[dict[str, str]]:
    sharing = summary["sharing"]
    total = sharing["total"]
    stages = sharing["kinds"].get("train", {"asked": 0, "run": 0})
    trials = summary["trials"]
    best = next((trial for trial in trials if trial["best"]), None)
    ratio = total["seconds_asked"] / total["seconds_run"] if total["seconds_run"] else None
    return [
        {
            "title": f"best: {best['name']}" if best else "best",
            "big": metric.written(best["metric"]) if best else DASH,
            "what": metric.key,
            "note": _settings(best, summary) if best else "no trial is through",
        },
        {
            "title": "trials",
            "big": f"{sum(trial['status'] == 'done' for trial in trials)} of {len(trials)}",
            "what": "ran to their end",
            "note": f"{sum(trial['status'] == 'stopped' for trial in trials)} stopped early, "
            f"{sum(trial['status'] == 'failed' for trial in trials)} failed",
        },
        {
            "title": "stages",
            "big": f"{stages['run']} of {stages['asked']}",
            "what": "training stages run, of those asked for",
            "note": f"all tasks: {total['run']} of {total['asked']}",
        },
        {
            "title": "time",
            "big": ratio_text(ratio),
            "what": "the same trials without sharing",
            "note": f"{seconds_text(total['seconds_run'])} computed instead of {seconds_text(total['seconds_asked'])}",
        },
    ]


def _draw_words(draw: Json) -> str:
    ((kind, values),) = draw.items()
    texts = [value_text(value) for value in values]
    if kind == "grid":
        return f"each of {', '.join(texts)}"
    if kind == "choice":
        return f"one of {', '.join(texts)}"
    return f"{kind} from {' to '.join(texts)}"


def _ranked(trials: list[Json], metric: Metric) -> list[Json]:
    """The best first, then those that have no final figure, as they come."""

    def rank(trial: Json) -> tuple[int, float]:
        through = trial["status"] == "done" and trial["metric"] is not None
        return (0 if through else 1, -metric.sign * trial["metric"] if through else 0.0)

    return sorted(trials, key=rank)


def _row(trial: Json, summary: Json, metric: Metric) -> dict[str, Any]:
    own = trial["regimes"][metric.regime]
    test = Metric(metric.regime, "test", metric.name if metric.split else _name(own), metric.mode)
    value = trial["metric"]
    known = [item["metric"] for item in summary["trials"] if item["status"] == "done" and item["metric"] is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    share = None
    if value is not None and trial["status"] == "done" and high > low:
        share = (value - low) / (high - low) if metric.mode == "max" else (high - value) / (high - low)
    rungs = trial["rungs"]
    standing = ""
    if trial["status"] == "stopped" and rungs:
        standing = f"{metric.written(rungs[-1]['metric'])} after stage {rungs[-1]['stages']}"
    return {
        "name": trial["name"],
        "folder": trial["folder"],
        "values": [value_text(trial["parameters"][key]) for key in summary["parameters"]],
        "history": [_settings({"parameters": settings}, summary) for settings in trial["history"]],
        "status": trial["status"],
        "status_words": STATUS_WORDS.get(trial["status"], trial["status"]),
        "best": trial["best"],
        "pareto": trial["pareto"],
        "metric": metric.written(value) if trial["status"] == "done" else DASH,
        "standing": standing,
        "bar": None if share is None else round(12 + 88 * share, 1),
        "test": test.written(own["test"].get(test.name)),
        "memory": bytes_text(trial[memory_key(summary["trials"])]),
        "seconds": seconds_text(trial["seconds"] or None),
        "parameters": count_text(own["trainable_parameters"]),
        "stages": f"{trial['stages']['done']} of {trial['stages']['planned']}",
        "shared": trial["stages"]["shared"],
        "nodes": f"{trial['nodes']['shared']} of {trial['nodes']['asked']}",
    }


def _name(regime: Json) -> str:
    return "accuracy" if "accuracy" in regime["test"] or not regime["test"] else next(iter(regime["test"]))


def _baselines(summary: Json, metric: Metric) -> list[dict[str, str]]:
    """Regimes beside the one that is compared, where all trials have the same one, and the untouched model."""
    from orchestrator.sweeps.figures import references

    memory = memory_key(summary["trials"])
    rows = []
    for name, value, colour in references(summary, metric):
        regime = next((trial["regimes"][name] for trial in summary["trials"] if name in trial["regimes"]), None)
        test = (regime["test"] if regime else summary["original"].get("test", {})).get(metric.name)
        rows.append(
            {
                "name": name,
                "colour": colour,
                "metric": metric.written(value),
                "test": metric.written(test),
                "memory": bytes_text(regime[memory]) if regime else DASH,
                "seconds": seconds_text(regime["seconds"] or None) if regime else DASH,
            }
        )
    return rows


def print_trials(summary: Json, stream: TextIO | None = None) -> None:
    """The trials, the best first: a table in a terminal, aligned plain text in a file or pipe; then what was shared."""
    from orchestrator.sweeps.figures import metric_of

    metric = metric_of(summary)
    memory = "peak device memory" if memory_key(summary["trials"]) == "peak_device_bytes" else "peak host growth"
    keys = [summary["short"][key] for key in summary["parameters"]]
    header = ["trial", *keys, "status", metric.key, "test", memory, "time alone", "stages", "shared"]
    rows = [header]
    for trial in _ranked(summary["trials"], metric):
        row = _row(trial, summary, metric)
        rows.append(
            [
                f"{row['name']}{' best' if row['best'] else ''}",
                *row["values"],
                row["status"],
                row["metric"] if trial["status"] != "stopped" else f"({metric.written(trial['rungs'][-1]['metric'])})",
                row["test"],
                row["memory"],
                row["seconds"],
                row["stages"],
                str(row["shared"]),
            ]
        )
    total, stages = summary["sharing"]["total"], summary["sharing"]["kinds"].get("train", {"asked": 0, "run": 0})
    last = (
        f"{stages['run']} stages run of {stages['asked']} asked, {total['run']} tasks of {total['asked']}; "
        f"{seconds_text(total['seconds_run'])} computed, {seconds_text(total['seconds_asked'])} without sharing"
    )
    console = Console(file=stream or sys.stdout, highlight=False)
    if console.is_terminal:
        table = Table(header_style="bold")
        for index, title in enumerate(header):
            table.add_column(title, justify="left" if index == 0 else "right")
        for cells in rows[1:]:
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
        console.print(Text(last))
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for cells in rows:
        line = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        console.file.write("  ".join(line).rstrip() + "\n")
    console.file.write(f"{last}\n")
    console.file.flush()
