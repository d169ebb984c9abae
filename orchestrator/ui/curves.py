"""Keep the curves of a run, as its live points come, and thin them to what a page can show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator.regimes.table import REGIMES
from orchestrator.ui.records import Curve, Line

#: Colours of the page's palette.
COLOURS = 6
#: Steps and values beyond these are no figures: a file may hold any number.
MOST_STEPS, MOST_VALUE = 1 << 53, 1e300
#: Points of a line that are kept, and that are drawn.
MOST_KEPT, MOST_DRAWN = 4000, 160
#: Figures in the order of the page; others follow by name.
FIRST = (
    *("train/loss", "validation/loss", "train/accuracy", "validation/accuracy"),
    *("validation/f1_micro", "validation/r2"),
    *("assembled/accuracy", "assembled/f1_micro", "assembled/r2", "assembled/loss"),
    *("test/accuracy", "test/f1_micro", "test/r2", "test/loss"),
    *("train/learning_rate", "train/gradient_norm", "train/samples_per_second", "train/tokens_per_second"),
)


class CurveBook:
    """Every figure's points by regime and stage. Long lines lose every second of their older points."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {}

    def add(self, points: Iterable[Mapping[str, Any]]) -> None:
        """Take lines of `points.jsonl`; what has another shape, or is not finite, is passed over."""
        for point in points:
            figures, step = point.get("figures"), point.get("step")
            if not isinstance(figures, dict) or not isinstance(step, int) or not 0 <= step < MOST_STEPS:
                continue
            key = (str(point.get("regime", "")), str(point.get("stage", "")))
            for name, value in figures.items():
                if isinstance(value, int | float) and abs(value) < MOST_VALUE:  # no NaN, either
                    line = self._lines.setdefault(str(name), {}).setdefault(key, [])
                    line.append((step, float(value)))
                    if len(line) > MOST_KEPT:
                        del line[: MOST_KEPT // 2 : 2]

    def clear(self) -> None:
        """Forget everything: the file has become another one."""
        self._lines.clear()

    def curves(self, colours: Mapping[str, int]) -> tuple[Curve, ...]:
        """Return the curves. `colours`: by regime; others get the last."""
        known = [name for name in FIRST if name in self._lines]
        return tuple(
            Curve(
                name,
                tuple(
                    Line(regime, stage, colours.get(regime, COLOURS - 1), thinned(sorted(points)))
                    for (regime, stage), points in self._lines[name].items()
                ),
            )
            for name in (*known, *sorted(self._lines.keys() - set(known)))
        )


def colours_of(kinds: Mapping[str, str]) -> dict[str, int]:
    """Choose a colour for every regime (name -> kind): its kind's own, or the next that is free. Those that are left
    over share the last."""
    own = {kind: index for index, kind in enumerate(REGIMES)}
    found: dict[str, int] = {}
    for name, kind in kinds.items():
        free = [index for index in range(COLOURS) if index not in found.values()]
        wanted = own.get(kind, COLOURS - 1)
        found[name] = wanted if wanted in free else next(iter(free), COLOURS - 1)
    return found


def thinned(points: Sequence[tuple[int, float]], most: int = MOST_DRAWN) -> tuple[tuple[int, float], ...]:
    """Return at most about `most` of the points, evenly chosen: the first and the last among them, and of each stretch
    the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return tuple(points)
    width = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for begin in range(0, len(points), width):
        stretch = range(begin, min(begin + width, len(points)))
        kept.add(min(stretch, key=lambda index: points[index][1]))
        kept.add(max(stretch, key=lambda index: points[index][1]))
    return tuple(points[index] for index in sorted(kept))
