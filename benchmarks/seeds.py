"""Several finished runs of one configuration, different seeds, as one table: `python -m benchmarks.seeds NAME RUN…`.

Reads each run's summary.json; writes benchmarks/results/NAME.{json,md}. Spread is min to max over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness

Regime = dict[str, Any]


def spread(values: Sequence[float], form: str) -> str:
    """Mean (min to max)."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(statistics.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


COLUMNS: dict[str, tuple[Callable[[Regime], float], str]] = {
    "test accuracy %": (lambda r: 100 * r["final"]["metrics"]["accuracy"], "{:.2f}"),
    "test loss": (lambda r: r["final"]["metrics"]["loss"], "{:.3f}"),
    "training + snapshots s": (lambda r: r["seconds"], "{:.0f}"),
    "of it snapshots s": (lambda r: r["seconds_by_kind"].get("materialize", 0.0), "{:.0f}"),
    "largest stage, host growth MB": (lambda r: r["host_growth_bytes"] / 1e6, "{:.0f}"),
    "largest stage, trained parameters M": (lambda r: r["trainable_parameters"] / 1e6, "{:.2f}"),
    "snapshots written GB": (lambda r: r["snapshot"]["bytes_written"] / 1e9, "{:.2f}"),
    "snapshots read GB": (lambda r: r["snapshot"]["bytes_read"] / 1e9, "{:.2f}"),
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.seeds", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--command", required=True, help="how each run was started, for the record")
    parser.add_argument("--note", action="append", default=[], help="what a reader has to know")
    options = parser.parse_args(arguments)
    summaries = [json.loads((run / "summary.json").read_text()) for run in options.runs]
    regimes = list(summaries[0]["regimes"])
    values = {
        name: {column: [value(s["regimes"][name]) for s in summaries] for column, (value, _) in COLUMNS.items()}
        for name in regimes
    }
    rows = [[name, *(spread(values[name][column], form) for column, (_, form) in COLUMNS.items())] for name in regimes]
    stages = [
        [
            name,
            stage["name"],
            spread(
                [100 * _stage(s, name, stage["name"])["metrics"]["validation_accuracy"] for s in summaries], "{:.2f}"
            ),
            spread([_stage(s, name, stage["name"])["seconds"] for s in summaries], "{:.0f}"),
            f"{stage['trainable_parameters'] / 1e6:.2f}",
        ]
        for name in regimes
        for stage in summaries[0]["regimes"][name]["stages"]
    ]
    report = harness.Report(
        title=f"{summaries[0]['run']}, {len(summaries)} seeds",
        settings={"runs": options.command},
        results={"regimes": values, "stages": stages, "environments": [s["environment"] for s in summaries]},
        tables=[
            harness.Table("Regimes: mean (min to max over seeds)", ["regime", *COLUMNS], rows),
            harness.Table(
                "Stages: validation accuracy on the stage's own path",
                ["regime", "stage", "validation %", "seconds", "trained M"],
                stages,
            ),
        ],
        notes=options.note,
    )
    context = harness.context(["seeds", options.name])
    harness.write(report, options.name, context, harness.RESULTS)
    print(harness.markdown(report, options.name, context))
    return 0


def _stage(summary: dict[str, Any], regime: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(s for s in summary["regimes"][regime]["stages"] if s["name"] == name)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
