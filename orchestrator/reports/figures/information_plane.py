"""Draw what boundaries know: each measure against the boundary, and the information plane, a panel a regime.

The network after a regime's last stage is drawn boldly; those after its other stages are pale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from orchestrator.reports.figures import points
from orchestrator.reports.figures.points import FigurePoints
from orchestrator.reports.figures.svg import MUTED, STYLE, colours, slug, spacious, svg
from orchestrator.reports.records import RegimeSummary
from orchestrator.reports.sections import BoundarySection, boundaries_of, known_after
from orchestrator.reports.tables.boundary_table import FIGURES

#: The axes of the information plane.
PLANE = ("nhsic_inputs", "nhsic_targets")


@dataclass(frozen=True)
class _Line:
    """A network: the boundaries that a figure, or both of a plane, are known of, in chain order."""

    regime: str
    stage: str
    last: bool
    boundaries: Mapping[str, BoundarySection]

    def having(self, *figures: str) -> list[tuple[str, BoundarySection]]:
        return [item for item in self.boundaries.items() if all(name in item[1].measures for name in figures)]


def _lines(regimes: Mapping[str, RegimeSummary]) -> list[_Line]:
    found = []
    for name, regime in regimes.items():
        known = known_after(boundaries_of(regime))
        found += [_Line(name, stage, stage == list(known)[-1], items) for stage, items in known.items()]
    return found


def measures(regimes: Mapping[str, RegimeSummary], names: Mapping[str, str]) -> str | None:
    """Draw every measure against the boundary, a panel each. `names`: what regimes are called. None where nothing was
    measured."""
    lines = _lines(regimes)
    order = list(dict.fromkeys(boundary for line in lines for boundary in line.boundaries))
    shown = [figure for figure in FIGURES if any(line.having(figure) for line in lines)]
    if not shown:
        return None
    palette = colours(regimes)
    with matplotlib.rc_context(STYLE):
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        drawn = Figure(figsize=(3.9 * columns, 3.2 * rows), layout=spacious())
        panels = [axes for row in drawn.subplots(rows, columns, squeeze=False) for axes in row]
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        for axes, figure in zip(panels, shown, strict=False):
            for line in sorted(lines, key=lambda line: line.last):
                _against_boundary(axes, line, figure, order, palette[line.regime])
            axes.set_title(FIGURES[figure][0], loc="left", fontsize=10.5)
            ticks = _thinned(order)
            axes.set_xticks([order.index(name) for name in ticks], ticks, rotation=30 if len(order) > 6 else 0)
            axes.margins(x=0.06)
        return svg(drawn, "knowledge", f"What boundaries know, of {', '.join(names[name] for name in regimes)}")


def measure_points(regimes: Mapping[str, RegimeSummary], names: Mapping[str, str]) -> FigurePoints:
    """Return the points of what `measures` draws."""
    lines = tuple(
        points.Line(
            id=f"knowledge-{_name(line, figure)}",
            name=f"{names[line.regime]}, after {line.stage}: {title}",
            key=(names[line.regime], line.stage, title),
            points=tuple((name, factor * item.measures[figure].value) for name, item in line.having(figure)),
            share=False,
        )
        for figure, (title, factor, _) in FIGURES.items()
        for line in _lines(regimes)
        if line.having(figure)
    )
    return FigurePoints(("regime", "after", "measure", "boundary", "value"), "boundary", lines)


def _against_boundary(axes: Axes, line: _Line, figure: str, order: Sequence[str], colour: str) -> None:
    found = line.having(figure)
    if not found:
        return
    factor = FIGURES[figure][1]
    places = [order.index(name) for name, _ in found]
    values = [factor * item.measures[figure].value for _, item in found]
    axes.plot(places, values, color=colour, gid=_name(line, figure), **_look(line))
    if line.last:
        errors = [factor * item.measures[figure].error for _, item in found]
        low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=colour, alpha=0.15, lw=0)


def plane(regimes: Mapping[str, RegimeSummary], names: Mapping[str, str]) -> str | None:
    """Draw nHSIC with targets over nHSIC with inputs, a panel a regime, a line a network through its boundaries. None
    where it was not measured."""
    lines = [line for line in _lines(regimes) if line.having(*PLANE)]
    shown = list(dict.fromkeys(line.regime for line in lines))
    if not shown:
        return None
    palette = colours(regimes)
    with matplotlib.rc_context(STYLE):
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        drawn = Figure(figsize=(3.9 * columns, 3.6 * rows), layout=spacious())
        grid = drawn.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        panels = [axes for row in grid for axes in row]
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        for axes, regime in zip(panels, shown, strict=False):
            for line in (line for line in lines if line.regime == regime):
                _on_plane(axes, line, palette[regime])
            axes.set_title(names[regime], loc="left", fontsize=10.5)
            axes.set_xlabel(FIGURES[PLANE[0]][0])
            axes.margins(0.12)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0].set_ylabel(FIGURES[PLANE[1]][0])
        return svg(drawn, "plane", "Information plane: nHSIC with targets over nHSIC with inputs")


def _on_plane(axes: Axes, line: _Line, colour: str) -> None:
    found = line.having(*PLANE)
    points = [[item.measures[name] for name in PLANE] for _, item in found]
    across, up = ([point[axis].value for point in points] for axis in (0, 1))
    axes.plot(across, up, color=colour, gid=_name(line, "plane"), **_look(line))
    if not line.last:
        return
    beside, above = ([point[axis].error for point in points] for axis in (0, 1))
    axes.errorbar(across, up, above, beside, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.6)
    for (name, _), x, y in zip(found, across, up, strict=True):
        axes.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8, color=MUTED)


def _look(line: _Line) -> dict[str, Any]:
    if line.last:
        return {"lw": 1.9, "marker": "o", "ms": 4.5, "zorder": 3}
    return {"lw": 0.9, "marker": "o", "ms": 2.2, "alpha": 0.35}


def _name(line: _Line, figure: str) -> str:
    return f"{slug(line.regime)}-{slug(line.stage)}-{slug(figure)}"


def _thinned(order: Sequence[str]) -> list[str]:
    """Return at most a dozen names, the first and the last among them."""
    stride = max(1, -(-len(order) // 12))
    return [*order[:-1:stride], order[-1]]
