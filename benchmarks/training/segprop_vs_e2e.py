"""A whole SegProp run beside an end-to-end run: same epochs a stage, same data, same worker, all cores.

Cases: `e2e`; `segprop` with snapshots (SnapCheck); `segprop, recompute` without (the frozen prefix runs again for
every batch); `lw`, layer-wise with snapshots. Each is an orchestrated run of its own with one slot. Measured from
the first stage's first step to the last commit: training, snapshots, validation, hand-overs, final scores; not
Ray's start and decoding the data set, which are the same for all.
"""

from __future__ import annotations

import argparse
import functools
from itertools import count
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Json, Report, Run, Table

LIMIT_RATIO = 1.25
DEFAULT_MODEL = "resnet50"
CASES = {
    "e2e": ("e2e", "always"),
    "segprop": ("segprop", "always"),
    "segprop, recompute": ("segprop", "never"),
    "lw": ("lw", "always"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_image_arguments(parser)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="resnet18, resnet34, resnet50, … (%(default)s)")
    parser.add_argument("--head-convs", type=int, default=1, help="convolutions in the head (%(default)s)")
    parser.add_argument("--rows", type=int, help="training images (1500; quick 320)")
    parser.add_argument("--size", type=int, default=16, help="side of the images (%(default)s)")
    parser.add_argument("--epochs", type=int, help="epochs a stage (12; quick 4)")
    parser.add_argument("--views", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument("--runner", choices=("ray", "local"), default="ray", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, help="rounds of e2e and segprop (2; quick 1)")
    parser.add_argument("--only-ratio", action="store_true", help="leave out recompute and lw")


def result_name(options: argparse.Namespace) -> str:
    """Other models do not replace the default one's figures."""
    model = "" if options.model == DEFAULT_MODEL else f"-{options.model}"
    return "segprop_vs_e2e" + model + ("" if options.device == "cpu" else f"-{options.device}")


def run(options: argparse.Namespace) -> Report:
    rows = options.rows or (320 if options.quick else 1500)
    epochs = options.epochs or (4 if options.quick else 12)
    repeats = options.repeats or (1 if options.quick else 2)
    with harness.workspace() as folder:
        config = _config(options, folder, rows=rows, epochs=epochs)
        numbers = count()

        def case(name: str) -> Json:
            regime, mode = CASES[name]
            own = {**config, "regimes": [regime], "snapshots": {"mode": mode}}
            found = harness.orchestrate(own, folder / f"run{next(numbers)}", template=folder / "template")
            return figures(found, regime)

        ratio_cases = {name: functools.partial(case, name) for name in ("e2e", "segprop")}
        results = harness.interleave(ratio_cases, repeats)
        if not options.only_ratio:
            # For comparison only: once each.
            others = {name: functools.partial(case, name) for name in ("segprop, recompute", "lw")}
            results |= harness.interleave(others, 1)
    settings = {
        "model": options.model,
        "head_convs": options.head_convs,
        "stem": config["model"]["stem"],
        "rows": rows,
        "size": options.size,
        "epochs": epochs,
        "views": options.views,
        "batch": options.batch,
        "images": config["data"]["name"],
        "device": options.device,
        "runner": options.runner,
        "threads": harness.cores(),
    }
    return _report(results, settings)


def _config(options: argparse.Namespace, folder: Path, *, rows: int, epochs: int) -> Json:
    return {
        "run": "segprop_vs_e2e",
        "model": {
            "name": options.model,
            "stem": "small" if options.size <= 64 else "imagenet",
            "head_convs": options.head_convs,
        },
        "data": {
            **harness.image_data(options, folder),
            "image_size": options.size,
            "augment": "light",
            "views": options.views,
            "train_limit": rows,
            "test_limit": max(100, rows // 4),
            "validation": max(100, rows // 8),
        },
        "training": {
            "epochs": epochs,
            "batch_size": options.batch,
            "optimizer": {"lr": 1e-3},
            "schedule": {"name": "cosine"},
            "precision": "bf16",
            "channels_last": True,
        },
        "resources": {**harness.single_slot(), "device": options.device, "runner": options.runner},
        "evaluation": {"stages": False},
    }


def figures(found: Run, regime: str) -> Json:
    """Seconds of a run by what they were spent on, and how often each frozen block ran."""
    start, end = found.window()
    trains, made, scored = (found.nodes(kind) for kind in ("train", "materialize", "evaluate"))
    stages = [_stage(node) for node in trains]
    parts = {
        "training": sum(stage["training"] for stage in stages),
        "validation": sum(stage["validation"] for stage in stages),
        "materialization": sum(node["result"]["seconds"] for node in made),
        "final scores": sum(node["result"]["seconds"] for node in scored),
    }
    whole = end - start
    summary = found.summary["regimes"][regime]
    return {
        "seconds": whole,
        "parts": {**parts, "rest": whole - sum(parts.values())},
        "stages": stages,
        "forwards": summary["forwards"],
        "snapshot": summary["snapshot"],
        "test_accuracy": summary["final"]["metrics"]["accuracy"],
    }


def _stage(node: Json) -> Json:
    result = node["result"]
    epochs = result["epochs"]
    return {
        "name": result["stage"],
        "training": sum(epoch["seconds"] for epoch in epochs),
        "validation": sum(epoch["validation_seconds"] for epoch in epochs),
        "images_per_s": sum(epoch["images_per_s"] for epoch in epochs) / len(epochs),
        "resident_bytes": result["resident_bytes"],
        "trainable_parameters": result["trainable_parameters"],
        "peak_device_bytes": result["peak_device_bytes"],
        "host_growth_bytes": result["peak_host_bytes"] - result["host_baseline_bytes"],
        "forwards": result["forwards"],
    }


def counted_ratio(settings: Json) -> float:
    """Operations of a SegProp run as a share of an end-to-end run's: every trained sample counts as three forward
    passes over its path, every snapshot as one over its block."""
    from workers.models.resnet.outline import resnet_outline as outline
    from workers.specs.experiment import ResNetSpec

    model = ResNetSpec(name=settings["model"], stem=settings["stem"], head_convs=settings["head_convs"])
    chain = outline(model, settings["size"], 10)
    blocks = [block.flops for block in chain.blocks]
    whole = sum(blocks) + chain.head.flops
    n = len(blocks)
    adapters = sum(chain.adapter(source, n).flops for source in range(1, n))
    trained = 3 * settings["epochs"] * (sum(blocks) + n * chain.head.flops + adapters)
    rolled = min(settings["views"], settings["epochs"]) * sum(blocks[:-1])
    return float((trained + rolled) / (3 * settings["epochs"] * whole))


def _report(results: dict[str, list[Json]], settings: Json) -> Report:
    seconds = {name: harness.summary(run["seconds"] for run in runs) for name, runs in results.items()}
    base = seconds["e2e"]["median"]
    ratio = harness.summary(
        ours["seconds"] / e2e["seconds"] for ours, e2e in zip(results["segprop"], results["e2e"], strict=True)
    )
    parts = list(results["e2e"][0]["parts"])
    forwards = {
        name: {block: f["per_sample_view"] for block, f in runs[0]["forwards"].items()}
        for name, runs in results.items()
    }
    passes = forwards["segprop"]
    counted = counted_ratio(settings)
    promise = f"SegProp with snapshots <= {LIMIT_RATIO} of E2E"
    return Report(
        title=f"a whole SegProp run of {settings['model']} beside an end-to-end run",
        settings=settings,
        results={"seconds": seconds, "ratio": ratio, "counted_ratio": counted, "forwards": forwards, "runs": results},
        tables=[
            Table(
                "Whole run, seconds",
                ("case", "seconds", "of e2e", *parts, "test accuracy"),
                [
                    (
                        name,
                        harness.spread(seconds[name]),
                        seconds[name]["median"] / base,
                        *(runs[-1]["parts"][part] for part in parts),
                        runs[-1]["test_accuracy"],
                    )
                    for name, runs in results.items()
                ],
            ),
            Table(
                "By stage, seconds (the last run of each case)",
                (
                    "case",
                    "stage",
                    "training",
                    "validation",
                    "images/s",
                    "weights held, MB",
                    "trained, M",
                    "peak on the device, MB",
                ),
                [
                    (
                        name,
                        stage["name"],
                        stage["training"],
                        stage["validation"],
                        stage["images_per_s"],
                        stage["resident_bytes"] / 1e6,
                        stage["trainable_parameters"] / 1e6,
                        stage["peak_device_bytes"] and stage["peak_device_bytes"] / 1e6,
                    )
                    for name, runs in results.items()
                    for stage in runs[-1]["stages"]
                ],
            ),
            Table(
                "Forward passes of each frozen block, samples",
                ("case", "block", "samples", "samples × views", "passes a sample and view"),
                [
                    (name, block, f["samples"], f["sample_views"], f["per_sample_view"])
                    for name, runs in results.items()
                    for block, f in runs[-1]["forwards"].items()
                ],
            ),
        ],
        targets=[
            (
                f"{promise} (views {settings['views']}, {settings['epochs']} epochs)",
                harness.spread(ratio),
                ratio["median"] <= LIMIT_RATIO,
            ),
            (
                "each frozen block runs forward once a sample and view",
                ", ".join(f"{block} {harness.text(times)}" for block, times in passes.items()),
                bool(passes) and all(times == 1 for times in passes.values()),
            ),
        ],
        notes=[
            f"Counting operations alone, SegProp needs {counted:.2f} of E2E here: the head and the adapters train in "
            "every stage. A wider head (`--head-convs`) or a shallower model raises that share.",
            "rest: from one node's end to the next one's start, building models and reading weights included.",
            "The ratio is the median of the rounds' ratios; parts and stages are those of the last run.",
        ],
    )
