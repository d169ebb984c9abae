"""What sharing saves: a sweep, and the same trials each as a run of its own with a store of its own.

Both as users start them, on Ray, with the same slots; independent runs one after the other, since each has all slots.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import yaml

from benchmarks import harness
from benchmarks.harness import Json, Report, Table

CONFIG = "configs/digits_sweep.yaml"
LIMIT_S = 360.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default=CONFIG, help="a file with a sweep section (%(default)s)")
    parser.add_argument("--repeats", type=int, help="rounds of both (3; quick 1)")


def run(options: argparse.Namespace) -> Report:
    repeats = options.repeats or (1 if options.quick else 3)
    overrides = ["training.epochs=1", "data.train_limit=256", "data.test_limit=128"] if options.quick else []
    with harness.workspace() as folder:
        rounds: list[Json] = []
        for index in range(repeats):
            harness.say(f"round {index + 1} of {repeats}")
            rounds.append(_round(options.config, overrides, folder / str(index)))
    return _report(rounds, {"config": options.config, "overrides": overrides})


def _round(config: str, overrides: list[str], folder: Path) -> Json:
    """The sweep, then its trials one by one."""
    run_dir = folder / "sweep"
    shared = _timed("orchestrator.run", config, f"run_dir={run_dir}", *overrides, "--quiet")
    summary = json.loads((run_dir / "sweep.json").read_text())
    alone = {}
    for trial in summary["trials"]:
        source = folder / f"{trial['name']}.yaml"
        own = folder / trial["name"]
        settings = yaml.safe_load((run_dir / trial["folder"] / "config.yaml").read_text())
        source.write_text(yaml.safe_dump({**settings, "run_dir": str(own), "store": str(own / "store")}))
        alone[trial["name"]] = _timed("orchestrator.run", str(source), "--quiet")
    return {"shared_s": shared, "alone_s": alone, "sharing": summary["sharing"], "trials": len(summary["trials"])}


def _timed(*arguments: str) -> float:
    started = time.monotonic()
    harness.python("-m", *arguments)
    return time.monotonic() - started


def _report(rounds: list[Json], settings: Json) -> Report:
    shared = harness.summary([item["shared_s"] for item in rounds])
    alone = harness.summary([sum(item["alone_s"].values()) for item in rounds])
    ratio = harness.summary([sum(item["alone_s"].values()) / item["shared_s"] for item in rounds])
    total, stages = rounds[-1]["sharing"]["total"], rounds[-1]["sharing"]["kinds"]["train"]
    rows = [
        ["trials", rounds[-1]["trials"], rounds[-1]["trials"]],
        ["stages", stages["run"], stages["asked"]],
        ["tasks", total["run"], total["asked"]],
        ["wall time (s)", harness.spread(shared), harness.spread(alone)],
    ]
    return Report(
        title="a sweep beside its trials as runs of their own",
        settings=settings,
        results={"rounds": rounds, "shared_s": shared, "alone_s": alone, "ratio": ratio},
        tables=[Table("What was run", ["", "the sweep", "independent runs"], rows)],
        targets=[
            (
                f"the digits sweep takes at most {LIMIT_S:.0f} s on 2 cores",
                f"{shared['median']:.0f} s",
                shared["median"] <= LIMIT_S if settings["config"] == CONFIG and not settings["overrides"] else None,
            ),
            ("stages are shared", f"{stages['run']} of {stages['asked']} run", stages["run"] < stages["asked"]),
        ],
        notes=[f"Independent runs take {harness.spread(ratio)} times as long, starting Ray for each included."],
    )
