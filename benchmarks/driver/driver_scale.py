"""What the driver alone can do: plans of ten thousand nodes, 256 devices that finish their work at once.

Real planner, real driver, real ledger on a folder; only the workers are made up. A task is over as soon as the driver
asks, so every second goes to choosing, submitting, noting and releasing. Each case is a process of its own.

    plan       build_plan of a ResNet with so many views that the plan has about `--nodes` nodes
    dispatch   that plan worked off on `--devices` made-up devices
    resume     reading the ledger of that plan, all committed, as a driver does that starts again
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, Report, Table
from cache_store.records.nodes import Commit
from orchestrator.execution.beat import Beat
from workers.control import Update

TARGET_A_SECOND, TARGET_PLAN_S = 200.0, 2.0
#: A commit of a stage of a hundred epochs is about this long; others are shorter.
COMMIT_EPOCHS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=10_000, help="nodes of the plan, about (%(default)s)")
    parser.add_argument("--devices", type=int, default=256, help="made-up devices (%(default)s)")
    parser.add_argument("--repeats", type=int, help="(5; quick 1)")


def run(options: argparse.Namespace) -> Report:
    repeats = options.repeats or (1 if options.quick else 5)
    nodes = min(options.nodes, 2000) if options.quick else options.nodes
    small = max(500, nodes // 10)

    def case(name: str, count: int) -> Any:
        return lambda: harness.child("-m", "benchmarks.driver.driver_scale", name, str(count), str(options.devices))

    cases = {"plan": case("plan", nodes), "dispatch": case("dispatch", nodes), "small": case("dispatch", small)}
    runs = harness.interleave({**cases, "resume": case("resume", nodes)}, repeats)
    plan = harness.summary(found["seconds"] for found in runs["plan"])
    rate = harness.summary(found["nodes"] / found["seconds"] for found in runs["dispatch"])
    small_rate = harness.summary(found["nodes"] / found["seconds"] for found in runs["small"])
    growth = harness.summary(found["growth_bytes"] / found["nodes"] for found in runs["dispatch"])
    beyond = harness.summary(found["beyond_commits_bytes"] / found["nodes"] for found in runs["dispatch"])
    resume = harness.summary(found["seconds"] for found in runs["resume"])
    count = runs["plan"][0]["nodes"]
    return Report(
        title="what the driver alone can do",
        settings={"nodes": count, "devices": options.devices, "repeats": repeats},
        results={
            "plan_seconds": plan,
            "dispatch_per_s": rate,
            "dispatch_per_s_small_plan": small_rate,
            "memory_growth_bytes_per_node": growth,
            "memory_growth_beyond_commits_bytes_per_node": beyond,
            "resume_seconds": resume,
            "runs": runs,
        },
        tables=[
            Table(
                f"{count:,} nodes, {options.devices} made-up devices",
                ("", "figure"),
                [
                    ("building the plan, seconds", harness.spread(plan)),
                    ("nodes a second from submission to commit", harness.spread(rate)),
                    (f"the same with {runs['small'][0]['nodes']:,} nodes", harness.spread(small_rate)),
                    ("bytes of memory a finished node leaves, its commit included", harness.spread(growth)),
                    ("bytes of memory a finished node leaves beside its commit", harness.spread(beyond)),
                    ("reading the ledger of the finished run, seconds", harness.spread(resume)),
                ],
            )
        ],
        targets=[
            (
                f"plan of {count:,} nodes <= {TARGET_PLAN_S:g} s",
                f"{harness.spread(plan)} s",
                plan["median"] <= TARGET_PLAN_S,
            ),
            (
                f">= {TARGET_A_SECOND:g} nodes a second",
                harness.spread(rate),
                rate["median"] >= TARGET_A_SECOND,
            ),
            (
                "memory flat: beside its commit a finished node leaves < 1 kB",
                f"{harness.spread(beyond)} bytes",
                beyond["median"] < 1000,
            ),
        ],
        notes=["What bounds larger plans: docs/scale.md."],
    )


# --- one case, in a process of its own --------------------------------------------------------------------


class FakeDevices:
    """A runner whose tasks are done when asked for: the driver is what is measured."""

    threads, device = 1, "cpu"

    def __init__(self, count: int, plan: Any) -> None:
        self._free = count
        self._running: deque[Any] = deque()
        self._kinds = {node.id: node.kind for node in plan.nodes}

    @property
    def slots(self) -> int:
        return self._free + len(self._running)

    def start(self) -> None: ...

    def free(self, *, together: bool = False) -> int:
        return self._free

    def submit(self, order: Any) -> None:
        self._free -= 1
        self._running.append(order)

    def wait(self, timeout_s: float) -> list[Any]:
        from orchestrator.runners.base import Succeeded

        if not self._running:
            return []
        # One event at a time: the worst case, since every event is a round of the driver's loop.
        order = self._running.popleft()
        self._free += 1
        return [Succeeded(order.key, commit_of(order.node_id, self._kinds[order.node_id]))]

    def progress(self) -> dict[str, Update]:
        return {order.key: Update(phase="train", epoch=1, epochs=9) for order in self._running}

    def waiting(self, tasks: int) -> None: ...

    def machine(self, node_id: str) -> str | None:
        return "made-up"

    def stop(self) -> None: ...

    def close(self) -> None: ...


def commit_of(node_id: str, kind: str) -> Commit:
    """What a worker would return, parsed from JSON as Ray's or a store's answer is: nothing is shared."""
    where = {"host": "made-up", "pid": 1, "device": "cpu", "threads": 1, "started": 1.0, "finished": 2.0}
    result: Json = {"seconds": 1.0, "where": where}
    if kind == "materialize":
        result |= {"set": node_id, "rows": 1000, "bytes": 1 << 20, "snapshot": {"hits": 0, "misses": 0}}
    if kind == "train":
        figures = {"train_accuracy": 0.9, "validation_loss": 0.3, "validation_accuracy": 0.9, "lr": 0.1, "seconds": 1.0}
        result["epochs"] = [
            {"epoch": epoch, "train_loss": 1.0 / (epoch + 1), **figures} for epoch in range(COMMIT_EPOCHS)
        ]
    return Commit(node_id, node_id, {}, json.loads(json.dumps(result)))


def make_plan(count: int, folder: Path, chains: int = 1) -> tuple[Any, float]:
    """(a plan of about `count` nodes in so many SegProp chains, seconds it took to build)."""
    # A chain reads every view of three boundaries, and has a dozen nodes beside.
    views = max(1, min(count // 6, 10_000 if chains == 1 else count // (3 * chains)))
    regimes = ["e2e: {}", "lw: {}", "segprop: {}"] + [
        f"r{number}: {{kind: segprop, training: {{optimizer: {{lr: {0.001 * (number + 1):.3f}}}}}}}"
        for number in range(chains - 2)
    ]
    return _planned(folder, views, "0.1", f"{{{', '.join(regimes)}}}")


def trial_plan(folder: Path, lr: float) -> Any:
    """The plan of one trial of a sweep over rates: SegProp alone, two views, 18 nodes."""
    return _planned(folder, 2, f"{lr:.6f}", "[segprop]")[0]


def _planned(folder: Path, views: int, lr: str, regimes: str) -> tuple[Any, float]:
    from orchestrator.config import load as configuration
    from orchestrator.plan.builder import build_plan
    from workers.data.images.outline import DataOutline
    from workers.models.resnet.outline import resnet_outline as outline
    from workers.specs.experiment import ImageSpec, ResNetSpec

    file = folder / "scale.yaml"
    file.write_text(
        "model: {name: resnet18, stem: small}\n"
        f"data: {{name: digits, image_size: 32, views: {views}}}\n"
        f"training: {{epochs: {views}, batch_size: 64, optimizer: {{lr: {lr}}}}}\n"
        "snapshots: {mode: always}\n"
        f"regimes: {regimes}\n"
    )
    config = configuration.load(file)
    data = DataOutline(10, tuple("0123456789"), (1, 8, 8), 1437, 360, "digits", (0.3,) * 3, (0.3,) * 3)
    assert isinstance(config.data, ImageSpec)
    outlines = {}
    for name in config.regimes:
        model = config.regime(name).model
        assert isinstance(model, ResNetSpec)
        outlines[name] = outline(model, config.data.image_size, 10)
    started = time.monotonic()
    plan = build_plan(config, outlines, data)
    return plan, time.monotonic() - started


def peak_bytes() -> int:
    """Most memory this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(name: str, count: int, devices: int) -> Json:
    with tempfile.TemporaryDirectory(prefix="segprop-bench-") as name_of_folder:
        folder = Path(name_of_folder)
        plan, seconds = make_plan(count, folder)
        if name == "plan":
            return {"nodes": len(plan.nodes), "seconds": seconds}
        if name == "resume":
            return resume(plan, folder)
        return dispatch(plan, folder, devices)


def dispatch(plan: Any, folder: Path, devices: int, steering: Any = None) -> Json:
    from cache_store.storage.open import open_storage
    from orchestrator.execution.commits import CommitLog
    from orchestrator.execution.driver import Driver, DriverSettings
    from orchestrator.execution.event_log import journal
    from orchestrator.execution.retry import NodeRetries
    from orchestrator.progress import Progress

    class Unstored(CommitLog):
        """Sets that were never written need no deleting."""

        def release(self, node_id: str) -> None:
            self.released.add(node_id)

    storage = open_storage(str(folder / "store"))
    ledger = Unstored(storage)
    # The same caches as in a long run before the first figure: a run of ten nodes of its own is not needed, the plan's
    # lookup tables are.
    for node in plan.nodes:
        plan.readers(node.id)
    beats: list[Beat] = []
    before = resident_bytes()
    with (folder / "progress.txt").open("w") as stream, Progress(len(plan.nodes), 0, stream=stream) as progress:
        driver = Driver(
            plan,
            ledger,
            FakeDevices(devices, plan),
            progress,
            DriverSettings(str(folder / "store"), NodeRetries(max_attempts=3)),
            report=lambda beat: beats.__setitem__(slice(None), [beat]),
            steering=steering,
        )
        started = time.monotonic()
        with journal(folder, "scale"):
            outcome = driver.run()
        seconds = time.monotonic() - started
    growth = resident_bytes() - before
    assert outcome.status == "done", outcome
    assert len(ledger.commits) == len(plan.nodes)
    return {
        "nodes": len(plan.nodes),
        "seconds": seconds,
        "growth_bytes": growth,
        "beyond_commits_bytes": growth - commits_bytes(ledger.commits),
        "log_bytes": (folder / "log.jsonl").stat().st_size,
    }


def commits_bytes(commits: Mapping[str, Any]) -> int:
    """Memory of the commits themselves, counted object by object."""
    seen: set[int] = set()
    total, stack = 0, [commits]
    while stack:
        value: Any = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        total += sys.getsizeof(value)
        if isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            stack += value
        elif isinstance(value, Commit):
            stack += vars(value).values()
    return total


def resume(plan: Any, folder: Path) -> Json:
    from cache_store.storage.open import open_storage
    from orchestrator.execution.commits import CommitLog

    storage = open_storage(str(folder / "store"))
    for node in plan.nodes:
        # Written plainly: ten thousand times fsync is not what is measured.
        path = Path(storage.uri) / "nodes" / node.id / "commit.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(commit_of(node.id, node.kind).to_json()))
    started, processor = time.monotonic(), time.process_time()
    ledger = CommitLog.read(storage, plan)
    seconds = time.monotonic() - started
    assert len(ledger.commits) == len(plan.nodes)
    return {"nodes": len(plan.nodes), "seconds": seconds, "processor_seconds": time.process_time() - processor}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
