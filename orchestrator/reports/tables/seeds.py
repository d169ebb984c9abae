"""Compare regimes over seeds: mean, spread, and differences within a seed with an interval. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.units import DASH

#: 97.5% quantiles of Student's t by degrees of freedom, from 1 (Fisher and Yates, Statistical Tables, table III).
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
HEADS = ("regime", "n", "mean", "lowest to highest", "difference", "95% interval", "")
NOTE = "Differences are of runs with the same seed; intervals are Student's t over these pairs, each for itself."


@dataclass(frozen=True)
class Score:
    """What one regime came to with one seed. `group`: the other settings of its run, in words; empty where there are
    none."""

    group: str
    regime: str
    seed: int
    value: float


@dataclass(frozen=True)
class Difference:
    """Mean of n differences within a seed, and its 95% interval; None of a single pair."""

    against: str
    n: int
    mean: float
    interval: tuple[float, float] | None

    @property
    def shown(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and not self.interval[0] <= 0.0 <= self.interval[1]


@dataclass(frozen=True)
class SeedRow:
    """One regime of one group over its seeds. `difference`: to what it is compared with; None of that itself."""

    group: str
    regime: str
    values: tuple[float, ...]
    difference: Difference | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)


def quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t, to three digits."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.42 / degrees


def over_seeds(scores: Sequence[Score], baseline: str | None) -> tuple[SeedRow, ...]:
    """Sum up scores by group and regime, in their order; () where nothing was run with more than one seed.

    A regime is compared with `baseline` of its own group; that, or everything where there is none, with the same regime
    of the first group."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for score in scores:
        found.setdefault((score.group, score.regime), {})[score.seed] = score.value
    if max(map(len, found.values()), default=0) < 2:
        return ()
    first = next(iter(found))[0]
    return tuple(
        SeedRow(group, regime, tuple(values.values()), _difference(group, regime, found, baseline, first))
        for (group, regime), values in found.items()
    )


def _difference(
    group: str, regime: str, found: Mapping[tuple[str, str], Mapping[int, float]], baseline: str | None, first: str
) -> Difference | None:
    within = baseline is not None and regime != baseline and (group, baseline) in found
    other = (group, baseline or "") if within else (first, regime)
    if other == (group, regime) or other not in found:
        return None
    mine, theirs = found[group, regime], found[other]
    pairs = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    if not pairs:
        return None
    mean = statistics.mean(pairs)
    interval = None
    if len(pairs) > 1:
        half = quantile(len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
        interval = (mean - half, mean + half)
    return Difference(other[1] if within else other[0], len(pairs), mean, interval)


def cells(rows: Sequence[SeedRow], *, share: bool) -> list[tuple[str, ...]]:
    """Write rows as texts under `HEADS`; shares of one in percent and points, other metrics as they are."""
    one, gap = _FORMS[share]
    lines: list[tuple[str, ...]] = []
    for row in rows:
        difference, verdict, interval = DASH, "", DASH
        if row.difference is not None:
            difference = f"{gap(row.difference.mean)} to {row.difference.against}"
            verdict = "differs" if row.difference.shown else "no difference shown"
            if row.difference.interval is not None:
                low, high = row.difference.interval
                interval = f"{gap(low)} to {gap(high)}"
        spread = f"{one(min(row.values))} to {one(max(row.values))}"
        name = f"{row.regime} ({row.group})" if row.group else row.regime
        lines.append((name, str(len(row.values)), one(row.mean), spread, difference, interval, verdict))
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


_FORMS: Mapping[bool, tuple[Callable[[float], str], Callable[[float], str]]] = {
    True: (_percent, _points),
    False: ("{:.4f}".format, "{:+.4f}".format),
}
