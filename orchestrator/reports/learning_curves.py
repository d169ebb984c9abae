"""Draw every regime's loss and accuracy over its epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from orchestrator.reports.figures import _number, _position
from orchestrator.reports.quality import Quality
from orchestrator.reports.svg import INK, MUTED, PANEL, SHADES, STYLE, Json, colours, slug, spacious, svg

#: Characters of a stage's label that fit side by side over the wide one of the learning curves' panels.
_LABEL_CHARACTERS = 96


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
