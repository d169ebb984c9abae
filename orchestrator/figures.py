"""The report's figures as inline SVG: same summary, same bytes.

Only matplotlib's object interface is used (no pyplot, no global state), text stays text, and every id is
prefixed with the figure's name, so that several figures can live in one HTML page.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from orchestrator.layer_curve import METRICS, LayerCurve
from orchestrator.quality import Quality
from orchestrator.units import bytes_text, seconds_text

Json = Mapping[str, Any]

INK, MUTED, GRID, PANEL = "#1c2733", "#66727f", "#e3e8ed", "#f6f8fa"
SHADES = {
    "e2e": ("#3b6fb6", "#1f3f70", "#5b93d9", "#7a7fc4"),
    "lw": ("#c2571a", "#7c3610", "#d98a3d", "#b08a2e"),
    "segprop": ("#0e8a6d", "#07503f", "#5f9e2f", "#2a9fa6"),
}
#: Characters of a stage's label that fit side by side over the wide one of the learning curves' panels.
_LABEL_CHARACTERS = 96
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "segprop",
    "path.simplify": False,
    "text.parse_math": False,
    "font.size": 10.5,
    "axes.edgecolor": "#b8c2cc",
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "hatch.linewidth": 1.2,
    "hatch.color": "white",
}


def colours(regimes: Mapping[str, Json]) -> dict[str, str]:
    """A colour for every regime: the hue says the kind, regimes of one kind get shades of it."""
    seen: dict[str, int] = {}
    out: dict[str, str] = {}
    for name, regime in regimes.items():
        shades = SHADES.get(regime["kind"], SHADES["segprop"])
        index = seen.get(regime["kind"], 0)
        seen[regime["kind"]] = index + 1
        out[name] = shades[index % len(shades)]
    return out


def slug(text: str) -> str:
    """`text` as part of an SVG id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def learning_curves(regimes: Mapping[str, Json], titles: Mapping[str, str], quality: Quality) -> str | None:
    """One row per regime, stages one after the other; accuracy on the left and loss on the right, of language models
    the other way round."""
    shown = {name: regime for name, regime in regimes.items() if any(s["curve"] for s in regime["stages"])}
    if not shown:
        return None
    palette = colours(regimes)
    longest = max(sum(len(stage["curve"]) for stage in regime["stages"]) for regime in shown.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 0.5 + 2.55 * len(shown)), layout=spacious())
        grid = figure.subplots(len(shown), 2, squeeze=False, width_ratios=(3, 2))
        top = _loss_ceiling(shown)
        metrics = ("loss", "accuracy") if quality.text else ("accuracy", "loss")
        bottom = _loss_floor(shown, top) if quality.text else 0.0
        for row, (name, regime) in enumerate(shown.items()):
            panels = dict(zip(metrics, grid[row], strict=True))
            accuracy, loss = panels["accuracy"], panels["loss"]
            loss.set_ylim(bottom, top)
            _curves(panels, name, regime, palette[name], longest)
            grid[row][0].set_title(titles[name], loc="left", fontweight="bold", color=palette[name], pad=18)
            grid[row][0].set_ylabel(metrics[0])
            grid[row][1].set_title(metrics[1], loc="left", color=MUTED, fontsize=10, pad=18)
            accuracy.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
            for axes in (accuracy, loss):
                axes.set_xlim(0.5, longest + 0.5)
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
                axes.grid(axis="x", visible=False)
                if row == len(shown) - 1:
                    axes.set_xlabel("epoch, counted over all stages")
        floor, ceiling = _accuracy_limits(shown)
        reference = _reference(shown, metrics[0])
        for row, regime in enumerate(shown.values()):
            grid[row][metrics.index("accuracy")].set_ylim(floor, ceiling + 0.03 * (ceiling - floor))
            if reference is not None and regime["kind"] != "e2e":
                grid[row][0].axhline(reference, color=SHADES["e2e"][0], lw=1, alpha=0.6, zorder=1)
        return svg(figure, "curves", "Learning curves of every regime, stage after stage")


def spacious() -> ConstrainedLayoutEngine:
    """Room between panels."""
    return ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.06)


def _curves(panels: Mapping[str, Axes], name: str, regime: Json, colour: str, longest: int) -> None:
    """`panels`: the metric -> where to draw it, the one that leads first. `longest`: epochs the axes have room for."""
    start = 0
    key = slug(name)
    leading = next(iter(panels))
    stages = [(index, stage) for index, stage in enumerate(regime["stages"]) if stage["curve"]]
    labels = _stage_labels([stage for _, stage in stages], longest)
    # Two dozen one-epoch stages stand so near each other that full marks would hide their neighbours.
    size = 3.6 if len(stages) > 15 else 5.5
    for (index, stage), label in zip(stages, labels, strict=True):
        curve: Sequence[Json] = stage["curve"]
        xs = [start + position + 1 for position in range(len(curve))]
        if index % 2:
            for axes in panels.values():
                axes.axvspan(start + 0.5, start + len(curve) + 0.5, color=PANEL, zorder=0, lw=0)
        line = (0, (3, 1.6)) if stage["auxiliary"] else "solid"
        marker = "o" if len(curve) <= 20 else None
        best = _position(curve, stage["best_epoch"])
        for metric, axes in panels.items():
            axes.plot(
                xs,
                [_number(epoch.get(f"train_{metric}")) for epoch in curve],
                color="#9aa5b1",
                lw=1.1,
                marker="_" if len(curve) == 1 else None,
                ms=8,
                gid=f"{key}-{index}-train-{metric}",
            )
            axes.plot(
                xs,
                [_number(epoch.get(f"validation_{metric}")) for epoch in curve],
                color=colour,
                lw=1.9,
                ls=line,
                marker=marker,
                ms=3,
                gid=f"{key}-{index}-validation-{metric}",
            )
            if start:
                axes.axvline(start + 0.5, color="#b8c2cc", lw=1)
            if best is not None and len(curve) > 1:
                axes.axvline(xs[best], color=colour, lw=1, ls=":", gid=f"{key}-{index}-best-{metric}")
        if best is not None:
            value = _number(curve[best].get(f"validation_{leading}"))
            panels[leading].plot([xs[best]], [value], "o", color="white", mec=colour, mew=1.6, ms=size + 0.5, zorder=5)
        whole = stage["assembled"].get(leading)
        if whole is not None:
            top = panels[leading].get_ylim()[1] if leading == "loss" else math.inf
            panels[leading].plot(
                [start + len(curve) + 0.35],
                [min(whole, top)],
                # A half-trained network can be off the scale: a triangle at the edge says so.
                "D" if whole <= top else "^",
                color=INK,
                mfc=INK if whole <= top else "white",
                ms=size,
                zorder=6,
                clip_on=False,
                gid=f"{key}-{index}-assembled",
            )
        panels[leading].text(
            start + 0.5 + len(curve) / 2,
            1.025,
            label,
            transform=panels[leading].get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8.6,
            color=MUTED,
        )
        start += len(curve)
    if len(stages) > 1 and all(len(stage["curve"]) == 1 for _, stage in stages):
        _joined(panels, [stage for _, stage in stages], key, colour)


def _joined(panels: Mapping[str, Axes], stages: Sequence[Json], key: str, colour: str) -> None:
    """One point a stage is no curve yet: a thin line over the stages is."""
    for metric, axes in panels.items():
        values = [_number(stage["curve"][0].get(f"validation_{metric}")) for stage in stages]
        positions = range(1, len(values) + 1)
        axes.plot(positions, values, color=colour, lw=0.9, alpha=0.55, zorder=1, gid=f"{key}-joined-{metric}")


def _stage_labels(stages: Sequence[Json], longest: int) -> list[str]:
    """Names where they fit beside each other, else the number of the layer trained last; of these as many as fit."""
    names = [stage["name"] + (" · aux" if stage["auxiliary"] else "") for stage in stages]
    # A ResNet's stages are few, and have no number that could stand for them.
    if all(stage.get("layer") is None for stage in stages) or _fit(names, stages, longest):
        return names
    plain = [stage["name"] for stage in stages]
    if _fit(plain, stages, longest):
        return plain
    short = [_short_label(stage, index) for index, stage in enumerate(stages)]
    spelled = [f"layer {label}" if label.isdigit() and stages[0]["layer"] is not None else label for label in short]
    if _fit(spelled, stages, longest):
        return spelled
    last = len(short) - 1
    for stride in range(1, len(short) + 1):
        # The last says where the regime ends: its neighbours make room for it.
        for space in (0, 1):
            kept = [
                label if index == last or (index % stride == 0 and index < last - space) else ""
                for index, label in enumerate(short)
            ]
            if _fit(kept, stages, longest):
                return kept
    return [""] * last + short[-1:]


def _short_label(stage: Json, index: int) -> str:
    layer = stage.get("layer")
    if layer is None:
        return str(index + 1)
    return "head" if layer == "head" else str(layer)


def _fit(labels: Sequence[str], stages: Sequence[Json], longest: int) -> bool:
    """Does no label touch the next one that is not empty, or stand out of the axes?"""
    room = _LABEL_CHARACTERS / max(1, longest)  # characters an epoch is wide
    end, start = 0.0, 0
    for label, stage in zip(labels, stages, strict=True):
        middle = (start + len(stage["curve"]) / 2) * room
        if label and middle - len(label) / 2 < end - 1.5:
            return False
        if label:
            end = middle + len(label) / 2 + 2.0
        start += len(stage["curve"])
    return True


def _reference(regimes: Mapping[str, Json], metric: str) -> float | None:
    """The finished network's validation figure in the first end-to-end regime."""
    for regime in regimes.values():
        if regime["kind"] == "e2e" and regime["final"]["validation"].get(metric) is not None:
            return float(regime["final"]["validation"][metric])
    return None


def _values(regimes: Mapping[str, Json], metric: str) -> list[float]:
    return [
        float(value)
        for regime in regimes.values()
        for stage in regime["stages"]
        for value in (
            *(epoch.get(f"validation_{metric}") for epoch in stage["curve"]),
            *(epoch.get(f"train_{metric}") for epoch in stage["curve"]),
            stage["assembled"].get(metric),
        )
        if value is not None
    ]


def _accuracy_limits(regimes: Mapping[str, Json]) -> tuple[float, float]:
    """Up to 100 %, unless the best is so far below that the curves would lie flat on the floor."""
    values = _values(regimes, "accuracy")
    floor = max(0.0, int(10 * min(values, default=0.0)) / 10 - 0.02)
    best = max(values, default=1.0)
    if best >= 0.6 or best <= 0:
        return floor, 1.0
    return (floor if max(values) - min(values) < 0.1 else 0.0), min(1.0, 1.15 * best)


def _loss_ceiling(regimes: Mapping[str, Json]) -> float:
    """Cut at the 98th percentile, so that one wild first epoch does not flatten everything else."""
    values = sorted(
        epoch[key]
        for regime in regimes.values()
        for stage in regime["stages"]
        for epoch in stage["curve"]
        for key in ("train_loss", "validation_loss")
        if epoch.get(key) is not None
    )
    return 1.08 * values[int(0.98 * (len(values) - 1))] if values else 1.0


def _loss_floor(regimes: Mapping[str, Json], top: float) -> float:
    """A language model's loss never comes near 0: leave out what is empty."""
    lowest = min(_values(regimes, "loss"), default=0.0)
    return max(0.0, lowest - 0.15 * (top - lowest))


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


def svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an element for a page; `name` goes into its ids, `label` is for those who cannot see it."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sid="([^"]+)"', rf' id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"font: ([^;\"]*?)('[^;\"]*|[\w-]+)(?=[;\"])", _font, text)
    opening = re.compile(r"<svg\b[^>]*>")
    viewbox = re.search(r'viewBox="([^"]+)"', text)
    assert viewbox is not None
    head = (
        f'<svg class="figure" role="img" aria-label="{label}" viewBox="{viewbox.group(1)}" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening.sub(lambda _: head, text, count=1)


def _font(match: re.Match[str]) -> str:
    """The page's own font instead of the one matplotlib measured with."""
    return f"font: {match.group(1)}system-ui, sans-serif"
