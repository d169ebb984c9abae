"""Draw the figures of a sweep's report as inline SVG, from its summary alone: same sweep, same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from orchestrator.reports.figures.svg import GRID, INK, MUTED, STYLE, spacious, svg
from orchestrator.reports.words import SHORT_NODE_WORDS, of_kind
from orchestrator.sweeps.metric import Metric
from orchestrator.sweeps.plan import Shared
from orchestrator.sweeps.records import SweepSummary, TrialRegime, TrialSummary
from orchestrator.sweeps.space import value_text
from orchestrator.units import bytes_text, seconds_text
from workers.domains.metrics import METRICS

FRONT, REST, STOPPED = of_kind("segprop").shades[0], "#9aa5b1", "#c2571a"
SERIES = ("#0e8a6d", "#c2571a", "#3b6fb6", "#8a5bb0", "#b08a2e", "#5f9e2f", "#2a9fa6", "#7c3610")


def parameters(summary: SweepSummary) -> str | None:
    """Draw the metric against every swept parameter; base depth and head size first, where they are swept."""
    shown = [key for key in _ordered(summary) if len(_distinct(summary, key)) > 1]
    if not shown or all(trial.standing is None for trial in summary.trials):
        return None
    with matplotlib.rc_context(STYLE):
        rows = -(-len(shown) // 2)
        figure = Figure(figsize=(11.4, 0.3 + 3.5 * rows), layout=spacious())
        grid = figure.subplots(rows, 2 if len(shown) > 1 else 1, squeeze=False, sharey=True)
        panels = [axes for row in grid for axes in row]
        for axes, key in zip(panels, shown, strict=False):
            _Parameter(axes, summary, key).draw()
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        return svg(figure, "parameters", f"{summary.metric.key} against every parameter that was swept")


def _ordered(summary: SweepSummary) -> list[str]:
    def rank(key: str) -> int:
        return 0 if key.endswith("split.base") else 1 if key.endswith(("split.head", "head_convs")) else 2

    return sorted(summary.parameters, key=rank)


def _distinct(summary: SweepSummary, key: str) -> list[str]:
    return list(dict.fromkeys(value_text(trial.parameters[key]) for trial in summary.trials))


def _standings(trials: Sequence[TrialSummary]) -> list[float]:
    """Return how the trials stand, of those that say it."""
    return [value for trial in trials if (value := trial.standing) is not None]


@dataclass(frozen=True)
class _Parameter:
    """The metric against one swept parameter."""

    axes: Axes
    summary: SweepSummary
    key: str

    @cached_property
    def trials(self) -> list[TrialSummary]:
        return [trial for trial in self.summary.trials if trial.standing is not None]

    @cached_property
    def values(self) -> list[Any]:
        return [trial.parameters[self.key] for trial in self.trials]

    @cached_property
    def numeric(self) -> bool:
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)

    @cached_property
    def side_by_side(self) -> bool:
        """Whether values stand at equal distances, whatever they are."""
        return not self.numeric or _spread(self.summary, self.key)

    @cached_property
    def places(self) -> dict[str, float]:
        """Value -> where it stands, where that is not its own number."""
        known = {value_text(value): value for value in self.values}
        texts = sorted(known, key=lambda text: known[text]) if self.numeric else list(known)
        return {text: float(index) for index, text in enumerate(texts)}

    def place(self, trial: TrialSummary) -> float:
        value = trial.parameters[self.key]
        return self.places[value_text(value)] if self.side_by_side else float(value)

    def series(self) -> dict[str, list[TrialSummary]]:
        """Group trials that differ in this parameter alone; the key says what they have in common."""
        others = [name for name in self.summary.parameters if name != self.key]
        found: dict[str, list[TrialSummary]] = {}
        for trial in self.trials:
            label = " ".join(f"{self.summary.short[name]}={value_text(trial.parameters[name])}" for name in others)
            found.setdefault(label, []).append(trial)
        return found

    def draw(self) -> None:
        axes, summary, series = self.axes, self.summary, self.series()
        lines = sum(len(found) > 1 for found in series.values())
        few = 1 < lines <= len(SERIES)
        for index, (label, found) in enumerate(series.items()):
            look: dict[str, Any] = {
                "color": SERIES[index % len(SERIES)] if few else FRONT,
                "lw": 1.6 if lines <= len(SERIES) else 0.7,
                "alpha": 0.95 if lines <= len(SERIES) else 0.6,
                "label": label if few and len(found) > 1 else None,
            }
            through = sorted((trial for trial in found if trial.status == "done"), key=self.place)
            axes.plot([self.place(trial) for trial in through], _standings(through), "o-", ms=5, **look)
            stopped = [trial for trial in found if trial.status == "stopped"]
            axes.plot([self.place(trial) for trial in stopped], _standings(stopped), "x", color=STOPPED, ms=7)
        best = next((trial for trial in self.trials if trial.best), None)
        if best is not None:
            place = [self.place(best)]
            axes.plot(place, _standings([best]), "o", mfc="none", mec=INK, mew=1.6, ms=11, zorder=5)
        _references(axes, summary)
        axes.set_title(self.key, loc="left", fontweight="bold", color=INK, pad=10)
        axes.set_xlabel(summary.short[self.key])
        axes.set_ylabel(summary.metric.key)
        axes.yaxis.set_major_formatter(_writer(summary.compared_by))
        self._ticks()
        if few:
            axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, labelcolor=MUTED)

    def _ticks(self) -> None:
        if self.side_by_side:
            self.axes.set_xticks(list(self.places.values()), list(self.places))
        elif self.summary.parameters[self.key].loguniform is not None:
            self.axes.set_xscale("log")
        elif all(isinstance(value, int) for value in self.values):
            self.axes.set_xticks(sorted(set(self.values)), [str(value) for value in sorted(set(self.values))])


def _spread(summary: SweepSummary, key: str) -> bool:
    """Tell whether true distances would crowd some grid values (1e-4, 1e-3, 1e-2), so that they stand side by side."""
    values = summary.parameters[key].grid
    if not values or not all(isinstance(value, int | float) for value in values):
        return False
    low, high = min(values), max(values)
    return bool(low > 0 and high / low >= 20)


def _references(axes: Axes, summary: SweepSummary) -> None:
    """Draw baselines that are the same for all trials, and the untouched model, as lines across."""
    for name, value, colour in references(summary):
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


def references(summary: SweepSummary) -> list[tuple[str, float, str]]:
    """Return (what, figure, colour) of what trials are compared with: the untouched model, and every other regime that
    comes to the same in all trials."""
    metric = summary.compared_by
    found: list[tuple[str, float, str]] = []
    if metric.split is None:
        return found
    original = summary.original.get(metric.split, {}).get(metric.name)
    if original is not None:
        found.append(("original", float(original), MUTED))
    for name in dict.fromkeys(name for trial in summary.trials for name in trial.regimes):
        regimes = [trial.regimes[name] for trial in summary.trials if name in trial.regimes]
        values = {regime.metrics(metric.split).get(metric.name) for regime in regimes}
        known = [value for value in values if value is not None]
        if name != metric.regime and len(known) == 1:
            found.append((name, float(known[0]), _colour(regimes[0])))
    return found


def _colour(regime: TrialRegime) -> str:
    return of_kind(regime.kind).shades[0]


def _writer(metric: Metric) -> FuncFormatter:
    if metric.split is not None and METRICS[metric.name].share:
        return FuncFormatter(lambda value, _: f"{100 * value:.4g} %")
    return FuncFormatter(lambda value, _: metric.written(value) if metric.split is None else f"{value:.4g}")


@dataclass(frozen=True)
class _Side:
    """What quality is drawn against: a figure of trials and regimes, and how it is written."""

    words: str
    value: Callable[[TrialSummary | TrialRegime], float]
    written: Callable[[float], str]


def front(summary: SweepSummary) -> str | None:
    """Draw quality against memory and against time; filled: no trial beats it in all three."""
    if not summary.through:
        return None
    label = "peak device memory" if summary.on_device else "peak host memory above idle"
    sides = [
        _Side(label, lambda item: float(summary.peak(item) or 0.0), bytes_text),
        _Side("compute time of the trial on its own", lambda item: float(item.seconds or 0.0), seconds_text),
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 3.9), layout=spacious())
        panels = figure.subplots(1, 2, sharey=True)
        for axes, side in zip(panels, sides, strict=True):
            _front_side(axes, summary, side)
        panels[0].set_ylabel(summary.metric.key)
        panels[0].yaxis.set_major_formatter(_writer(summary.compared_by))
        return svg(figure, "front", f"{summary.metric.key} against memory and time of every trial")


def _front_side(axes: Axes, summary: SweepSummary, side: _Side) -> None:
    for trial, value in sorted(summary.through, key=lambda item: item[0].pareto):
        colour = FRONT if trial.pareto else REST
        axes.plot(
            [side.value(trial)],
            [value],
            "o",
            color=colour,
            mfc=colour if trial.pareto else "white",
            mew=1.5,
            ms=8,
            zorder=4 if trial.pareto else 3,
        )
    _labels(axes, [(side.value(trial), value, trial) for trial, value in summary.through])
    for name, value, regime in _baselines(summary):
        x, colour = side.value(regime), _colour(regime)
        axes.plot([x], [value], "D", color=colour, ms=7, zorder=5)
        axes.annotate(name, (x, value), xytext=(7, -11), textcoords="offset points", fontsize=9, color=colour)
    axes.set_xlabel(side.words)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: side.written(value)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.margins(x=0.12, y=0.14)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))


def _labels(axes: Axes, points: Sequence[tuple[float, float, TrialSummary]]) -> None:
    """Name the trials on the front; points at one place share a label."""
    places: dict[tuple[str, str], list[tuple[float, float, TrialSummary]]] = {}
    for x, y, trial in points:
        if trial.pareto or trial.best:
            places.setdefault((f"{x:.3g}", f"{y:.4g}"), []).append((x, y, trial))
    for found in places.values():
        x, y, _ = found[0]
        names = ", ".join(trial.name for _, _, trial in found)
        best = any(trial.best for _, _, trial in found)
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


def _baselines(summary: SweepSummary) -> list[tuple[str, float, TrialRegime]]:
    """Return other regimes that come to the same in every trial, with their own memory and time."""
    found = []
    for name, value, _ in references(summary):
        regime = next((trial.regimes[name] for trial in summary.trials if name in trial.regimes), None)
        if regime is not None and name != "original" and regime.done:
            found.append((name, value, regime))
    return found


@dataclass(frozen=True)
class _Bars:
    """One panel of what was shared: a figure of what was asked for, and of what was run."""

    words: str
    asked: Callable[[Shared], float]
    run: Callable[[Shared], float]
    written: Callable[[float], str]


_SHARED_BARS = (
    _Bars("tasks", lambda found: found.asked, lambda found: found.run, lambda value: f"{value:.0f}"),
    _Bars("compute time", lambda found: found.seconds_asked, lambda found: found.seconds_run, seconds_text),
)


def shared(summary: SweepSummary) -> str | None:
    """Draw what the trials asked for and what was run, by kind: tasks on the left, their compute time on the right."""
    kinds = {kind: found for kind, found in summary.sharing.kinds.items() if found.asked}
    if not kinds:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 0.9 + 0.46 * len(kinds)), layout=spacious())
        panels = figure.subplots(1, 2, sharey=True)
        rows = list(range(len(kinds)))[::-1]
        for axes, bars in zip(panels, _SHARED_BARS, strict=True):
            _shared_bars(axes, bars, dict(zip(rows, kinds.values(), strict=True)))
        panels[0].set_yticks(rows, [SHORT_NODE_WORDS.get(kind, kind) for kind in kinds])
        return svg(figure, "shared", "Tasks and compute time that trials asked for and that were run")


def _shared_bars(axes: Axes, bars: _Bars, rows: Mapping[int, Shared]) -> None:
    asked = [bars.asked(found) for found in rows.values()]
    run = [bars.run(found) for found in rows.values()]
    axes.barh(list(rows), asked, color=GRID, height=0.62)
    axes.barh(list(rows), run, color=FRONT, height=0.62, alpha=0.9)
    most = max(asked) or 1.0
    for row, wanted, done in zip(rows, asked, run, strict=True):
        text = f"{bars.written(done)} of {bars.written(wanted)}"
        axes.text(wanted + 0.015 * most, row, text, va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 1.28 * most)
    axes.set_title(bars.words, loc="left", color=INK, fontweight="bold", fontsize=10.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bars.written(value)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=bars.words == "tasks"))
    axes.grid(axis="y", visible=False)


def rungs(summary: SweepSummary) -> str | None:
    """Draw how every trial stood after each stage, where that decided whether it went on."""
    shown = [trial for trial in summary.trials if trial.rungs]
    if summary.scheduler.name == "all" or not shown:
        return None
    colours = {"done": FRONT, "stopped": STOPPED}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 3.6), layout=spacious())
        axes = figure.subplots(1, 1)
        for trial in shown:
            xs, ys = [rung.stages for rung in trial.rungs], [_number(rung.metric) for rung in trial.rungs]
            colour, last = colours.get(trial.status, REST), (xs[-1], ys[-1])
            axes.plot(xs, ys, "o-", color=colour, lw=2.4 if trial.best else 1.3, ms=4.5, alpha=0.9)
            if trial.status == "stopped":
                axes.plot(xs[-1:], ys[-1:], "x", color=STOPPED, ms=9, mew=2)
            axes.annotate(trial.name, last, xytext=(7, -3), textcoords="offset points", fontsize=9, color=colour)
        axes.set_xlabel(f"stages of {summary.metric.regime}")
        axes.set_ylabel(summary.metric.key)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(_writer(summary.compared_by))
        return svg(figure, "rungs", f"{summary.metric.key} of every trial after each stage")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
