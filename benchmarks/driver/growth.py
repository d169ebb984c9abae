"""How the driver's work grows: plans of a thousand to a hundred thousand nodes, sweeps of ten to a thousand trials,
stores of a thousand to a million files.

Real planner, driver, sweep and survey; workers are made up, and their tasks are over at once (`driver_scale`). Each
case is a process of its own. The exponent is that of processor seconds over size between the last two sizes: 1 is work
in proportion. Smaller sizes are mostly start-up, and would flatter a fit over all.

    plan      build_plan of 64 SegProp chains with so many views that there are about so many nodes
    dispatch  that plan worked off on `--devices` made-up devices: ready queue, log, progress, commits, releases
    ledger    reading its commits, as a driver does that starts again
    record    writing and reading the plan's record in the store
    sweep     so many trials, each judged after every stage, on the same devices
    survey    sorting so many files of a store and choosing what nobody needs (`segprop cache ls`, `gc`)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.driver import driver_scale
from benchmarks.harness import Json, Report, Table

CHAINS = 64
#: Sizes of each case, and the exponent that is promised, if one is.
SIZES: Mapping[str, Sequence[int]] = {
    "plan": (1_000, 10_000, 100_000),
    "dispatch": (1_000, 10_000, 100_000),
    "ledger": (1_000, 10_000, 100_000),
    "record": (1_000, 10_000, 100_000),
    "sweep": (10, 100, 1_000),
    "survey": (10_000, 100_000, 1_000_000),
}
TARGET = 1.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=int, default=512, help="made-up devices (%(default)s)")
    parser.add_argument("--repeats", type=int, help="(3; quick 1)")


def run(options: argparse.Namespace) -> Report:
    repeats = options.repeats or (1 if options.quick else 3)
    sizes = {name: found[:-1] if options.quick else found for name, found in SIZES.items()}

    def case(name: str, size: int) -> Any:
        return lambda: harness.child("-m", "benchmarks.driver.growth", name, str(size), str(options.devices))

    cases = {f"{name} {size}": case(name, size) for name, each in sizes.items() for size in each}
    return report(harness.interleave(cases, repeats), sizes, {"devices": options.devices, "repeats": repeats})


def report(runs: Mapping[str, Sequence[Json]], sizes: Mapping[str, Sequence[int]], settings: Json) -> Report:
    """What `runs` ("case size" -> results) say."""
    rows: list[tuple[object, ...]] = []
    targets: list[tuple[str, str, bool | None]] = []
    exponents: dict[str, float] = {}
    for name, each in sizes.items():
        seconds = {size: harness.summary(found["seconds"] for found in runs[f"{name} {size}"]) for size in each}
        memory = {size: max(found["bytes"] for found in runs[f"{name} {size}"]) for size in each}
        exponents[name] = exponent(*((size, seconds[size]["median"]) for size in each[-2:]))
        rows += [
            (name, f"{size:,}", harness.spread(seconds[size]), f"{memory[size] / 1e6:,.0f}", "") for size in each[:-1]
        ]
        written = f"{exponents[name]:.2f}"
        rows.append(
            (name, f"{each[-1]:,}", harness.spread(seconds[each[-1]]), f"{memory[each[-1]] / 1e6:,.0f}", written)
        )
        targets.append((f"{name}: exponent <= {TARGET:g}", written, exponents[name] <= TARGET))
    return Report(
        title="how the driver's work grows",
        settings={**settings, "chains": CHAINS},
        results={"exponents": exponents, "runs": dict(runs)},
        tables=[Table("processor seconds by size", ("", "size", "seconds", "MB at most", "exponent"), rows)],
        targets=targets,
        notes=["Trials of a sweep have 18 nodes each. What bounds larger plans: docs/scale.md."],
    )


def exponent(small: tuple[int, float], large: tuple[int, float]) -> float:
    """The exponent x of seconds = c * size^x through two points (size, seconds)."""
    return math.log(large[1] / small[1]) / math.log(large[0] / small[0])


# --- one case, in a process of its own --------------------------------------------------------------------


def main(name: str, size: int, devices: int) -> Json:
    with tempfile.TemporaryDirectory(prefix="segprop-bench-") as folder:
        seconds = _CASES[name](size, devices, Path(folder))
    return {"seconds": seconds, "bytes": driver_scale.peak_bytes()}


def _timed(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _plan(size: int, devices: int, folder: Path) -> float:
    return _timed(lambda: driver_scale.make_plan(size, folder, CHAINS))


def _dispatch(size: int, devices: int, folder: Path) -> float:
    plan, _ = driver_scale.make_plan(size, folder, CHAINS)
    return _timed(lambda: driver_scale.dispatch(plan, folder, devices))


def _ledger(size: int, devices: int, folder: Path) -> float:
    plan, _ = driver_scale.make_plan(size, folder, CHAINS)
    return float(driver_scale.resume(plan, folder)["processor_seconds"])


def _record(size: int, devices: int, folder: Path) -> float:
    from cache_store.storage.open import open_storage
    from orchestrator.execution.plan_record import read_plans, write_plan

    plan, _ = driver_scale.make_plan(size, folder, CHAINS)
    storage = open_storage(str(folder / "store"))

    def both() -> None:
        write_plan(storage, "growth", plan)
        (found,) = read_plans(storage).values()
        assert len(found.nodes) == len(plan.nodes)

    return _timed(both)


def _sweep(size: int, devices: int, folder: Path) -> float:
    from orchestrator.sweeps.event_log import SweepLog
    from orchestrator.sweeps.metric import parse
    from orchestrator.sweeps.steering import Course, Everything, SweepSteering, TrialHooks

    courses = [
        Course(f"t{number}", f"t{number}", driver_scale.trial_plan(folder, 1e-4 * (number + 1)), {"number": number})
        for number in range(size)
    ]
    steering = SweepSteering(
        courses,
        parse(None, None, {"segprop": "segprop"}, names=["accuracy", "loss"]),
        Everything({course.name: course.parameters for course in courses}),
        gated=True,
        trials=TrialHooks(score=lambda course: 0.5),
        journal=SweepLog(None),
    )
    seconds = _timed(lambda: driver_scale.dispatch(steering.plan, folder, devices, steering))
    assert {course.status for course in courses} == {"done"}
    return seconds


def _survey(size: int, devices: int, folder: Path) -> float:
    from cache_store.storage.base import FileInfo
    from orchestrator.cache.garbage import StoreFacts, collect
    from orchestrator.cache.inventory import survey

    sets = max(1, size // 2_000)
    files = (
        FileInfo(f"sets/{number % sets:032x}/{folder_name}/{number // sets:06d}.{suffix}", 1 << 20, 0.0)
        for number in range(size // 2)
        for folder_name, suffix in (("shards", "0.arrow"), ("commits", "json"))
    )

    def both() -> None:
        found = survey(files)
        facts = StoreFacts(found, {}, {}, {}, frozenset(), now=1e9)
        assert len(collect(facts, older_than_s=60.0)) == sets

    return _timed(both)


_CASES: Mapping[str, Callable[[int, int, Path], float]] = {
    "plan": _plan,
    "dispatch": _dispatch,
    "ledger": _ledger,
    "record": _record,
    "sweep": _sweep,
    "survey": _survey,
}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
