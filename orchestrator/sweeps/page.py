"""Write `report.html` of a sweep and print its table, from its summary alone. The template only lays out."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from cache_store.storage.durable import write_atomically
from orchestrator.reports.machine import environment_rows, machine_words
from orchestrator.reports.page_template import template
from orchestrator.reports.records import Benchmarks
from orchestrator.reports.tables import benchmarks, seeds
from orchestrator.reports.tables.result_table import print_rows
from orchestrator.reports.words import SWEEP_WORDS, TRIAL_WORDS, of_kind
from orchestrator.sweeps.metric import Metric
from orchestrator.sweeps.records import NO_SHARING, DrawRecord, SweepSummary, TrialRegime, TrialSummary
from orchestrator.sweeps.space import value_text
from orchestrator.units import DASH, bytes_text, count_text, percent_text, ratio_text, seconds_text
from workers.domains.metrics import METRICS, leading

SCHEDULERS = {
    "all": "every trial runs to its end",
    "asha": "asha: trials behind the others are stopped early",
    "pbt": "pbt: trials behind the others take over their stages and go on with changed settings",
}
MODES = {"max": "more is better", "min": "less is better"}


def write_sweep_report(summary: SweepSummary, path: Path) -> None:
    """Render `summary` to `path`, replacing it atomically."""
    write_atomically(path, render(summary).encode())


def render(summary: SweepSummary) -> str:
    """Return the page of a sweep. The same summary gives the same bytes."""
    # Imported late: a dry run never needs matplotlib.
    from orchestrator.sweeps import figures

    metric = summary.compared_by
    charts = {
        "parameters": figures.parameters(summary),
        "front": figures.front(summary),
        "rungs": figures.rungs(summary),
        "shared": figures.shared(summary),
    }
    return template("sweep.html.j2").render(
        run=summary.run,
        status=summary.status,
        status_words=SWEEP_WORDS.get(summary.status, summary.status),
        scheduler=SCHEDULERS[summary.scheduler.name],
        scheduler_name=summary.scheduler.name,
        metric=metric.key,
        mode=MODES[metric.mode],
        verdict=verdict(summary),
        cards=_cards(summary),
        parameters=[(key, summary.short[key], _draw_words(draw)) for key, draw in summary.parameters.items()],
        keys=[summary.short[key] for key in summary.parameters],
        tested=metric.split != "test",
        trials=[_row(trial, summary) for trial in ranked(summary)],
        benchmarks=[benchmarks.title(name) for name in _asked(summary)],
        benchmark_notes=benchmarks.notes(_judged(summary)),
        baselines=_baselines(summary),
        seed_heads=seeds.HEADS,
        seed_note=seeds.NOTE,
        seed_rows=seed_rows(summary),
        memory="device memory" if summary.on_device else "host memory",
        failures=summary.failures,
        environment=environment_rows(summary.environment),
        machine=machine_words(summary.environment),
        charts={key: Markup(value) if value else None for key, value in charts.items()},
    )


def verdict(summary: SweepSummary) -> list[str]:
    """Return the outcome in sentences, from the figures alone."""
    trials = summary.trials
    counts = {status: sum(trial.status == status for trial in trials) for status in TRIAL_WORDS}
    missing = [f"{number} {TRIAL_WORDS[status]}" for status, number in counts.items() if number and status != "done"]
    tail = f"; {', '.join(missing)}" if missing else ""
    sentences = [f"{counts['done']} of {len(trials)} trials ran to their end{tail}."]
    best = next((trial for trial, _ in summary.through if trial.best), None)
    if best is None:
        return [*sentences, "No trial has a final figure yet, so there is nothing to compare."]
    return [*sentences, *_best_words(best, summary), *_sharing_words(summary)]


def _best_words(best: TrialSummary, summary: SweepSummary) -> list[str]:
    """Say how good the best trial is, how far the others are behind, and how it does on the test split."""
    metric, values = summary.compared_by, [value for _, value in summary.through]
    sentence = f"{best.name} ({_settings(best.parameters, summary)}) is best: {metric.key} {metric.written(best.final)}"
    if len(values) > 1:
        worst = min(values, key=lambda value: metric.sign * value)
        middle = statistics.median(values)
        sentence += f"; the worst has {metric.written(worst)}, the median is {metric.written(middle)}"
    sentences = [f"{sentence}."]
    tested = best.regimes[metric.regime].test
    if metric.split == "validation" and metric.name in tested:
        sentences.append(f"On the test split, which decided nothing, it has {metric.written(tested[metric.name])}.")
    elif metric.split == "test" and len(values) > 1:
        sentences.append("The test split chose the best trial, so its figure flatters: judge it on data of its own.")
    return sentences


def _sharing_words(summary: SweepSummary) -> list[str]:
    """Say what sharing saved, and what was done for nothing."""
    sentences = []
    total, stages, abandoned = summary.sharing.total, summary.sharing.stages, summary.sharing.abandoned
    if stages is not None and total.asked > total.run:
        whole, saved = total.seconds_asked, total.seconds_asked - total.seconds_run
        share = percent_text(saved / whole, 0) if whole else DASH
        sentences.append(
            f"The trials asked for {stages.asked} training stages and {stages.run} were run; in all "
            f"{total.run} of {total.asked} tasks. That saved {seconds_text(saved)} of {seconds_text(whole)} of "
            f"computing ({share})."
        )
    if abandoned.tasks:
        sentences.append(
            f"{abandoned.tasks} tasks ({seconds_text(abandoned.seconds)}) were done for trials that took over "
            "another's stages afterwards; they are not counted in this."
        )
    return sentences


def _settings(parameters: Mapping[str, Any], summary: SweepSummary) -> str:
    return ", ".join(f"{summary.short[key]} {value_text(value)}" for key, value in parameters.items())


def _judged(summary: SweepSummary) -> list[Benchmarks | None]:
    """List the scores on benchmarks of the untouched model and of all trials' regimes."""
    return [summary.judged, *(regime.judged for trial in summary.trials for regime in trial.regimes.values())]


def _asked(summary: SweepSummary) -> list[str]:
    return benchmarks.asked(_judged(summary))


def _cards(summary: SweepSummary) -> list[dict[str, str]]:
    metric, trials, best = summary.compared_by, summary.trials, summary.best_trial
    total, stages = summary.sharing.total, summary.sharing.stages or NO_SHARING
    ratio = total.seconds_asked / total.seconds_run if total.seconds_run else None
    return [
        {
            "title": f"best: {best.name}" if best else "best",
            "big": metric.written(best.metric) if best else DASH,
            "what": metric.key,
            "note": _settings(best.parameters, summary) if best else "no trial is through",
        },
        {
            "title": "trials",
            "big": f"{sum(trial.status == 'done' for trial in trials)} of {len(trials)}",
            "what": "ran to their end",
            "note": f"{sum(trial.status == 'stopped' for trial in trials)} stopped early, "
            f"{sum(trial.status == 'failed' for trial in trials)} failed",
        },
        {
            "title": "stages",
            "big": f"{stages.run} of {stages.asked}",
            "what": "training stages run, of those asked for",
            "note": f"all tasks: {total.run} of {total.asked}",
        },
        {
            "title": "time",
            "big": ratio_text(ratio),
            "what": "the same trials without sharing",
            "note": f"{seconds_text(total.seconds_run)} computed instead of {seconds_text(total.seconds_asked)}",
        },
    ]


#: Kind of draw -> what to write before its values; the other kinds have two bounds.
_DRAW_WORDS = {"grid": "each of", "choice": "one of"}


def _draw_words(draw: DrawRecord) -> str:
    texts, words = [value_text(value) for value in draw.values], _DRAW_WORDS.get(draw.kind)
    return f"{draw.kind} from {' to '.join(texts)}" if words is None else f"{words} {', '.join(texts)}"


def ranked(summary: SweepSummary) -> list[TrialSummary]:
    """Sort the trials: the best first, then those that have no final figure, as they come."""
    sign = summary.compared_by.sign

    def rank(trial: TrialSummary) -> tuple[int, float]:
        return (1, 0.0) if trial.final is None else (0, -sign * trial.final)

    return sorted(summary.trials, key=rank)


def _row(trial: TrialSummary, summary: SweepSummary) -> dict[str, Any]:
    """Return a trial as a row of the page."""
    metric, own = summary.compared_by, trial.regimes[summary.metric.regime]
    test = Metric(metric.regime, "test", metric.name if metric.split else _main_metric(own), metric.mode)
    standing = ""
    if trial.status == "stopped" and trial.rungs:
        standing = f"{metric.written(trial.rungs[-1].metric)} after stage {trial.rungs[-1].stages}"
    share = _share(trial, summary)
    return {
        "name": trial.name,
        "folder": trial.folder,
        "values": [value_text(trial.parameters[key]) for key in summary.parameters],
        "history": [_settings(settings, summary) for settings in trial.history],
        "status": trial.status,
        "status_words": TRIAL_WORDS.get(trial.status, trial.status),
        "best": trial.best,
        "pareto": trial.pareto,
        "metric": metric.written(trial.metric) if trial.status == "done" else DASH,
        "standing": standing,
        "bar": None if share is None else round(12 + 88 * share, 1),
        "test": test.written(own.test.get(test.name)),
        "memory": bytes_text(summary.peak(trial)),
        "seconds": seconds_text(trial.seconds or None),
        "parameters": count_text(own.trainable_parameters),
        "stages": f"{trial.stages.done} of {trial.stages.planned}",
        "shared": trial.stages.shared,
        "nodes": f"{trial.nodes.shared} of {trial.nodes.asked}",
        "benchmarks": benchmarks.cells(own.judged, _asked(summary)),
    }


def _share(trial: TrialSummary, summary: SweepSummary) -> float | None:
    """Return where a trial stands between the worst (0) and the best (1); None where that says nothing."""
    known = [value for _, value in summary.through]
    if trial.final is None or not max(known) > min(known):
        return None
    low, high = min(known), max(known)
    behind = trial.final - low if summary.metric.mode == "max" else high - trial.final
    return behind / (high - low)


def _main_metric(regime: TrialRegime) -> str:
    return leading(regime.test)


def _baselines(summary: SweepSummary) -> list[dict[str, Any]]:
    """Return regimes beside the one that is compared, where all trials have the same, and the untouched model."""
    from orchestrator.sweeps.figures import references

    metric = summary.compared_by
    rows = []
    for name, value, colour in references(summary):
        regime = next((trial.regimes[name] for trial in summary.trials if name in trial.regimes), None)
        test = (regime.test if regime else summary.original.get("test", {})).get(metric.name)
        rows.append(
            {
                "name": name,
                "colour": colour,
                "metric": metric.written(value),
                "test": metric.written(test),
                "memory": bytes_text(summary.peak(regime)) if regime else DASH,
                "seconds": seconds_text(regime.seconds or None) if regime else DASH,
                "benchmarks": benchmarks.cells(regime.judged if regime else summary.judged, _asked(summary)),
            }
        )
    return rows


def seed_rows(summary: SweepSummary) -> list[tuple[str, ...]]:
    """Return what every regime of the trials that are through has on the test split over their seeds, as texts; []
    where the sweep has one seed."""
    if "seed" not in summary.parameters:
        return []
    trials = [trial for trial, _ in summary.through]
    found = [(trial, name, regime) for trial in trials for name, regime in trial.regimes.items()]
    metric = summary.metric.name if summary.metric.split else next((_main_metric(each) for _, _, each in found), "loss")
    scores = [
        seeds.Score(_others(trial, summary), name, int(trial.parameters["seed"]), float(value))
        for trial, name, regime in found
        if (value := regime.test.get(metric)) is not None
    ]
    baseline = next((name for _, name, regime in found if of_kind(regime.kind).baseline), None)
    return seeds.cells(seeds.over_seeds(scores, baseline), share=METRICS[metric].share)


def _others(trial: TrialSummary, summary: SweepSummary) -> str:
    return _settings({key: value for key, value in trial.parameters.items() if key != "seed"}, summary)


def trial_cells(summary: SweepSummary) -> list[tuple[str, ...]]:
    """Return the trials as rows of texts, in the order of `ranked`; the first row has the heads."""
    metric = summary.compared_by
    memory = "peak device memory" if summary.on_device else "peak host growth"
    keys = [summary.short[key] for key in summary.parameters]
    heads = map(benchmarks.title, _asked(summary))
    rows = [("trial", *keys, "status", metric.key, "test", *heads, memory, "time alone", "stages", "shared")]
    for trial in ranked(summary):
        row = _row(trial, summary)
        rows.append(
            (
                row["name"],
                *row["values"],
                row["status"],
                f"({metric.written(trial.rungs[-1].metric)})" if trial.status == "stopped" else row["metric"],
                row["test"],
                *row["benchmarks"],
                row["memory"],
                row["seconds"],
                row["stages"],
                str(row["shared"]),
            )
        )
    return rows


def print_trials(summary: SweepSummary, stream: TextIO | None = None) -> None:
    """Print the trials, the best first, as a table or aligned text; then what was shared."""
    rows = [list(row) for row in trial_cells(summary)]
    for row, trial in zip(rows[1:], ranked(summary), strict=True):
        row[0] += " best" if trial.best else ""
    if _asked(summary):
        # What a base depth is compared with (the source's Table 2).
        before = len(summary.parameters) + 1
        rows += [
            [row["name"], *[""] * before, row["metric"], row["test"], *row["benchmarks"], *[""] * 4]
            for row in _baselines(summary)
        ]
    total, stages = summary.sharing.total, summary.sharing.stages or NO_SHARING
    console = Console(file=stream or sys.stdout, highlight=False)
    print_rows(console, rows)
    for sentence in benchmarks.notes(_judged(summary)):
        console.file.write(f"{sentence}\n")
    over = seed_rows(summary)
    if over:
        console.print()
        print_rows(console, [seeds.HEADS, *over])
        console.print(seeds.NOTE)
    text = (
        f"{stages.run} stages run of {stages.asked} asked, {total.run} tasks of {total.asked}; "
        f"{seconds_text(total.seconds_run)} computed, {seconds_text(total.seconds_asked)} without sharing"
    )
    if console.is_terminal:
        console.print(Text(text))
        return
    console.file.write(f"{text}\n")
    console.file.flush()
