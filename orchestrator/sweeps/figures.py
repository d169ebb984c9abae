"""The figures of a sweep's report, as inline SVG, from `sweep.json` alone: same sweep, same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from orchestrator.reports.svg import GRID, INK, MUTED, SHADES, STYLE, spacious, svg
from orchestrator.sweeps.metric import Metric
from orchestrator.sweeps.space import value_text
from orchestrator.sweeps.summary import memory_key
from orchestrator.units import bytes_text, seconds_text

Json = Mapping[str, Any]

FRONT, REST, STOPPED = SHADES["segprop"][0], "#9aa5b1", "#c2571a"
SERIES = ("#0e8a6d", "#c2571a", "#3b6fb6", "#8a5bb0", "#b08a2e", "#5f9e2f", "#2a9fa6", "#7c3610")
KINDS = {"data": "data", "model": "model", "train": "stages", "materialize": "snapshot sets", "evaluate": "evaluations"}


def metric_of(summary: Json) -> Metric:
    """The metric as `sweep.json` names it."""
    found = summary["metric"]
    return Metric(found["regime"], found["split"], found["name"], found["mode"])


def parameters(summary: Json) -> str | None:
    """The metric against every swept parameter; base depth and head size first, where they are swept."""
    metric = metric_of(summary)
    shown = [key for key in _ordered(summary) if len(_distinct(summary, key)) > 1]
    if not shown or not any(_value(trial) is not None for trial in summary["trials"]):
        return None
    with matplotlib.rc_context(STYLE):
        rows = -(-len(shown) // 2)
        figure = Figure(figsize=(11.4, 0.3 + 3.5 * rows), layout=spacious())
        grid = figure.subplots(rows, 2 if len(shown) > 1 else 1, squeeze=False, sharey=True)
        panels = [axes for row in grid for axes in row]
        for axes, key in zip(panels, shown, strict=False):
            _parameter(axes, summary, metric, key)
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        return svg(figure, "parameters", f"{metric.key} against every parameter that was swept")


def _ordered(summary: Json) -> list[str]:
    def rank(key: str) -> int:
        return 0 if key.endswith("split.base") else 1 if key.endswith(("split.head", "head_convs")) else 2

    return sorted(summary["parameters"], key=rank)


def _value(trial: Json) -> float | None:
    """The metric of a trial that is through, or where it stood when it was stopped."""
    if trial["status"] == "done":
        return None if trial["metric"] is None else float(trial["metric"])
    rungs = trial["rungs"]
    return None if trial["status"] != "stopped" or not rungs else rungs[-1]["metric"]


def _values(trials: Sequence[Json]) -> list[float]:
    """Of trials that have one."""
    return [value for trial in trials if (value := _value(trial)) is not None]


def _distinct(summary: Json, key: str) -> list[str]:
    return list(dict.fromkeys(value_text(trial["parameters"][key]) for trial in summary["trials"]))


def _parameter(axes: Axes, summary: Json, metric: Metric, key: str) -> None:
    trials = [trial for trial in summary["trials"] if _value(trial) is not None]
    values = [trial["parameters"][key] for trial in trials]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    known = {value_text(value): value for value in values}
    texts = sorted(known, key=lambda text: known[text]) if numeric else list(known)
    places = {text: float(index) for index, text in enumerate(texts)}

    def place(trial: Json) -> float:
        value = trial["parameters"][key]
        return float(value) if numeric and not _spread(summary, key) else places[value_text(value)]

    # Lines join trials that differ in this parameter alone.
    others = [name for name in summary["parameters"] if name != key]
    series: dict[str, list[Json]] = {}
    for trial in trials:
        short = summary["short"]
        label = " ".join(f"{short[name]}={value_text(trial['parameters'][name])}" for name in others)
        series.setdefault(label, []).append(trial)
    lines = {label: found for label, found in series.items() if len(found) > 1}
    few = 1 < len(lines) <= len(SERIES)
    for index, (label, found) in enumerate(series.items()):
        colour = SERIES[index % len(SERIES)] if few else FRONT
        through = sorted((trial for trial in found if trial["status"] == "done"), key=place)
        axes.plot(
            [place(trial) for trial in through],
            _values(through),
            "o-",
            color=colour,
            lw=1.6 if len(lines) <= len(SERIES) else 0.7,
            ms=5,
            alpha=0.95 if len(lines) <= len(SERIES) else 0.6,
            label=label if few and label in lines else None,
        )
        stopped = [trial for trial in found if trial["status"] == "stopped"]
        axes.plot([place(trial) for trial in stopped], _values(stopped), "x", color=STOPPED, ms=7)
    best = next((trial for trial in trials if trial["best"]), None)
    if best is not None:
        axes.plot([place(best)], _values([best]), "o", mfc="none", mec=INK, mew=1.6, ms=11, zorder=5)
    _references(axes, summary, metric)
    axes.set_title(key, loc="left", fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(summary["short"][key])
    axes.set_ylabel(metric.key)
    axes.yaxis.set_major_formatter(_writer(metric))
    if not numeric or _spread(summary, key):
        axes.set_xticks(list(places.values()), list(places))
    elif "loguniform" in summary["parameters"][key]:
        axes.set_xscale("log")
    elif all(isinstance(value, int) for value in values):
        axes.set_xticks(sorted(set(values)), [str(value) for value in sorted(set(values))])
    if few:
        axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, labelcolor=MUTED)


def _spread(summary: Json, key: str) -> bool:
    """Grid values are set side by side where true distances would crowd some of them: 1e-4, 1e-3, 1e-2."""
    values = summary["parameters"][key].get("grid")
    if not values or not all(isinstance(value, int | float) for value in values):
        return False
    low, high = min(values), max(values)
    return bool(low > 0 and high / low >= 20)


def _references(axes: Axes, summary: Json, metric: Metric) -> None:
    """Baselines that are the same for all trials, and the untouched model, as lines across."""
    if metric.split is None:
        return
    for name, value, colour in references(summary, metric):
        axes.axhline(value, color=colour, lw=1.2, ls="--", zorder=1)
        axes.annotate(
            name,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color=colour,
        )


def references(summary: Json, metric: Metric) -> list[tuple[str, float, str]]:
    """(what, figure, colour)."""
    found: list[tuple[str, float, str]] = []
    if metric.split is None:
        return found
    original = (summary["original"].get(metric.split) or {}).get(metric.name)
    if original is not None:
        found.append(("original", float(original), MUTED))
    names = dict.fromkeys(name for trial in summary["trials"] for name in trial["regimes"])
    for name in names:
        if name == metric.regime:
            continue
        regimes = [trial["regimes"].get(name) for trial in summary["trials"]]
        values = {regime[metric.split].get(metric.name) for regime in regimes if regime is not None} - {None}
        if len(values) == 1:
            kind = next(regime["kind"] for regime in regimes if regime is not None)
            found.append((name, float(values.pop()), SHADES.get(kind, SHADES["segprop"])[0]))
    return found


def _writer(metric: Metric) -> FuncFormatter:
    if metric.name.endswith("accuracy"):
        return FuncFormatter(lambda value, _: f"{100 * value:.4g} %")
    return FuncFormatter(lambda value, _: metric.written(value) if metric.split is None else f"{value:.4g}")


def front(summary: Json) -> str | None:
    """Quality against memory and against time; filled: no trial beats it in all three."""
    metric, trials = metric_of(summary), summary["trials"]
    memory = memory_key(trials)
    through = [trial for trial in trials if trial["status"] == "done" and trial["metric"] is not None]
    if not through:
        return None
    label = "peak device memory" if memory == "peak_device_bytes" else "peak host memory above idle"
    sides: list[tuple[str, Callable[[Json], float], str, Callable[[float], str]]] = [
        (memory, lambda item: float(item.get(memory) or 0.0), label, bytes_text),
        ("seconds", lambda item: float(item["seconds"] or 0.0), "compute time of the trial on its own", seconds_text),
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 3.9), layout=spacious())
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (_, x, words, written) in zip(panels, sides, strict=True):
            for trial in sorted(through, key=lambda item: item["pareto"]):
                colour = FRONT if trial["pareto"] else REST
                axes.plot(
                    [x(trial)],
                    [trial["metric"]],
                    "o",
                    color=colour,
                    mfc=colour if trial["pareto"] else "white",
                    mew=1.5,
                    ms=8,
                    zorder=4 if trial["pareto"] else 3,
                )
            _labels(axes, [(x(trial), float(trial["metric"]), trial) for trial in through])
            for name, value, item in _baselines(summary, metric):
                colour = SHADES.get(item["kind"], SHADES["segprop"])[0]
                axes.plot([x(item)], [value], "D", color=colour, ms=7, zorder=5)
                axes.annotate(
                    name, (x(item), value), xytext=(7, -11), textcoords="offset points", fontsize=9, color=colour
                )
            axes.set_xlabel(words)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, written=written: written(value)))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
            axes.margins(x=0.12, y=0.14)
            axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
        panels[0].set_ylabel(metric.key)
        panels[0].yaxis.set_major_formatter(_writer(metric))
        return svg(figure, "front", f"{metric.key} against memory and time of every trial")


def _labels(axes: Axes, points: Sequence[tuple[float, float, Json]]) -> None:
    """Names of the trials on the front; points at one place share a label."""
    places: dict[tuple[str, str], list[tuple[float, float, Json]]] = {}
    for x, y, trial in points:
        if trial["pareto"] or trial["best"]:
            places.setdefault((f"{x:.3g}", f"{y:.4g}"), []).append((x, y, trial))
    for found in places.values():
        x, y, _ = found[0]
        names = ", ".join(trial["name"] for _, _, trial in found)
        best = any(trial["best"] for _, _, trial in found)
        axes.annotate(
            f"{names}, best" if best else names,
            (x, y),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=INK,
            fontweight="bold" if best else "normal",
        )


def _baselines(summary: Json, metric: Metric) -> list[tuple[str, float, Json]]:
    """Other regimes that are the same in every trial, with their own memory and time."""
    same = {name: value for name, value, _ in references(summary, metric) if name != "original"}
    found = []
    for name, value in same.items():
        regime = next(trial["regimes"][name] for trial in summary["trials"] if name in trial["regimes"])
        if regime["status"] in ("done", "reused"):
            found.append((name, value, regime))
    return found


def shared(summary: Json) -> str | None:
    """What the trials asked for and what was run, by kind: tasks on the left, their compute time on the right."""
    kinds = {kind: found for kind, found in summary["sharing"]["kinds"].items() if found["asked"]}
    if not kinds:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 0.9 + 0.46 * len(kinds)), layout=spacious())
        panels = figure.subplots(1, 2, sharey=True)
        rows = list(range(len(kinds)))[::-1]
        sides: list[tuple[str, str, str, Callable[[float], str]]] = [
            ("asked", "run", "tasks", lambda value: f"{value:.0f}"),
            ("seconds_asked", "seconds_run", "compute time", seconds_text),
        ]
        for axes, (asked, run, words, written) in zip(panels, sides, strict=True):
            axes.barh(rows, [found[asked] for found in kinds.values()], color=GRID, height=0.62)
            axes.barh(rows, [found[run] for found in kinds.values()], color=FRONT, height=0.62, alpha=0.9)
            most = max(found[asked] for found in kinds.values()) or 1.0
            for row, found in zip(rows, kinds.values(), strict=True):
                axes.text(
                    found[asked] + 0.015 * most,
                    row,
                    f"{written(found[run])} of {written(found[asked])}",
                    va="center",
                    fontsize=9,
                    color=INK,
                )
            axes.set_xlim(0, 1.28 * most)
            axes.set_title(words, loc="left", color=INK, fontweight="bold", fontsize=10.5)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, written=written: written(value)))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=words == "tasks"))
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(rows, [KINDS.get(kind, kind) for kind in kinds])
        return svg(figure, "shared", "Tasks and compute time that trials asked for and that were run")


def rungs(summary: Json) -> str | None:
    """How every trial stood after each stage, where that decided whether it went on."""
    metric = metric_of(summary)
    shown = [trial for trial in summary["trials"] if trial["rungs"]]
    if summary["scheduler"]["name"] == "all" or not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 3.6), layout=spacious())
        axes = figure.subplots(1, 1)
        for trial in shown:
            xs = [rung["stages"] for rung in trial["rungs"]]
            ys = [rung["metric"] for rung in trial["rungs"]]
            colour = FRONT if trial["status"] == "done" else STOPPED if trial["status"] == "stopped" else REST
            axes.plot(xs, ys, "o-", color=colour, lw=2.4 if trial["best"] else 1.3, ms=4.5, alpha=0.9)
            if trial["status"] == "stopped":
                axes.plot(xs[-1:], ys[-1:], "x", color=STOPPED, ms=9, mew=2)
            axes.annotate(
                trial["name"], (xs[-1], ys[-1]), xytext=(7, -3), textcoords="offset points", fontsize=9, color=colour
            )
        axes.set_xlabel(f"stages of {metric.regime}")
        axes.set_ylabel(metric.key)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(_writer(metric))
        return svg(figure, "rungs", f"{metric.key} of every trial after each stage")
