"""How soon a stage has its first epoch behind it: its snapshot sets made before it, or while it trains.

One SegProp run a case, from the same configuration: `before` fills the sets on every slot and then trains; `overlap`
starts the stage at once. With two slots the second makes snapshots ahead of the stage; with one the stage makes its
own. Measured for each stage that reads snapshots from the commit of the stage before it to the end of its first epoch,
validation included; and for the whole run from the first step to the last commit. Both orders of an epoch are run:
`global`, where the first batch wants nearly every shard, and `window`, where it wants a few. Every epoch has a view of
its own, as many as are worth storing (the published configurations suggest four): `before` makes them all.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import count, pairwise
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Json, Report, Run, Table

LIMIT_SPARE = 1.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_image_arguments(parser)
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead of CIFAR-10")
    parser.add_argument("--rows", type=int, help="training images (6000; quick 600)")
    parser.add_argument("--epochs", type=int, help="epochs a stage (4; quick 2)")
    parser.add_argument("--views", type=int, default=4, help="augmentation views (%(default)s)")
    parser.add_argument("--size", type=int, default=16, help="side of the images (%(default)s)")
    parser.add_argument("--window", type=int, default=4, help="shards open at a time (%(default)s)")
    parser.add_argument("--repeats", type=int, help="rounds of all (3; quick 1)")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2], help="numbers of slots (%(default)s)")
    parser.add_argument(
        "--orders", nargs="+", default=["global", "window"], choices=["global", "window"], help="of an epoch"
    )


def run(options: argparse.Namespace) -> Report:
    rows = options.rows or (600 if options.quick else 6000)
    epochs = options.epochs or (2 if options.quick else 4)
    repeats = options.repeats or (1 if options.quick else 3)
    with harness.workspace() as folder:
        base = _config(options, folder, rows=rows, epochs=epochs)
        numbers = count()
        cases = {
            f"{slots} {'slot' if slots == 1 else 'slots'}, {order}, {production}": _settings(
                base, slots, order, production, options.window
            )
            for slots in options.slots
            for order in options.orders
            for production in ("before", "overlap")
        }

        def measure(config: Json) -> Json:
            return _measure(config, folder / f"run{next(numbers)}", folder / "template")

        results = harness.interleave(
            {name: partial(measure, config) for name, config in cases.items()},
            repeats,
        )
    settings = {"images": base["data"]["name"], "rows": rows, "epochs": epochs, "views": options.views}
    return _report(results, {**settings, "size": options.size, "window": options.window})


def _config(options: argparse.Namespace, folder: Path, *, rows: int, epochs: int) -> Json:
    return {
        "run": "production",
        "model": {"name": "resnet18", "stem": "small"},
        "data": {
            **harness.image_data(options, folder),
            "image_size": options.size,
            "augment": "light",
            "views": options.views,
            "train_limit": rows,
            "test_limit": max(100, rows // 6),
            "validation": max(100, rows // 6),
        },
        "training": {
            "epochs": epochs,
            "batch_size": 64,
            "optimizer": {"lr": 1e-3},
            "precision": "bf16",
            "channels_last": True,
        },
        "regimes": ["segprop"],
        # Some dozens of shards at the first boundary.
        "snapshots": {"mode": "always", "group_rows": 64, "shard_bytes": "4MiB"},
        "evaluation": {"stages": False},
    }


def _settings(base: Json, slots: int, order: str, production: str, window: int) -> Json:
    snapshots = {**base["snapshots"], "production": production, "shuffle": order, "window": window}
    threads = max(1, harness.cores() // slots)
    return {
        **base,
        "snapshots": snapshots,
        "resources": {"runner": "ray", "device": "cpu", "slots": slots, "threads": threads},
    }


def _measure(config: Json, folder: Path, template: Path) -> Json:
    found = harness.orchestrate(config, folder, template=template)
    start, end = found.window()
    stages = first_epochs(found)
    forwards = found.summary["regimes"]["segprop"]["forwards"]
    return {
        "first_epochs": stages,
        "first_epoch": sum(stages.values()),
        "waited": sum(node["result"].get("waited_s", 0.0) for node in found.nodes("train")),
        "seconds": end - start,
        "test_accuracy": found.summary["regimes"]["segprop"]["final"]["metrics"]["accuracy"],
        "forwards": max(block["per_sample_view"] for block in forwards.values()),
    }


def first_epochs(found: Run) -> dict[str, float]:
    """Stage -> seconds from the commit of the stage before it to the end of its first epoch."""
    result = {}
    for before, after in pairwise(found.nodes("train")):
        first = after["result"]["epochs"][0]
        ended = harness.first_step(after["result"]) + first["seconds"] + first["validation_seconds"]
        result[str(after["label"])] = ended - before["committed"]
    return result


def _report(runs: dict[str, list[Json]], settings: Json) -> Report:
    ratios, whole, same = {}, {}, []
    for name, found in runs.items():
        if not name.endswith("overlap"):
            continue
        case = name.removesuffix(", overlap")
        pairs = list(zip(runs[f"{case}, before"], found, strict=True))
        # Both of a round ran near each other: their ratio is what drift disturbs least.
        ratios[case] = harness.summary(before["first_epoch"] / after["first_epoch"] for before, after in pairs)
        whole[case] = harness.summary(before["seconds"] / after["seconds"] for before, after in pairs)
        same.append(len({run["test_accuracy"] for pair in pairs for run in pair}) == 1)
    once = max(run["forwards"] for found in runs.values() for run in found)
    return Report(
        title="snapshots made before a stage, and while it trains",
        settings=settings,
        results={"first_epoch_ratio": ratios, "whole_ratio": whole, "runs": runs},
        tables=[
            Table(
                "Commit of the stage before to the end of the first epoch, summed over the stages, seconds",
                ("", "first epochs", "waited for snapshots", "whole run", "test accuracy"),
                [
                    (
                        name,
                        harness.spread(harness.summary(run["first_epoch"] for run in found)),
                        harness.spread(harness.summary(run["waited"] for run in found)),
                        harness.spread(harness.summary(run["seconds"] for run in found)),
                        harness.spread(harness.summary(run["test_accuracy"] for run in found)),
                    )
                    for name, found in runs.items()
                ],
            ),
            Table(
                "How many times faster overlap is than before",
                ("", "first epochs", "whole run"),
                [(case, harness.spread(ratios[case]), harness.spread(whole[case])) for case in ratios],
            ),
        ],
        targets=[
            (
                f"first epoch >= {LIMIT_SPARE:g}x faster with one spare worker",
                harness.spread(ratios[case]) + f" ({case})",
                ratios[case]["median"] >= LIMIT_SPARE,
            )
            for case in ratios
            if case.startswith("2 ")
        ]
        + [
            (
                "riding along beats a pass of its own (one slot)",
                harness.spread(ratios[case]) + f" ({case})",
                ratios[case]["median"] >= 1,
            )
            for case in ratios
            if case.startswith("1 ")
        ]
        + [("each frozen block forward once a sample and view", harness.text(once), once == 1)],
        notes=[
            "`before` uses every slot for making snapshots too: it is the stronger baseline.",
            "The test accuracies of before and overlap are "
            + ("equal." if all(same) else "**not equal**: production has changed a result."),
        ],
    )
