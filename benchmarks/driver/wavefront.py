"""A wave of overlapping stages beside the same stages one after the other: time on the clock and final quality.

The same network, data, seeds and epochs a stage, on the same number of workers (a chain of stages can use more than one
for its snapshots alone). Two figures of speed are kept apart:

- measured: seconds on the clock from the first step to the last commit, on this machine's cores. With more workers than
  cores they take each other's time, so only the counts of workers that the machine has cores for are called measured;
- computed: the seconds that every node took on one worker, put into the order in which the driver would hand the nodes
  out to that many workers that do not disturb each other; and the longest chain of nodes that wait for each other,
  below which no number of workers gets.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, Report, Run, Table

KINDS = ("train", "materialize", "average")
#: A small random Llama, as configs/lm_quickstart.yaml.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 512,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_image_arguments(parser)
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead of CIFAR-10")
    parser.add_argument("--lm", action="store_true", help="a small random Llama on Python's own source")
    parser.add_argument("--intermediate", choices=("omit", "frozen"), default="omit", help="(%(default)s)")
    parser.add_argument("--rows", type=int, help="training samples (2000; digits 1293, lm 1280; quick 320)")
    parser.add_argument("--size", type=int, default=16, help="side of the images (%(default)s)")
    parser.add_argument("--epochs", type=int, help="epochs a stage (8; quick 4)")
    parser.add_argument("--views", type=int, default=4, help="of images (%(default)s)")
    parser.add_argument("--batch", type=int, help="(images 64, lm 16)")
    parser.add_argument("--rounds", type=int, help="rounds of a stage (8; quick 4)")
    parser.add_argument("--average-every", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--final-epochs", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", help="workers of the wave (as many as there are cores)")
    parser.add_argument("--computed", type=int, nargs="+", default=[2, 4], help="workers to compute for (%(default)s)")
    parser.add_argument("--seeds", type=int, help="seeds, one round of runs each (3; quick 1)")


def result_name(options: argparse.Namespace) -> str:
    kind = "-lm" if options.lm else "-digits" if options.digits else ""
    return f"wavefront{kind}" + ("-frozen" if options.intermediate == "frozen" else "")


def run(options: argparse.Namespace) -> Report:
    quick = options.quick
    rounds = options.rounds or (4 if quick else 8)
    epochs = options.epochs or (4 if quick else 8)
    seeds = options.seeds or (1 if quick else 3)
    workers = options.workers or [harness.cores()]
    with harness.workspace() as folder:
        numbers = count()
        config = _config(options, folder, epochs=epochs, rounds=rounds)

        def case(pipeline: str, slots: int) -> Json:
            number = next(numbers)
            own = {
                **config,
                # Every round of cases has a seed of its own; data are decoded alike.
                "seed": number // len(cases),
                "pipeline": pipeline,
                "resources": {"runner": "ray", "device": "cpu", "slots": slots, "threads": 1},
            }
            here = folder / f"run{number}"
            return figures(harness.orchestrate(own, here), here / "config.yaml", options.computed)

        cases = {
            _name(pipeline, slots): functools.partial(case, pipeline, slots)
            for slots in sorted({1, *workers})
            for pipeline in ("sequential", "wavefront")
        }
        results = harness.interleave(cases, seeds)
    settings = {
        "input": config["data"]["name"],
        "rows": config["data"]["train_limit"],
        "intermediate": options.intermediate,
        "epochs": epochs,
        "rounds": rounds,
        "average_every": options.average_every,
        "final_epochs": options.final_epochs,
        "batch": config["training"]["batch_size"],
        "views": config["data"].get("views", 1),
        "threads": 1,
        "cores": harness.cores(),
        "seeds": seeds,
    }
    return _report(results, settings)


def _config(options: argparse.Namespace, folder: Path, *, epochs: int, rounds: int) -> Json:
    quick = options.quick
    training: Json = {
        "epochs": epochs,
        "batch_size": options.batch or (16 if options.lm else 64),
        "optimizer": {"lr": 3e-3 if options.lm else 1e-3},
        "schedule": {"name": "linear" if options.lm else "cosine", "warmup": 0.05},
        "checkpoint_every_s": 600.0,
    }
    if options.lm:
        own: Json = {
            "model": {"family": "causal_lm", "tokenizer": "bytes", "config": LLAMA},
            "data": {
                "name": "stdlib",
                "sequence_length": 128,
                "train_limit": options.rows or (320 if quick else 1280),
                "validation_limit": 64,
                "test_limit": 128,
            },
            "split": {"base": 2, "head": 1, "intermediate": options.intermediate},
            "training": {**training, "clip": 1.0},
        }
    else:
        rows = options.rows or (320 if quick else 1293 if options.digits else 2000)
        own = {
            "model": {"name": "resnet18", "stem": "small"},
            "data": {
                **harness.image_data(options, folder),
                "image_size": options.size,
                "augment": "light",
                "views": options.views,
                "train_limit": rows,
                "validation": 144 if options.digits else max(100, rows // 8),
                "test_limit": 360 if options.digits else max(100, rows // 2),
            },
            "split": {"intermediate": options.intermediate},
            "training": {**training, "precision": "bf16", "channels_last": True},
        }
    return {
        "run": "wavefront",
        **own,
        "wavefront": {
            "rounds": rounds,
            "average_every": options.average_every,
            "final_epochs": options.final_epochs,
        },
        "regimes": ["segprop"],
        "evaluation": {"stages": False},
    }


def _name(pipeline: str, workers: int) -> str:
    return f"{pipeline}, {workers} worker{'s' if workers > 1 else ''}"


def figures(found: Run, config: Path, computed: list[int]) -> Json:
    """Clock, work and quality of one run."""
    from orchestrator.plan import makespan
    from orchestrator.runs.prepare import prepare

    start, end = found.window()
    regime = found.summary["regimes"]["segprop"]
    measured = found.nodes(*KINDS)
    seconds = {node["node"]: _taken(node["result"]) for node in measured}
    nodes = [node for node in prepare(config).plan.nodes if node.id in seconds]
    return {
        "clock_s": end - start,
        "work_s": sum(seconds.values()),
        "by_kind_s": {kind: sum(seconds[node["node"]] for node in measured if node["kind"] == kind) for kind in KINDS},
        "longest_chain_s": makespan.critical_path_s(nodes, seconds),
        "computed_s": {str(slots): makespan.makespan_s(nodes, seconds, slots) for slots in computed},
        "metrics": regime["final"]["metrics"],
        "validation": regime["final"]["validation"],
    }


def _taken(result: Mapping[str, Any]) -> float:
    """From the start to the end of a task, building and saving included."""
    return float(result["where"]["finished"] - result["where"]["started"])


def _report(results: Mapping[str, list[Json]], settings: Json) -> Report:
    metric = "loss" if settings["input"] == "stdlib" else "accuracy"
    rows = []
    for name, runs in results.items():
        pipeline, workers = name.split(", ")
        same = results[_name("sequential", int(workers.split()[0]))]
        enough = int(workers.split()[0]) <= settings["cores"]
        rows.append(
            (
                name,
                _spread(run["clock_s"] for run in runs),
                "" if pipeline == "sequential" else _ratios(same, runs, lambda run: run["clock_s"]),
                "yes" if enough else f"no, {settings['cores']} cores: not a measurement of so many workers",
                _spread(run["work_s"] for run in runs),
                _spread(run["metrics"][metric] for run in runs),
            )
        )
    plain, wave = results[_name("sequential", 1)], results[_name("wavefront", 1)]
    choices: list[tuple[str, Callable[[Json], float]]] = [
        (f"{slots} workers", functools.partial(_computed_on, slots)) for slots in wave[0]["computed_s"]
    ]
    choices.append(("as many as one likes", lambda run: run["longest_chain_s"]))
    computed = [
        (name, _spread(map(of, plain)), _spread(map(of, wave)), _ratios(plain, wave, of)) for name, of in choices
    ]
    kinds = [(kind, *(_spread(run["by_kind_s"][kind] for run in runs) for runs in (plain, wave))) for kind in KINDS]
    return Report(
        "overlapping stages beside stages one after the other",
        settings,
        {"runs": dict(results)},
        [
            Table(
                "Measured",
                ("", "seconds on the clock", "speed-up", "a core each", "seconds of work", f"test {metric}"),
                rows,
            ),
            Table(
                "Computed from the seconds that every node took on one worker",
                ("workers", "sequential, seconds", "wavefront, seconds", "speed-up"),
                computed,
            ),
            Table("Seconds of work by kind, one worker", ("", "sequential", "wavefront"), kinds),
        ],
        notes=[
            "Every round of runs has a seed of its own; speed-ups are ratios within a round, on as many workers.",
            "Computed figures suppose workers that do not disturb each other, with no time between nodes.",
        ],
    )


def _spread(values: Iterable[float]) -> str:
    return harness.spread(harness.summary(values))


def _computed_on(slots: str, run: Json) -> float:
    return float(run["computed_s"][slots])


def _ratios(base: Sequence[Json], runs: Sequence[Json], of: Callable[[Json], float]) -> str:
    return _spread(of(first) / of(own) for first, own in zip(base, runs, strict=True))
