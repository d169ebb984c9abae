"""Snapshots or recompute: do the policy's seconds come true, and is what it decides the faster way?

Every case runs one SegProp regime twice over the same store, its boundaries all stored and none stored, with
`snapshots.costs: measured`: what was predicted for each boundary stands beside what making, reading and recomputing
it took. Then the plan says what it would have chosen by itself, which has to be the faster of the two.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, Report, Table

#: How far a prediction may be off.
WITHIN = 0.25
#: Boundary costs below this many seconds are too short to be predicted, or to matter.
LEAST_S = 0.5
FIGURES = {"make_seconds": "always", "read_seconds": "always", "recompute_seconds": "never"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_image_arguments(parser)
    parser.add_argument("--repeats", type=int, help="(3; quick 1)")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="(all; quick: the quickstart and read-once)")


#: Name -> (configuration, overrides, overrides of --quick).
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "quickstart": ("quickstart.yaml", [], ["training.epochs=2", "data.train_limit=256"]),
    "lm_quickstart": ("lm_quickstart.yaml", [], []),
    "cifar_cpu": ("resnet18_cifar10_cpu.yaml", ["data.train_limit=5000", "training.epochs=3", "data.views=3"], []),
    # Every view is read once, and nothing is rolled forward: storing only adds writing and reading.
    "read-once": (
        "quickstart.yaml",
        ["data.image_size=32", "data.views=4", "training.epochs=4", "split.segment_size=3"],
        ["data.train_limit=256"],
    ),
    "read-often": (
        "quickstart.yaml",
        ["data.views=1", "training.epochs=8", "split.segment_size=3"],
        ["data.train_limit=256"],
    ),
}


def run(options: argparse.Namespace) -> Report:
    repeats = options.repeats or (1 if options.quick else 3)
    names = options.cases or (["quickstart", "read-once"] if options.quick else list(CASES))
    results: Json = {}
    with harness.workspace() as folder:
        for name in names:
            results[name] = _case(name, options, repeats, folder / name)
    rows, hits, chosen = [], [], []
    for name, found in results.items():
        for label, figures in found["boundaries"].items():
            for key, pair in figures.items():
                ratio = pair["measured"]["median"] / pair["predicted"]["median"]
                counts = pair["measured"]["median"] >= LEAST_S
                if counts:
                    hits.append(abs(ratio - 1) <= WITHIN)
                shown = harness.spread(pair["predicted"]), harness.spread(pair["measured"])
                rows.append((name, label, key.removesuffix("_seconds"), *shown, ratio, "" if counts else "too short"))
        chosen.append(
            (
                name,
                ", ".join(f"{label} {source}" for label, source in found["decided"].items()),
                *(harness.spread(found["seconds"][mode]) for mode in ("always", "never")),
                found["right"],
            )
        )
    right = [found["right"] for found in results.values() if found["right"] is not None]
    return Report(
        title="snapshots or recompute",
        settings={"repeats": repeats, "cases": ", ".join(names), "slots": 1, "threads": harness.cores()},
        results=results,
        tables=[
            Table(
                "Seconds of each boundary",
                ("case", "after", "to", "predicted", "measured", "measured / predicted", ""),
                rows,
            ),
            Table(
                "Seconds of the stages that start from a boundary and of its sets, everything stored and nothing",
                ("case", "decided", "stored", "recomputed", "the decided way is the faster one"),
                chosen,
            ),
        ],
        targets=[
            (
                f"predictions within {WITHIN:.0%}, of what takes {LEAST_S:g} s or more",
                f"{sum(hits)} of {len(hits)}",
                all(hits) if hits else None,
            ),
            (
                "where all boundaries are decided alike, the decided way is the faster one",
                f"{sum(right)} of {len(right)}",
                all(right) if right else None,
            ),
        ],
        notes=[
            "Reading counts the processor time of gathering and decoding, since it runs beside the steps; making and "
            "recomputing count wall time."
        ],
    )


def _case(name: str, options: argparse.Namespace, repeats: int, folder: Path) -> Json:
    config, overrides, quick = CASES[name]
    changes = [*overrides, *(quick if options.quick else []), *_images(name, options, folder)]
    changes += ["regimes=[segprop]", "snapshots.costs=measured", "evaluation.stages=false"]
    changes += [f"resources.{key}={value}" for key, value in harness.single_slot().items()]
    source = str(harness.ROOT / "configs" / config)
    runs = harness.interleave(
        {mode: functools.partial(_run, source, changes, mode, folder / mode) for mode in ("always", "never")}, repeats
    )
    boundaries: dict[str, Json] = {}
    for index, first in enumerate(runs["always"][0]["boundaries"]):
        boundaries[first["label"]] = {
            key: {
                side: harness.summary(found["boundaries"][index][side][key] for found in runs[mode])
                for side in ("predicted", "measured")
            }
            for key, mode in FIGURES.items()
        }
    seconds = {mode: harness.summary(found["seconds"] for found in runs[mode]) for mode in runs}
    decided = runs["always"][-1]["decided"]
    faster = min(seconds, key=lambda mode: seconds[mode]["median"])
    sources = set(decided.values())
    wanted = {"snapshots": "always", "recompute": "never"}
    right = None if len(sources) > 1 else wanted[sources.pop()] == faster
    return {"boundaries": boundaries, "seconds": seconds, "decided": decided, "right": right}


def _images(name: str, options: argparse.Namespace, folder: Path) -> Iterable[str]:
    if name != "cifar_cpu":
        return []
    found = harness.image_data(options, folder)
    changes = [f"data.name={found['name']}", f"data.path={json.dumps(found['path'])}"]
    return changes if found["name"] == "cifar10" else [*changes, "data.train_limit=null", "data.validation=0.1"]


def _run(source: str, changes: list[str], mode: str, folder: Path) -> Json:
    """One run in a store of its own, with its own measurement."""
    shutil.rmtree(folder, ignore_errors=True)
    arguments = [source, *changes, f"run_dir={folder}"]
    harness.python("-m", "orchestrator.run", *arguments, f"snapshots.mode={mode}", "--quiet")
    summary = json.loads((folder / "summary.json").read_text())
    plan = json.loads(harness.python("-m", "orchestrator.cli", "plan", *arguments, "--json").stdout)["plan"]
    boundaries = plan["regimes"]["segprop"]["boundaries"]
    regime = summary["regimes"]["segprop"]
    stages = sum(stage["seconds"] for stage in regime["stages"] if stage["source"] != "images")
    sets = sum(item["seconds"] for item in regime["snapshots"])
    found: dict[str, Any] = {
        "boundaries": regime["boundaries"],
        "seconds": stages + sets,
        "decided": {item["label"]: item["source"] for item in boundaries},
    }
    shutil.rmtree(folder / "store", ignore_errors=True)
    return found
