"""Draw the report's figures as inline SVG: same summary, same bytes.

Only matplotlib's object interface is used (no pyplot, no global state), text stays text, and every id is
prefixed with the figure's name, so that several figures can live in one HTML page.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from orchestrator.reports.figures.layer_curve import LayerCurve
from orchestrator.reports.figures.svg import INK, MUTED, PANEL, STYLE, colours, slug, spacious, svg
from orchestrator.reports.records import RegimeSummary, WorkFigures, WorkPlace, WorkSummary
from orchestrator.units import bytes_text, seconds_text


def layers(
    curve: LayerCurve | None,
    regimes: Mapping[str, RegimeSummary],
    name: str = "layers",
    title: str = "Score against layer index",
) -> str | None:
    """Draw score against layer index, a panel a metric, two beside each other; truncated models dashed, full solid."""
    shown = [] if curve is None else [metric for metric, lines in curve.lines.items() if lines]
    if curve is None or not shown:
        return None
    palette = colours(regimes)
    first, last = curve.ticks[0][0], curve.ticks[-1][0]
    with matplotlib.rc_context(STYLE):
        columns = min(2, len(shown))
        rows = -(-len(shown) // columns)
        figure = Figure(figsize=(5.7 * columns, 3.7 * rows), layout=spacious())
        panels = [axes for row in figure.subplots(rows, columns, squeeze=False) for axes in row]
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        for axes, metric in zip(panels, shown, strict=False):
            _layer_lines(axes, curve, metric, palette)
            _layer_scale(axes, curve, metric)
            positions, labels = zip(*_thinned(curve.ticks), strict=True)
            axes.set_xticks(positions, labels)
            margin = 0.04 * max(1, last - first)
            axes.set_xlim(first - margin, last + margin)
            axes.set_xlabel("layer trained last")
            axes.grid(axis="x", visible=False)
        return svg(figure, name, title)


def _layer_lines(axes: Axes, curve: LayerCurve, metric: str, palette: Mapping[str, str]) -> None:
    """Draw what stands across, then a line for each regime's truncated and full model."""
    for index, (name, value) in enumerate(curve.across[metric]):
        colour, style = (INK, ":") if name is None else (palette[name], "-.")
        axes.axhline(value, color=colour, lw=1.3, ls=style, gid=f"across-{index}-{slug(metric)}")
    for line in curve.lines[metric]:
        full = line.model == "full"
        axes.plot(
            *zip(*line.points, strict=True),
            color=palette[line.regime],
            lw=1.9,
            ls="solid" if full else (0, (3, 1.6)),
            marker="o" if full else "s",
            ms=4,
            mfc=palette[line.regime] if full else "white",
            gid=f"{slug(line.regime)}-{line.model}-{slug(metric)}",
        )
        if line.errors:
            places, values = zip(*line.points, strict=True)
            low, high = ([v + sign * e for v, e in zip(values, line.errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(places, low, high, color=palette[line.regime], alpha=0.13, lw=0)


def _layer_scale(axes: Axes, curve: LayerCurve, metric: str) -> None:
    values = [value for line in curve.lines[metric] for _, value in line.points]
    values += [value for _, value in curve.across[metric]]
    axes.set_title(metric, loc="left", fontsize=10.5)
    if metric in curve.shares:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    elif min(values) > 0 and max(values) > 4 * min(values):
        # A truncated pretrained model is far off at first; what is compared lies at the other end.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=0)


def _thinned(ticks: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """At most a dozen, the first and the last among them; none so near the last that they overlap."""
    stride = max(1, -(-len(ticks) // 12))
    kept = [tick for tick in ticks[:-1:stride] if ticks[-1][0] - tick[0] >= 0.1 * (ticks[-1][0] - ticks[0][0])]
    return [*kept, ticks[-1]]


@dataclass(frozen=True)
class _Bar:
    """One task that ran, with its row on the timeline."""

    item: WorkSummary
    slot: str
    started: float
    finished: float


def timeline(work: Sequence[WorkSummary], regimes: Mapping[str, RegimeSummary]) -> str | None:
    """Draw who did what when: one row per worker process."""
    bars = [
        _Bar(item, _slot(place), place.started, place.finished)
        for item in work
        if (place := item.where) and place.started is not None and place.finished is not None
    ]
    if not bars:
        return None
    palette = colours(regimes)
    slots = sorted({bar.slot for bar in bars})
    busy = _Busy([(bar.started, bar.finished) for bar in bars])
    total = max(busy.total, 1e-6)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 0.95 + 0.52 * len(slots)), layout="constrained")
        axes = figure.subplots()
        for bar in bars:
            start = busy.at(bar.started)
            width = max(busy.at(bar.finished) - start, total / 700)
            row, look = slots.index(bar.slot), _look(bar.item, palette)
            axes.barh(row, width, left=start, height=0.66, gid=f"task-{slug(bar.item.node)}", **look.bar)
            label = bar.item.label.rsplit("/", 1)[-1]
            if look.labelled and width / total * 118 > len(label) + 2:
                axes.text(start + width / 2, row, label, ha="center", va="center", color="white", fontsize=8.6)
        for position, length in busy.cuts:
            axes.axvline(position, color=MUTED, ls=":", lw=1.2)
            text = f"pause {seconds_text(length)}"
            axes.text(position, -0.52, text, ha="center", va="bottom", fontsize=8, color=MUTED)
        axes.set_yticks(range(len(slots)), slots)
        axes.set_ylim(len(slots) - 0.45, -0.55)
        axes.set_xlim(0, total * 1.005)
        axes.set_xticks(_time_ticks(total))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds_text(value)))
        axes.set_xlabel("time since the first task" + (", pauses cut out" if busy.cuts else ""))
        axes.grid(axis="y", visible=False)
        return svg(figure, "timeline", "Timeline of the tasks on every worker")


@dataclass(frozen=True)
class _Look:
    """How a bar is drawn; `labelled`: with its name, where it is wide enough."""

    bar: Mapping[str, Any]
    labelled: bool = False


def _look(item: WorkSummary, palette: Mapping[str, str]) -> _Look:
    colour = _colour(item, palette)
    looks = {
        "train": _Look({"color": colour, "ec": "white", "lw": 0.8}, labelled=True),
        "materialize": _Look({"fc": colour, "ec": "white", "hatch": "////", "lw": 0.8}),
    }
    return looks.get(item.kind, _Look({"color": colour, "alpha": 0.35, "lw": 0}))


def _colour(item: WorkSummary, palette: Mapping[str, str]) -> str:
    """Return the colour of the regime that asked for a task; grey where several did."""
    return palette[item.regimes[0]] if len(item.regimes) == 1 else "#8a96a3"


def _time_ticks(total: float) -> list[float]:
    """At most ten marks at times people use."""
    minutes = 60.0
    steps = [
        0.1,
        0.2,
        0.5,
        1,
        2,
        5,
        10,
        15,
        30,
        *(minutes * m for m in (1, 2, 5, 10, 15, 30, 60, 120, 240, 480)),
    ]
    step = next((step for step in steps if total / step <= 10), 1440 * minutes * max(1, total // 864000))
    return [step * index for index in range(int(total / step) + 1)]


def _slot(place: WorkPlace) -> str:
    suffix = f" · {place.device}" if place.device and place.device.startswith("cuda") else ""
    return f"{place.host or '?'}:{'?' if place.pid is None else place.pid}{suffix}"


class _Busy:
    """Map unix seconds to time since the first task, with long pauses (a killed and resumed run) cut out."""

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        merged: list[list[float]] = []
        for start, end in sorted(spans):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        running = sum(end - start for start, end in merged)
        limit, left = max(30.0, 0.15 * running), 0.02 * running
        self._origin = merged[0][0]
        self._pieces: list[tuple[float, float]] = [(merged[0][0], 0.0)]  # (from when on, seconds to take off)
        self.cuts: list[tuple[float, float]] = []
        removed = 0.0
        for before, after in itertools.pairwise(merged):
            pause = after[0] - before[1]
            if pause > limit:
                self.cuts.append((before[1] - self._origin - removed + left / 2, pause))
                removed += pause - left
                self._pieces.append((after[0], removed))
        self.total = merged[-1][1] - self._origin - removed

    def at(self, when: float) -> float:
        removed = next(removed for since, removed in reversed(self._pieces) if when >= since)
        return when - self._origin - removed


@dataclass(frozen=True)
class _Panel:
    """One comparison of predictions with measurements. `sizes`: of bytes, not of seconds."""

    key: str
    title: str
    value: Callable[[WorkFigures], float | None]
    sizes: bool = True

    def text(self, value: float) -> str:
        return bytes_text(value) if self.sizes else seconds_text(value)

    def points(self, work: Sequence[WorkSummary]) -> list[tuple[float, float, WorkSummary]]:
        """Return (predicted, measured, task) of the tasks that have both."""
        return [
            (predicted, measured, item)
            for item in work
            if self.key in _PREDICTED.get(item.kind, ())
            and (predicted := self.value(item.predicted))
            and (measured := self.value(item.measured))
        ]


_PANELS = (
    _Panel("peak_bytes", "peak memory of a stage", lambda figures: figures.peak_bytes),
    _Panel("snapshot_bytes", "bytes of a snapshot set", lambda figures: figures.snapshot_bytes),
    _Panel("seconds", "time of a task", lambda figures: figures.seconds, sizes=False),
)
#: Kind of node -> the predictions that are drawn of it.
_PREDICTED: Mapping[str, Sequence[str]] = {
    "train": ("peak_bytes", "seconds"),
    "materialize": ("snapshot_bytes", "seconds"),
    "evaluate": ("seconds",),
    "judge": ("seconds",),
    "boundaries": ("seconds",),
}


def predictions(work: Sequence[WorkSummary], regimes: Mapping[str, RegimeSummary]) -> str | None:
    """Draw measured over predicted memory, bytes and time; the diagonal is a perfect prediction."""
    palette = colours(regimes)
    found = [(panel, points) for panel in _PANELS if (points := panel.points(work))]
    if not found:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.8 * len(found), 3.55), layout="constrained")
        for axes, (panel, points) in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
            values = [value for predicted, measured, _ in points for value in (predicted, measured)]
            low, high = min(values) / 2.2, max(values) * 2.2
            axes.plot([low, high], [low, high], color="#b8c2cc", lw=1.2)
            axes.fill_between([low, high], [low / 2, high / 2], [low * 2, high * 2], color=PANEL, lw=0)
            for index, (predicted, measured, item) in enumerate(points):
                colour, large = _colour(item, palette), _look(item, palette).labelled
                axes.plot(
                    [predicted],
                    [measured],
                    "o" if large else "s",
                    ms=7 if large else 5,
                    mfc=colour if large else "white",
                    mec=colour,
                    alpha=0.85,
                    gid=f"{slug(panel.key)}-{index}",
                )
            _prediction_axes(axes, panel, low, high)
        return svg(figure, "predictions", "Measured against predicted memory, bytes and time")


def _prediction_axes(axes: Axes, panel: _Panel, low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    ticks = _log_ticks(low, high, sizes=panel.sizes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks)
        axis.set_major_formatter(FuncFormatter(lambda value, _: panel.text(value)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(which="minor", length=0)
    axes.tick_params(axis="x", labelsize=8.4)
    axes.tick_params(axis="y", labelsize=8.4)
    axes.set_title(panel.title, fontsize=10.5, loc="left")
    axes.set_xlabel("predicted")
    axes.set_ylabel("measured")


def _log_ticks(low: float, high: float, *, sizes: bool) -> list[float]:
    """A few round values between the limits."""
    if sizes:
        candidates = [step * 10.0**power for power in range(-1, 16) for step in (1, 2, 5)]
    else:
        candidates = [0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36000, 86400, 864000]
    inside = [value for value in candidates if low <= value <= high]
    stride = max(1, -(-len(inside) // 4))
    return inside[::stride]
