"""What the orchestrator costs: SegProp's stages run by it on Ray, and by hand in a plain PyTorch loop.

Both run the same stages over the same batches with the same number of threads: `benchmarks/training/plain_loop.py` in
one process with everything in memory, the orchestrated run with one slot and its store on disk. Measured from the
first step of the first stage to the last commit; Ray's start and decoding the data set come before. Between two
stages lies the hand-over: from one stage's commit to the next one's first step, with and without the time in
which snapshots were computed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from itertools import count, pairwise
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Json, Report, Run, Table

LIMIT_RATIO, LIMIT_HANDOVER_S = 1.03, 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_image_arguments(parser)
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead of CIFAR-10")
    parser.add_argument("--rows", type=int, help="training images (6000; quick 600)")
    parser.add_argument("--epochs", type=int, help="epochs a stage (4; quick 2)")
    parser.add_argument("--size", type=int, default=16, help="side of the images (%(default)s)")
    parser.add_argument("--repeats", type=int, help="rounds of both (3; quick 1)")
    parser.add_argument(
        "--threads",
        type=int,
        default=harness.cores(),
        help="of both; fewer than the cores leaves Ray one (%(default)s)",
    )


def run(options: argparse.Namespace) -> Report:
    rows = options.rows or (600 if options.quick else 6000)
    epochs = options.epochs or (2 if options.quick else 4)
    repeats = options.repeats or (1 if options.quick else 3)
    with harness.workspace() as folder:
        config = _config(options, folder, rows=rows, epochs=epochs)
        numbers = count()
        results = harness.interleave(
            {
                "plain": lambda: _plain(config, folder / f"plain{next(numbers)}"),
                "orchestrated": lambda: _orchestrated(config, folder / f"ray{next(numbers)}", folder / "template"),
            },
            repeats,
        )
    return _report(
        results,
        {
            "images": config["data"]["name"],
            "rows": rows,
            "epochs": epochs,
            "size": options.size,
            "threads": options.threads,
        },
    )


def _config(options: argparse.Namespace, folder: Path, *, rows: int, epochs: int) -> Json:
    return {
        "run": "overhead",
        "model": {"name": "resnet18", "stem": "small"},
        "data": {
            **harness.image_data(options, folder),
            "image_size": options.size,
            "augment": "light",
            "views": 2,
            "train_limit": rows,
            "test_limit": max(100, rows // 6),
            "validation": max(100, rows // 6),
        },
        "training": {
            "epochs": epochs,
            "batch_size": 64,
            "optimizer": {"lr": 1e-3},
            "schedule": {"name": "cosine"},
            "precision": "bf16",
            "channels_last": True,
        },
        "regimes": ["segprop"],
        "snapshots": {"mode": "always"},
        "resources": {**harness.single_slot(), "threads": options.threads},
        "evaluation": {"stages": False},
    }


def _plain(config: Json, folder: Path) -> Json:
    from orchestrator.runs.prepare import prepare
    from workers.specs.experiment import ImageSpec

    folder.mkdir()
    source = folder / "config.yaml"
    source.write_text(json.dumps({**config, "run_dir": str(folder / "run")}))
    prepared = prepare(source)
    # The experiment as the workers get it, so that nothing is spelt out twice.
    task = next(node.task for node in prepared.plan.nodes if node.kind == "train")
    data = next(node.task["data"] for node in prepared.plan.nodes if node.kind == "data")
    regime = prepared.config.regime("segprop")
    assert isinstance(prepared.config.data, ImageSpec)
    settings = {
        "experiment": task["experiment"],
        "data": data,
        "threads": config["resources"]["threads"],
        "epochs": regime.training.epochs,
        "batch_size": regime.training.batch_size,
        "lr": regime.training.optimizer.lr,
        "views": prepared.config.data.views,
        "group_rows": regime.group_rows,
        "eval": prepared.config.evaluation_batch,
        "stages": [node.task["name"] for node in prepared.plan.nodes if node.kind == "train"],
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    found = harness.child("-m", "benchmarks.training.plain_loop", str(folder / "settings.json"))
    stages = [stage["seconds"] for stage in found["stages"]]
    return {
        "seconds": found["finished"] - found["first_step"],
        "training": sum(stages),
        "stages": stages,
        "test_accuracy": found["scores"]["test"][0],
    }


def _orchestrated(config: Json, folder: Path, template: Path) -> Json:
    found = harness.orchestrate(config, folder, template=template)
    start, end = found.window()
    trains = found.nodes("train")
    made = found.nodes("materialize")
    return {
        "seconds": end - start,
        "training": sum(node["result"]["seconds"] for node in trains),
        "stages": [node["result"]["seconds"] for node in trains],
        "materialization": sum(node["result"]["seconds"] for node in made),
        "process_seconds": found.seconds,
        "handovers": [dataclasses.asdict(item) for item in handovers(found)],
        "test_accuracy": found.summary["regimes"]["segprop"]["final"]["metrics"]["accuracy"],
    }


@dataclasses.dataclass(frozen=True)
class Handover:
    """Seconds from one stage's commit to the next one's first step."""

    label: str
    total: float
    #: Spent inside the materialize nodes between the two.
    computing: float
    nodes: int

    @property
    def idle(self) -> float:
        return self.total - self.computing


def handovers(found: Run) -> list[Handover]:
    """Between consecutive stages of a run with one slot."""
    result = []
    for before, after in pairwise(found.nodes("train")):
        start, stop = before["committed"], harness.first_step(after["result"])
        between = [node for node in found.nodes("materialize") if start <= node["result"]["where"]["finished"] <= stop]
        computing = sum(node["result"]["seconds"] for node in between)
        result.append(Handover(after["label"], stop - start, computing, len(between)))
    return result


def _same(runs: dict[str, list[Json]]) -> bool:
    return len({run["test_accuracy"] for found in runs.values() for run in found}) == 1


def _report(runs: dict[str, list[Json]], settings: Json) -> Report:
    totals = {name: harness.summary(run["seconds"] for run in found) for name, found in runs.items()}
    # Both of a round ran next to each other: their ratio is what drift disturbs least.
    ratio = harness.summary(
        ours["seconds"] / plain["seconds"] for ours, plain in zip(runs["orchestrated"], runs["plain"], strict=True)
    )
    training = harness.summary(
        ours["training"] / plain["training"] for ours, plain in zip(runs["orchestrated"], runs["plain"], strict=True)
    )
    gaps = [item for run in runs["orchestrated"] for item in run["handovers"]]
    # Per node, so that a stage that waits for more snapshot sets is not blamed for their number.
    idle = harness.summary(item["total"] - item["computing"] for item in gaps)
    total = harness.summary(item["total"] for item in gaps)
    longest = harness.text(totals["orchestrated"]["median"])
    return Report(
        title="an orchestrated run beside a plain PyTorch loop",
        settings={**settings, "slots": 1},
        results={"seconds": totals, "ratio": ratio, "training_ratio": training, "idle": idle, "runs": runs},
        tables=[
            Table(
                "First step to last commit, seconds",
                ("", "seconds", "training alone", "materialization", "test accuracy"),
                [
                    (
                        name,
                        harness.spread(totals[name]),
                        harness.spread(harness.summary(run["training"] for run in found)),
                        harness.spread(harness.summary(run["materialization"] for run in found))
                        if "materialization" in found[0]
                        else None,
                        harness.spread(harness.summary(run["test_accuracy"] for run in found)),
                    )
                    for name, found in runs.items()
                ],
            ),
            Table(
                "From one stage's commit to the next one's first step, seconds",
                ("next stage", "whole", "computing snapshots", "without that", "snapshot sets"),
                [
                    (g["label"], g["total"], g["computing"], g["total"] - g["computing"], g["nodes"])
                    for g in runs["orchestrated"][-1]["handovers"]
                ],
            ),
        ],
        targets=[
            (
                f"orchestrated <= {LIMIT_RATIO:.2f} of plain over ten minutes",
                f"{harness.spread(ratio)} over {longest} s; the training alone {harness.spread(training)}",
                ratio["median"] <= LIMIT_RATIO,
            ),
            (
                f"commit to next first step <= {LIMIT_HANDOVER_S:g} s without computing snapshots",
                f"{harness.spread(idle)} s; with it {harness.spread(total)} s",
                idle["median"] <= LIMIT_HANDOVER_S,
            ),
        ],
        notes=[
            "plain: one process, `benchmarks/training/plain_loop.py`; orchestrated: Ray, one slot with all cores, "
            "snapshots on disk. Both augment every batch anew, roll every view forward once, validate every epoch, "
            "keep the best epoch, save each stage's weights and score the final model twice.",
            "Same work: the test accuracies of both are "
            + ("equal." if _same(runs) else "**not equal**: one of them does not do what the other does."),
        ],
    )
