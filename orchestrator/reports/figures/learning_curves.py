"""Draw every regime's loss and accuracy over its epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from orchestrator.reports.figures.points import drawn_metrics
from orchestrator.reports.figures.svg import INK, MUTED, PANEL, STYLE, colours, slug, spacious, svg
from orchestrator.reports.live_points import Points, StepCurves
from orchestrator.reports.quality import Quality
from orchestrator.reports.records import RegimeSummary, StageSummary
from orchestrator.reports.words import is_baseline, of_kind
from workers.domains.metrics import METRICS

#: Characters of a stage's label that fit side by side over the wide one of the learning curves' panels.
_LABEL_CHARACTERS = 96


def learning_curves(
    regimes: Mapping[str, RegimeSummary], titles: Mapping[str, str], quality: Quality, steps: StepCurves | None = None
) -> str | None:
    """Draw one row per regime, stages one after the other; accuracy, or what networks are judged by in its place, on
    the left and loss on the right, of language models the other way round. `steps`: the training curves inside stages
    of one epoch, as far as they are known."""
    shown = {name: regime for name, regime in regimes.items() if any(stage.curve for stage in regime.stages)}
    if not shown:
        return None
    palette = colours(regimes)
    longest = max(sum(len(stage.curve) for stage in regime.stages) for regime in shown.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 0.5 + 2.55 * len(shown)), layout=spacious())
        steps = steps or {}
        top = _loss_ceiling(shown, steps)
        metrics = drawn_metrics(quality)
        score = next((metric for metric in metrics if metric != "loss"), "loss")
        grid = figure.subplots(len(shown), len(metrics), squeeze=False, width_ratios=(3, 2)[: len(metrics)])
        bottom = _loss_floor(shown, top) if quality.text else min(0.0, *_values(shown, "loss"), 0.0)
        for row, (name, regime) in enumerate(shown.items()):
            panels = dict(zip(metrics, grid[row], strict=True))
            panels["loss"].set_ylim(bottom, top)
            inside = {stage: curves for (of, stage), curves in steps.items() if of == name}
            _Row(panels, slug(name), palette[name], regime, longest, inside).draw()
            grid[row][0].set_title(titles[name], loc="left", fontweight="bold", color=palette[name], pad=18)
            grid[row][0].set_ylabel(METRICS[metrics[0]].title)
            for metric, axes in panels.items():
                if axes is not grid[row][0]:
                    axes.set_title(METRICS[metric].title, loc="left", color=MUTED, fontsize=10, pad=18)
                if METRICS[metric].share:
                    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
                axes.set_xlim(0.5, longest + 0.5)
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
                axes.grid(axis="x", visible=False)
                if row == len(shown) - 1:
                    axes.set_xlabel("epoch, counted over all stages")
        floor, ceiling = _score_limits(shown, score)
        reference = _reference(shown, metrics[0])
        for row, regime in enumerate(shown.values()):
            if score != "loss":
                grid[row][metrics.index(score)].set_ylim(floor, ceiling + 0.03 * (ceiling - floor))
            if reference is not None and not is_baseline(regime):
                value, colour = reference
                grid[row][0].axhline(value, color=colour, lw=1, alpha=0.6, zorder=1)
        return svg(figure, "curves", "Learning curves of every regime, stage after stage")


@dataclass(frozen=True)
class _Row:
    """One regime's panels. `panels`: metric -> where to draw it, the one that leads first; `key`: begins the ids of
    what is drawn; `longest`: epochs the axes have room for."""

    panels: Mapping[str, Axes]
    key: str
    colour: str
    regime: RegimeSummary
    longest: int
    #: Stage of one epoch -> metric -> its training curve.
    steps: Mapping[str, Mapping[str, Points]]

    @property
    def leading(self) -> str:
        return next(iter(self.panels))

    def draw(self) -> None:
        """Draw all stages that have epochs."""
        stages = [(index, stage) for index, stage in enumerate(self.regime.stages) if stage.curve]
        labels = _stage_labels([stage for _, stage in stages], self.longest)
        # Two dozen one-epoch stages stand so near each other that full marks would hide their neighbours.
        size = 3.6 if len(stages) > 15 else 5.5
        start = 0
        for (index, stage), label in zip(stages, labels, strict=True):
            for metric, axes in self.panels.items():
                if index % 2:
                    axes.axvspan(start + 0.5, start + len(stage.curve) + 0.5, color=PANEL, zorder=0, lw=0)
                self._lines(axes, metric, index, stage, start)
            self._marks(index, stage, start, size)
            self._label(label, stage, start)
            start += len(stage.curve)
        if len(stages) > 1 and all(len(stage.curve) == 1 for _, stage in stages):
            self._joined([stage for _, stage in stages])

    def _lines(self, axes: Axes, metric: str, index: int, stage: StageSummary, start: int) -> None:
        """Draw a stage's training and validation curve of one metric, after `start` epochs of earlier stages."""
        curve = stage.curve
        xs = [start + position + 1 for position in range(len(curve))]
        inside = self.steps.get(stage.name, {}).get(metric, ())
        if inside:
            axes.plot(
                # The epoch ends where its validation stands.
                [start + 0.5 + 0.5 * share for share, _ in inside],
                [value for _, value in inside],
                color="#9aa5b1",
                lw=1.1,
                gid=f"{self.key}-{index}-steps-{metric}",
            )
        axes.plot(
            xs,
            [_number(epoch.figure(f"train_{metric}")) for epoch in curve],
            color="#9aa5b1",
            lw=1.1,
            marker="_" if len(curve) == 1 else None,
            ms=8,
            gid=f"{self.key}-{index}-train-{metric}",
        )
        axes.plot(
            xs,
            [_number(epoch.figure(f"validation_{metric}")) for epoch in curve],
            color=self.colour,
            lw=1.9,
            ls=(0, (3, 1.6)) if stage.auxiliary else "solid",
            marker="o" if len(curve) <= 20 else None,
            ms=3,
            gid=f"{self.key}-{index}-validation-{metric}",
        )
        for path, tested, style in (
            ("test", [epoch.test for epoch in curve], "solid"),
            ("test_auxiliary", [epoch.test_auxiliary for epoch in curve], (0, (3, 1.6))),
        ):
            if any(tested):
                axes.plot(
                    xs,
                    [_number((metrics or {}).get(metric)) for metrics in tested],
                    color=INK,
                    lw=1.0,
                    ls=style,
                    marker="." if len(curve) == 1 else None,
                    gid=f"{self.key}-{index}-{path}-{metric}",
                )
        if start:
            axes.axvline(start + 0.5, color="#b8c2cc", lw=1)
        best = _best(stage)
        if best is not None and len(curve) > 1:
            axes.axvline(xs[best], color=self.colour, lw=1, ls=":", gid=f"{self.key}-{index}-best-{metric}")

    def _marks(self, index: int, stage: StageSummary, start: int, size: float) -> None:
        """Mark the best epoch, and the whole network after the stage."""
        leading, axes = self.leading, self.panels[self.leading]
        best = _best(stage)
        if best is not None:
            value = _number(stage.curve[best].figure(f"validation_{leading}"))
            x = start + best + 1
            axes.plot([x], [value], "o", color="white", mec=self.colour, mew=1.6, ms=size + 0.5, zorder=5)
        whole = stage.assembled.get(leading)
        if whole is not None:
            top = axes.get_ylim()[1] if leading == "loss" else math.inf
            axes.plot(
                [start + len(stage.curve) + 0.35],
                [min(whole, top)],
                # A half-trained network can be off the scale: a triangle at the edge says so.
                "D" if whole <= top else "^",
                color=INK,
                mfc=INK if whole <= top else "white",
                ms=size,
                zorder=6,
                clip_on=False,
                gid=f"{self.key}-{index}-assembled",
            )

    def _label(self, label: str, stage: StageSummary, start: int) -> None:
        axes = self.panels[self.leading]
        axes.text(
            start + 0.5 + len(stage.curve) / 2,
            1.025,
            label,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8.6,
            color=MUTED,
        )

    def _joined(self, stages: Sequence[StageSummary]) -> None:
        """Join stages of one epoch by a thin line: one point a stage is no curve yet."""
        for metric, axes in self.panels.items():
            values = [_number(stage.curve[0].figure(f"validation_{metric}")) for stage in stages]
            positions = range(1, len(values) + 1)
            axes.plot(
                positions, values, color=self.colour, lw=0.9, alpha=0.55, zorder=1, gid=f"{self.key}-joined-{metric}"
            )


def _best(stage: StageSummary) -> int | None:
    """Return the position of the best epoch in the stage's curve."""
    return next((index for index, epoch in enumerate(stage.curve) if epoch.epoch == stage.best_epoch), None)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _stage_labels(stages: Sequence[StageSummary], longest: int) -> list[str]:
    """Names where they fit beside each other, else the number of the layer trained last; of these as many as fit."""
    names = [stage.name + (" · aux" if stage.auxiliary else "") for stage in stages]
    # A ResNet's stages are few, and have no number that could stand for them.
    if all(stage.layer is None for stage in stages) or _fit(names, stages, longest):
        return names
    plain = [stage.name for stage in stages]
    if _fit(plain, stages, longest):
        return plain
    short = [_short_label(stage, index) for index, stage in enumerate(stages)]
    spelled = [f"layer {label}" if label.isdigit() and stages[0].layer is not None else label for label in short]
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


def _short_label(stage: StageSummary, index: int) -> str:
    layer = stage.layer
    if layer is None:
        return str(index + 1)
    return "head" if layer == "head" else str(layer)


def _fit(labels: Sequence[str], stages: Sequence[StageSummary], longest: int) -> bool:
    """Does no label touch the next one that is not empty, or stand out of the axes?"""
    room = _LABEL_CHARACTERS / max(1, longest)  # characters an epoch is wide
    end, start = 0.0, 0
    for label, stage in zip(labels, stages, strict=True):
        middle = (start + len(stage.curve) / 2) * room
        if label and middle - len(label) / 2 < end - 1.5:
            return False
        if label:
            end = middle + len(label) / 2 + 2.0
        start += len(stage.curve)
    return True


def _reference(regimes: Mapping[str, RegimeSummary], metric: str) -> tuple[float, str] | None:
    """Return the finished network's validation figure in the first end-to-end regime that has one, and its colour."""
    for regime in regimes.values():
        value = regime.final.validation.get(metric)
        if is_baseline(regime) and value is not None:
            return float(value), of_kind(regime.kind).shades[0]
    return None


def _values(regimes: Mapping[str, RegimeSummary], metric: str) -> list[float]:
    return [
        float(value)
        for regime in regimes.values()
        for stage in regime.stages
        for value in (
            *(epoch.figure(f"validation_{metric}") for epoch in stage.curve),
            *(epoch.figure(f"train_{metric}") for epoch in stage.curve),
            *((epoch.test or {}).get(metric) for epoch in stage.curve),
            stage.assembled.get(metric),
        )
        if value is not None
    ]


def _score_limits(regimes: Mapping[str, RegimeSummary], score: str) -> tuple[float, float]:
    """Up to 100 % (R²: 1), unless the best is so far below that the curves would lie flat on the floor. Of an R² below
    zero, which has no end, nothing is shown below −1."""
    values = _values(regimes, score)
    if not METRICS[score].share and min(values, default=0.0) < 0:
        return max(-1.0, min(values) - 0.02), 1.0
    floor = max(0.0, int(10 * min(values, default=0.0)) / 10 - 0.02)
    best = max(values, default=1.0)
    if best >= 0.6 or best <= 0:
        return floor, 1.0
    return (floor if max(values) - min(values) < 0.1 else 0.0), min(1.0, 1.15 * best)


def _loss_ceiling(regimes: Mapping[str, RegimeSummary], steps: StepCurves) -> float:
    """Cut at the 98th percentile, so that one wild first epoch does not flatten everything else."""
    values = [
        value
        for regime in regimes.values()
        for stage in regime.stages
        for epoch in stage.curve
        for value in (epoch.train_loss, epoch.validation_loss)
        if value is not None
    ]
    values += [value for curves in steps.values() for _, value in curves.get("loss", ())]
    values.sort()
    return 1.08 * values[int(0.98 * (len(values) - 1))] if values else 1.0


def _loss_floor(regimes: Mapping[str, RegimeSummary], top: float) -> float:
    """A language model's loss never comes near 0: leave out what is empty."""
    lowest = min(_values(regimes, "loss"), default=0.0)
    return max(0.0, lowest - 0.15 * (top - lowest))
