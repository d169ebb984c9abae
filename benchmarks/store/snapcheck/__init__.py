"""SnapCheck beside the hardware and beside others: every row of its table of speed, on real activations.

Sets of `--bytes` (1.5 GB; quick 96 MB) of SmolLM2's hidden states (ragged samples of 576 bfloat16 a token) and of a
ResNet-18's maps over CIFAR-10. Cases are taken in turns; ratios are medians of the ratios within a round; every
comparison runs our own case twice, and the two against each other are its control. XXH3-128 of every shard is part of
each figure: in a first epoch it is computed, in later ones of the same process it has been. One thread, as a loader
beside a step has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, Report, Table

GROUPS = ("local", "scaling", "stage", "objects", "others")
#: What is promised: row, comparison, against, at least.
TARGETS = (
    ("warm, shuffled within shards", "within", "preadv", 1.0),
    ("warm, shuffled within shards", "within", "preadv of each sample", 1.0),
    ("warm, shuffled within shards", "within", "memcpy", 0.7),
    ("warm, shuffled globally", "global", "gather from memory", 0.8),
    ("cold", "cold", "preadv", 0.9),
    ("write + fsync", "write", "write", 0.9),
    ("S3 server on loopback, 4 ranges", "objects", "obstore, 4 ranges", 0.9),
    ("the same samples", "others", "litdata", 5.0),
    ("the same samples", "others", "streaming", 2.0),
    ("the same samples", "others", "datasets", 5.0),
    ("the same samples", "others", "webdataset", 5.0),
)
FLAT = 2.0
SLOWER = 1.03


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_image_arguments(parser)
    parser.add_argument("--bytes", type=int, help="size of each set (1,500,000,000; quick 96,000,000)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the stage's step (%(default)s)")
    parser.add_argument("--repeats", type=int, help="rounds (7; quick 3)")
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=GROUPS, help="parts of it (all)")
    parser.add_argument("--folder", type=Path, help="where the sets lie (a temporary folder); its disk is measured")


def result_name(options: argparse.Namespace) -> str:
    return "snapcheck" if options.device == "cpu" else "snapcheck-cuda"


def run(options: argparse.Namespace) -> Report:
    size = options.bytes or (96_000_000 if options.quick else 1_500_000_000)
    rounds = options.repeats or (3 if options.quick else 7)
    results: Json = {}
    with harness.workspace() as temporary:
        folder = options.folder or temporary
        for kind, activations in _kinds(options, size, folder).items():
            results[kind] = _measured(kind, activations(), options, folder / kind, rounds)
        if "scaling" in options.only:
            quick = ["--quick"] if options.quick else []
            limit = min(128 << 20, size // 10)
            scaling = ("-m", "benchmarks.store.snapcheck.scaling")
            results["flatness"] = harness.child(*scaling, "flatness", *quick)
            results["memory"] = harness.child(*scaling, "memory", "--limit", str(limit))
    return _report(results, size, rounds)


def _kinds(options: argparse.Namespace, size: int, folder: Path) -> dict[str, Callable[[], Any]]:
    from benchmarks.store.snapcheck import activations

    if set(options.only) <= {"scaling"}:
        return {}
    return {
        "states": lambda: activations.smollm2(size, folder, quick=options.quick),
        "maps": lambda: activations.resnet(size, folder, options, quick=options.quick),
    }


def _measured(kind: str, activations: Any, options: argparse.Namespace, folder: Path, rounds: int) -> Json:
    from benchmarks.store.snapcheck import objects, others, reading, stage

    harness.say(f"{kind}: {activations.name}, {activations.samples:,} samples, {activations.bytes:,} bytes")
    on_disk = reading.Reading(activations, folder)
    found: Json = {"what": activations.name, "samples": activations.samples, "bytes": activations.bytes}
    if "local" in options.only:
        found |= reading.measure(on_disk, rounds)
    if "objects" in options.only:
        found["objects"] = objects.measure(on_disk, folder, rounds)
    if "others" in options.only:
        found["others"] = others.measure(on_disk, folder, rounds)
    if "stage" in options.only:
        found["stage"] = stage.measure(on_disk, kind, rounds, options.device)
    return found


def _report(results: Json, size: int, rounds: int) -> Report:
    kinds = {kind: found for kind, found in results.items() if kind in ("states", "maps")}
    return Report(
        title="SnapCheck's speed",
        settings={"bytes": size, "repeats": rounds, "threads": 1},
        results=results,
        tables=[
            *(table for table in (_table(kind, found) for kind, found in kinds.items()) if table.rows),
            *_stage_tables(kinds),
            *_scaling_tables(results),
        ],
        targets=_targets(kinds, results),
        notes=_notes(kinds),
    )


def _table(kind: str, found: Json) -> Table:
    rows = []
    for name, comparison in found.items():
        if not isinstance(comparison, dict):
            continue
        for case, figures in comparison.items():
            if isinstance(figures, dict) and "gb_per_s" in figures:
                rows.append((name, case, harness.spread(figures["gb_per_s"]), harness.spread(figures["ours_is"])))
    return Table(f"{kind}: {found['what']}", ("comparison", "case", "GB/s", "ours is … times that"), rows)


def _stage_tables(kinds: Json) -> list[Table]:
    rows = [
        (kind, case, 1000 * seconds["median"], found["stage"]["batch_bytes"] / 1e6)
        for kind, found in kinds.items()
        for case, seconds in found.get("stage", {}).get("seconds_per_step", {}).items()
    ]
    return (
        [Table("A step of a stage, by where its batch comes from", ("set", "from", "ms", "batch, MB"), rows)]
        if rows
        else []
    )


def _scaling_tables(results: Json) -> list[Table]:
    tables = []
    if "flatness" in results:
        costs_of = [
            (f"{count:,} {what}" if isinstance(count, int) else f"{int(count):,} {what}", cost["first"], cost["later"])
            for what, costs in results["flatness"].items()
            for count, cost in costs.items()
        ]
        tables.append(Table("A sample of 4 KiB, globally shuffled", ("set", "first epoch, µs", "later, µs"), costs_of))
    if "memory" in results:
        rows = [
            (name, found["limit"] / 1e6, found["private"] / 1e6, found["mapped"] / 1e6)
            for name, found in results["memory"].items()
        ]
        header = ("store", "limit, MB", "private growth, MB", "mapped growth, MB")
        tables.append(Table("Reading ten times the limit by windows", header, rows))
    return tables


def _targets(kinds: Json, results: Json) -> list[tuple[str, str, bool | None]]:
    targets: list[tuple[str, str, bool | None]] = []
    for row, comparison, against, least in TARGETS:
        for kind, found in kinds.items():
            promise = f"{row}: at least {least:g}x {against} ({kind})"
            figures = found.get(comparison, {}).get(against)
            if not figures or "ours_is" not in figures:
                targets.append((promise, "-", None))
                continue
            ratio = figures["ours_is"]["median"]
            targets.append((promise, f"{ratio:.2f}x", ratio >= least))
    for kind, found in kinds.items():
        promise = f"a stage step at most 3% slower than from memory ({kind})"
        ratio = found.get("stage", {}).get("ratio")
        targets.append(
            (promise, f"{ratio['median']:.3f}x" if ratio else "-", ratio["median"] <= SLOWER if ratio else None)
        )
    for what, costs in results.get("flatness", {}).items():
        later = [cost["later"] for cost in costs.values()]
        spread = max(later) / min(later)
        targets.append((f"cost of a sample flat in {what} (within {FLAT:g}x)", f"{spread:.2f}x", spread <= FLAT))
    for name, found in results.get("memory", {}).items():
        # A shard that is being read, and one whose pages are on their way out, come on top.
        held = max(found["private"], found["mapped"])
        promise = f"memory of the reader within its limit and a quarter ({name}, set of ten times that)"
        targets.append((promise, f"{held / found['limit']:.2f}x", held <= 1.25 * found["limit"]))
    return targets


def _notes(kinds: Json) -> list[str]:
    notes = ["First epoch while producers run: see the benchmark of production."]
    for kind, found in kinds.items():
        for part in ("objects", "others", "stage"):
            for case, figures in found.get(part, {}).items():
                if isinstance(figures, str):
                    notes.append(f"{kind}, {part}, {case}: {figures}")
    return notes
