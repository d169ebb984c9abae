"""The report's figures as inline SVG: same summary, same bytes.

Only matplotlib's object interface is used (no pyplot, no global state), text stays text, and every id is
prefixed with the figure's name, so that several figures can live in one HTML page.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from orchestrator.reports.layer_curve import METRICS, LayerCurve
from orchestrator.reports.svg import INK, MUTED, PANEL, STYLE, Json, colours, slug, spacious, svg
from orchestrator.units import bytes_text, seconds_text


def layers(curve: LayerCurve | None, regimes: Mapping[str, Json], titles: Mapping[str, str]) -> str | None:
    """Score against layer index: loss on the left, accuracy on the right; truncated models dashed, full ones solid."""
    shown = [metric for metric in METRICS if curve is not None and curve.lines[metric]]
    if curve is None or not shown:
        return None
    palette = colours(regimes)
    first, last = curve.ticks[0][0], curve.ticks[-1][0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.7 * len(shown), 3.7), layout=spacious())
        for axes, metric in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            for index, (name, value) in enumerate(curve.across[metric]):
                colour, style = (INK, ":") if name is None else (palette[name], "-.")
                axes.axhline(value, color=colour, lw=1.3, ls=style, gid=f"across-{index}-{metric}")
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
                    gid=f"{slug(line.regime)}-{line.model}-{metric}",
                )
            values = [value for line in curve.lines[metric] for _, value in line.points]
            values += [value for _, value in curve.across[metric]]
            axes.set_title(metric, loc="left", fontsize=10.5)
            if metric == "accuracy":
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
            elif min(values) > 0 and max(values) > 4 * min(values):
                # A truncated pretrained model is far off at first; what is compared lies at the other end.
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
                axes.tick_params(axis="y", which="minor", length=0)
            positions, labels = zip(*_thinned(curve.ticks), strict=True)
            axes.set_xticks(positions, labels)
            margin = 0.04 * max(1, last - first)
            axes.set_xlim(first - margin, last + margin)
            axes.set_xlabel("layer trained last")
            axes.grid(axis="x", visible=False)
        return svg(figure, "layers", "Score against layer index")


def _thinned(ticks: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """At most a dozen, the first and the last among them; none so near the last that they overlap."""
    stride = max(1, -(-len(ticks) // 12))
    kept = [tick for tick in ticks[:-1:stride] if ticks[-1][0] - tick[0] >= 0.1 * (ticks[-1][0] - ticks[0][0])]
    return [*kept, ticks[-1]]


def timeline(work: Sequence[Json], regimes: Mapping[str, Json], titles: Mapping[str, str]) -> str | None:
    """Who did what when: one row per worker process."""
    rows = [item for item in work if item.get("where") and item["where"].get("finished") is not None]
    if not rows:
        return None
    palette = colours(regimes)
    slots = sorted({_slot(item) for item in rows})
    busy = _Busy([(item["where"]["started"], item["where"]["finished"]) for item in rows])
    total = max(busy.total, 1e-6)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 0.95 + 0.52 * len(slots)), layout="constrained")
        axes = figure.subplots()
        for item in rows:
            start = busy.at(item["where"]["started"])
            width = max(busy.at(item["where"]["finished"]) - start, total / 700)
            row = slots.index(_slot(item))
            colour = palette[item["regimes"][0]] if len(item["regimes"]) == 1 else "#8a96a3"
            look: dict[str, Any] = {"color": colour, "ec": "white", "lw": 0.8}
            if item["kind"] == "materialize":
                look = {"fc": colour, "ec": "white", "hatch": "////", "lw": 0.8}
            elif item["kind"] != "train":
                look = {"color": colour, "alpha": 0.35, "lw": 0}
            axes.barh(row, width, left=start, height=0.66, gid=f"task-{slug(item['node'])}", **look)
            label = item["label"].rsplit("/", 1)[-1]
            if item["kind"] == "train" and width / total * 118 > len(label) + 2:
                axes.text(start + width / 2, row, label, ha="center", va="center", color="white", fontsize=8.6)
        for position, length in busy.cuts:
            axes.axvline(position, color=MUTED, ls=":", lw=1.2)
            axes.text(
                position,
                -0.52,
                f"pause {seconds_text(length)}",
                ha="center",
                va="bottom",
                fontsize=8,
                color=MUTED,
            )
        axes.set_yticks(range(len(slots)), slots)
        axes.set_ylim(len(slots) - 0.45, -0.55)
        axes.set_xlim(0, total * 1.005)
        axes.set_xticks(_time_ticks(total))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds_text(value)))
        axes.set_xlabel("time since the first task" + (", pauses cut out" if busy.cuts else ""))
        axes.grid(axis="y", visible=False)
        return svg(figure, "timeline", "Timeline of the tasks on every worker")


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


def _slot(item: Json) -> str:
    where = item["where"]
    device = str(where.get("device", ""))
    suffix = f" · {device}" if device.startswith("cuda") else ""
    return f"{where.get('host', '?')}:{where.get('pid', '?')}{suffix}"


class _Busy:
    """Maps unix seconds to time since the first task, with long pauses (a killed and resumed run) cut out."""

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


def predictions(work: Sequence[Json], regimes: Mapping[str, Json]) -> str | None:
    """Measured over predicted for memory, bytes and time; the diagonal is a perfect prediction."""
    palette = colours(regimes)
    panels = [
        ("peak_bytes", "peak memory of a stage", bytes_text, ("train",)),
        ("snapshot_bytes", "bytes of a snapshot set", bytes_text, ("materialize",)),
        ("seconds", "time of a task", seconds_text, ("train", "materialize", "evaluate")),
    ]
    found = []
    for key, title, text, kinds in panels:
        points = [
            (item["predicted"][key], item["measured"][key], item)
            for item in work
            if item["kind"] in kinds and item["predicted"].get(key) and item["measured"].get(key)
        ]
        if points:
            found.append((key, title, text, points))
    if not found:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.8 * len(found), 3.55), layout="constrained")
        for axes, (key, title, text, points) in zip(
            figure.subplots(1, len(found), squeeze=False)[0], found, strict=True
        ):
            values = [value for predicted, measured, _ in points for value in (predicted, measured)]
            low, high = min(values) / 2.2, max(values) * 2.2
            axes.plot([low, high], [low, high], color="#b8c2cc", lw=1.2)
            axes.fill_between([low, high], [low / 2, high / 2], [low * 2, high * 2], color=PANEL, lw=0)
            for index, (predicted, measured, item) in enumerate(points):
                colour = palette[item["regimes"][0]] if len(item["regimes"]) == 1 else "#8a96a3"
                filled = item["kind"] == "train"
                axes.plot(
                    [predicted],
                    [measured],
                    "o" if filled else "s",
                    ms=7 if filled else 5,
                    mfc=colour if filled else "white",
                    mec=colour,
                    alpha=0.85,
                    gid=f"{slug(key)}-{index}",
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlim(low, high)
            axes.set_ylim(low, high)
            axes.set_aspect("equal")
            ticks = _log_ticks(low, high, sizes=text is bytes_text)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_ticks(ticks)
                axis.set_major_formatter(FuncFormatter(lambda value, _, text=text: text(value)))
                axis.set_minor_formatter(NullFormatter())
                axis.set_tick_params(which="minor", length=0)
            axes.tick_params(axis="x", labelsize=8.4)
            axes.tick_params(axis="y", labelsize=8.4)
            axes.set_title(title, fontsize=10.5, loc="left")
            axes.set_xlabel("predicted")
            axes.set_ylabel("measured")
        return svg(figure, "predictions", "Measured against predicted memory, bytes and time")


def _log_ticks(low: float, high: float, *, sizes: bool) -> list[float]:
    """A few round values between the limits."""
    if sizes:
        candidates = [step * 10.0**power for power in range(-1, 16) for step in (1, 2, 5)]
    else:
        candidates = [0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36000, 86400, 864000]
    inside = [value for value in candidates if low <= value <= high]
    stride = max(1, -(-len(inside) // 4))
    return inside[::stride]


def _position(curve: Sequence[Json], epoch: int | None) -> int | None:
    return next((index for index, item in enumerate(curve) if item.get("epoch") == epoch), None)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
