"""Lay a curve out as a small figure: where its ticks, lines and points lie. The template draws it as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.ui.records import Curve, Line

#: Of the figure, and the room around the plot: left, right, top, bottom. Units of the SVG.
WIDTH, HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 30
#: A line with no more points than this shows each of them.
_DOTS = 40


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    title: str
    shown: bool


@dataclass(frozen=True)
class DrawnLine:
    """`path`: the points of an SVG polyline."""

    colour: int
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Latest:
    """What a regime's line came to, for the legend."""

    regime: str
    colour: int
    text: str


@dataclass(frozen=True)
class Chart:
    """`said`: the figure in a sentence, for those who cannot see it."""

    figure: str
    said: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[DrawnLine, ...]
    latest: tuple[Latest, ...]
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM
    width: int = WIDTH
    height: int = HEIGHT


def chart(curve: Curve) -> Chart:
    """Lay out a curve that has a point at least."""
    steps = [step for line in curve.lines for step, _ in line.points]
    values = [value for line in curve.lines for _, value in line.points]
    x, y = _Scale(0.0, max(steps), _LEFT, WIDTH - _RIGHT), _value_scale(values)
    latest = tuple(_latest(curve))
    return Chart(
        figure=curve.figure,
        said=f"{curve.figure} over {max(steps):,} steps. " + "; ".join(f"{each.regime} {each.text}" for each in latest),
        x_ticks=tuple(Tick(x.of(step), f"{step:,.0f}") for step in ticks(0.0, max(steps), whole=True)),
        y_ticks=tuple(Tick(y.of(value), number(value)) for value in ticks(y.low, y.high)),
        lines=tuple(_drawn(line, x, y) for line in curve.lines),
        latest=latest,
    )


@dataclass(frozen=True)
class _Scale:
    """Values from `low` to `high` lie from `begin` to `end`."""

    low: float
    high: float
    begin: float
    end: float

    def of(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.begin + share * (self.end - self.begin), 1)


def _value_scale(values: Sequence[float]) -> _Scale:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    # What is never negative has no room below zero.
    return _Scale(max(0.0, low - room) if low >= 0 else low - room, high + room, HEIGHT - _BOTTOM, _TOP)


def ticks(low: float, high: float, most: int = 5, *, whole: bool = False) -> Iterator[float]:
    """Yield round numbers from `low` to `high`, at most about `most`; `whole`: no fractions."""
    if not high > low:
        yield low
        return
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    step = max(1.0, step) if whole else step
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield index * step


def number(value: float) -> str:
    """Write a value of an axis: 0.25, 12, 3e-4."""
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def _drawn(line: Line, x: _Scale, y: _Scale) -> DrawnLine:
    places = [(x.of(step), y.of(value)) for step, value in line.points]
    shown = len(line.points) <= _DOTS
    name = f"{line.regime} {line.stage}".strip()
    return DrawnLine(
        colour=line.colour,
        path=" ".join(f"{left},{top}" for left, top in places),
        dots=tuple(
            Dot(left, top, f"{name}: {number(value)} at step {step:,}", shown)
            for (left, top), (step, value) in zip(places, line.points, strict=True)
        ),
    )


def _latest(curve: Curve) -> Iterator[Latest]:
    for regime in dict.fromkeys(line.regime for line in curve.lines):
        lines = [line for line in curve.lines if line.regime == regime]
        step, value = max(line.points[-1] for line in lines)
        yield Latest(regime, lines[0].colour, f"{number(value)} at step {step:,}")
