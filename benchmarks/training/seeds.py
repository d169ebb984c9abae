"""Make one table of several finished runs of one configuration with different seeds.

    python -m benchmarks.training.seeds NAME RUN…

Reads each run's summary.json; writes benchmarks/results/NAME.{json,md}. Spread is min to max over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness

Json = dict[str, Any]


def spread(values: Sequence[float], form: str) -> str:
    """Mean (min to max); how many, where it is one."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{form.format(values[0])} (n=1)"
    return f"{form.format(statistics.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


@dataclass(frozen=True)
class Column:
    """A figure of one regime of one run, and how it is written."""

    name: str
    of: Callable[[Json, Json], float]
    form: str


def _of_e2e(split: str) -> Callable[[Json, Json], float]:
    """What a regime gained over the untouched model, as a share of what E2E of the same run gained, in percent."""

    def share(run: Json, regime: Json) -> float:
        before = run["original"][split]["loss"]
        gained = before - _loss(run["regimes"]["e2e"], split)
        return float(100 * (before - _loss(regime, split)) / gained)

    return share


def _loss(regime: Json, split: str) -> float:
    final = regime["final"]
    return float((final["metrics"] if split == "test" else final["validation"])["loss"])


IMAGES = (
    Column("test accuracy %", lambda run, r: 100 * r["final"]["metrics"]["accuracy"], "{:.2f}"),
    Column("test loss", lambda run, r: _loss(r, "test"), "{:.3f}"),
)
TEXT = (
    Column("validation loss", lambda run, r: _loss(r, "validation"), "{:.4f}"),
    Column("of E2E's gain %", _of_e2e("validation"), "{:.0f}"),
    Column("test loss", lambda run, r: _loss(r, "test"), "{:.4f}"),
    Column("of E2E's gain (test) %", _of_e2e("test"), "{:.0f}"),
)
COSTS = (
    Column("training + snapshots s", lambda run, r: r["seconds"], "{:.0f}"),
    Column("of it snapshots s", lambda run, r: r["seconds_by_kind"].get("materialize", 0.0), "{:.0f}"),
    Column("largest stage, host growth MB", lambda run, r: r["host_growth_bytes"] / 1e6, "{:.0f}"),
    Column("largest stage, trained parameters M", lambda run, r: r["trainable_parameters"] / 1e6, "{:.2f}"),
    Column("snapshots written GB", lambda run, r: r["snapshot"]["bytes_written"] / 1e9, "{:.2f}"),
    Column("snapshots read GB", lambda run, r: r["snapshot"]["bytes_read"] / 1e9, "{:.2f}"),
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.training.seeds", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--command", required=True, help="how each run was started, for the record")
    parser.add_argument("--note", action="append", default=[], help="what a reader has to know")
    options = parser.parse_args(arguments)
    runs = [json.loads((run / "summary.json").read_text()) for run in options.runs]
    report = _report(runs, options.command, options.note)
    context = harness.context(["seeds", options.name])
    harness.write(report, options.name, context, harness.RESULTS)
    print(harness.markdown(report, options.name, context))
    return 0


def _report(runs: Sequence[Json], command: str, notes: Sequence[str]) -> harness.Report:
    text = bool(runs[0].get("original"))
    columns = (*(TEXT if text else IMAGES), *COSTS)
    # A regime may be missing in some runs: its figures are those of the others.
    names = list(dict.fromkeys(name for run in runs for name in run["regimes"]))
    done = {name: [(run, run["regimes"][name]) for run in runs if _is_done(run, name)] for name in names}
    values = {name: {c.name: [c.of(*pair) for pair in pairs] for c in columns} for name, pairs in done.items()}
    rows = [[name, *(spread(values[name][c.name], c.form) for c in columns)] for name in names]
    if text:
        before = {split: [run["original"][split]["loss"] for run in runs] for split in ("validation", "test")}
        first = ["untouched", spread(before["validation"], "{:.4f}"), "-", spread(before["test"], "{:.4f}")]
        rows.insert(0, [*first, *["-"] * (len(columns) - 3)])
    metric, scale, form = ("loss", 1, "{:.4f}") if text else ("accuracy", 100, "{:.2f}")
    stages = [
        [
            name,
            stage["name"],
            spread([scale * s["metrics"][f"validation_{metric}"] for s in _stages(pairs, stage["name"])], form),
            spread([s["seconds"] for s in _stages(pairs, stage["name"])], "{:.0f}"),
            spread([s["host_growth_bytes"] / 1e6 for s in _stages(pairs, stage["name"])], "{:.0f}"),
            f"{stage['trainable_parameters'] / 1e6:.2f}",
        ]
        for name, pairs in done.items()
        if pairs
        for stage in pairs[0][1]["stages"]
    ]
    unit = "validation %" if scale == 100 else "validation loss"
    return harness.Report(
        title=f"{runs[0]['run']}, {len(runs)} seeds",
        settings={"runs": command},
        results={"regimes": values, "stages": stages, "environments": [run["environment"] for run in runs]},
        tables=[
            harness.Table("Regimes: mean (min to max over seeds)", ["regime", *(c.name for c in columns)], rows),
            harness.Table(
                f"Stages: validation {metric} on the stage's own path",
                ["regime", "stage", unit, "seconds", "host growth MB", "trained M"],
                stages,
            ),
        ],
        notes=list(notes),
    )


def _is_done(run: Json, name: str) -> bool:
    return run["regimes"].get(name, {}).get("status") in ("done", "reused")


def _stages(pairs: Sequence[tuple[Json, Json]], name: str) -> list[Json]:
    return [stage for _, regime in pairs for stage in regime["stages"] if stage["name"] == name]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
