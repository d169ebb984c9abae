"""What counting a stage's time costs its steps: the same steps with clocks and without, and the clocks by themselves.

Two trainers of one stage, from the same weights, take blocks of steps in turns in one process, in an order that is
reversed every round; ratios are of the two blocks of one round, in processor seconds (the clocks' own work, whatever
else the machine does) and on the clock. Small steps are the hardest: what is counted is the same for large ones. By
themselves, the calls of a step are timed around parts that compute nothing, as a share of the step.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

from benchmarks import harness
from benchmarks.harness import Json, Report, Table

if TYPE_CHECKING:
    from workers.training.timing.stage_times import StageTimes
    from workers.training.trainer import StageTrainer

MOST = 0.005
#: Steps of a block: as many as there are to one that is looked at.
BLOCK = 16
CASES: dict[str, Json] = {
    "images": {
        "model": {"name": "resnet18", "stem": "small", "hidden": 32},
        "data": {"name": "digits", "image_size": 8, "augment": "light", "flip": False, "validation": 48},
        "training": {"epochs": 1, "batch_size": 8},
    },
    "text": {
        "model": {
            "family": "causal_lm",
            "tokenizer": "bytes",
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 260,
            },
        },
        "data": {"name": "stdlib", "sequence_length": 32, "train_limit": 256, "validation_limit": 8, "test_limit": 8},
        "training": {"epochs": 1, "batch_size": 4},
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help="pairs of blocks of 16 steps (60; quick 10)")


def run(options: argparse.Namespace) -> Report:
    rounds = options.rounds or (10 if options.quick else 60)
    results: Json = {}
    with harness.workspace() as folder:
        for name, changes in CASES.items():
            config = folder / f"{name}.yaml"
            whole = {
                **changes,
                "regimes": ["e2e"],
                "evaluation": {"stages": False},
                "resources": {"runner": "local", "device": "cpu", "slots": 1, "threads": 1},
                "run_dir": str(folder / name),
            }
            config.write_text(json.dumps(whole))  # JSON is YAML
            harness.say(f"{name}: {rounds} pairs of {BLOCK} steps")
            results[name] = harness.child("-m", "benchmarks.training.clocks", str(config), str(rounds))
    rows = [
        (
            name,
            f"{1000 * found['step_seconds']:.2f}",
            harness.spread(harness.summary(found["processor_ratios"])),
            harness.spread(harness.summary(found["clock_ratios"])),
            f"{1e6 * found['calls_seconds']:.1f}",
            f"{found['calls_seconds'] / found['step_seconds']:.3%}",
        )
        for name, found in results.items()
    ]
    shares = {name: found["calls_seconds"] / found["step_seconds"] for name, found in results.items()}
    return Report(
        title="what counting a stage's time costs",
        settings={"rounds": rounds, "steps of a block": BLOCK, "threads": 1},
        results=results,
        tables=[
            Table(
                "Steps with clocks beside the same ones without",
                (
                    "case",
                    "step, ms of processor",
                    "processor time",
                    "on the clock",
                    "calls of a step, µs",
                    "share of the step",
                ),
                rows,
            )
        ],
        targets=[
            (f"{name}: the calls take less than {MOST:.1%} of a step", f"{share:.3%}", share < MOST)
            for name, share in shares.items()
        ],
        notes=["Calls of a step: ten changes of phase, and of the steps that are looked at their part of one step."],
    )


# --- in a process of its own -------------------------------------------------------------------------------


def measure(config: str, rounds: int) -> Json:
    """Run blocks of steps of two trainers in turns."""
    import torch

    from workers.training.timing.stage_times import StageTimes

    class Uncounted(StageTimes):
        """Reads no clock in a step."""

        def at(self, phase: str) -> str:
            return phase

        def looks_at(self, step: int) -> bool:
            return False

    device = torch.device("cpu")
    trainers = {
        "with": _trainer(config, StageTimes(device)),
        "without": _trainer(config, Uncounted(device)),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    for index in range(rounds + 1):
        for name in list(trainers) if index % 2 else list(trainers)[::-1]:
            taken[name].append(_block(trainers[name]))
    # The first round makes optimizer states and fills caches.
    pairs = list(zip(taken["with"][1:], taken["without"][1:], strict=True))
    return {
        # The least: whatever else the machine does makes a step longer, and the share of the calls smaller.
        "step_seconds": min(without[0] for _, without in pairs) / BLOCK,
        "processor_ratios": [a[0] / b[0] for a, b in pairs],
        "clock_ratios": [a[1] / b[1] for a, b in pairs],
        "calls_seconds": _calls(trainers["with"]),
    }


def _trainer(config: str, times: StageTimes) -> StageTrainer:
    import uuid

    import torch

    from benchmarks.language.lm_stage import order_of
    from cache_store.storage.open import open_storage
    from workers.control import ThreadControl
    from workers.environment import WorkerEnvironment, prepare_process
    from workers.specs import as_json, tasks
    from workers.training.trainer import StageTrainer

    _, order = order_of(config, "e2e", 0)
    task = as_json.from_json(tasks.StageTask, order.task)
    prepare_process(torch.device("cpu"), order.threads, deterministic=task.train.deterministic)
    environment = WorkerEnvironment(open_storage(order.store), torch.device("cpu"), order.threads, ThreadControl())
    attempt = environment.nodes.attempt(uuid.uuid4().hex)
    return StageTrainer(task, order.parents, environment, attempt, times=times)


def _block(trainer: StageTrainer) -> tuple[float, float]:
    """Take some steps; returns processor seconds and seconds on the clock."""
    progress = trainer.state.progress
    processor, clock = time.process_time(), time.perf_counter()
    trainer._train_epoch(trainer._epoch(BLOCK))
    passed = time.process_time() - processor, time.perf_counter() - clock
    progress.step, progress.sums = 0, [0.0, 0.0, 0.0]
    return passed


def _calls(trainer: StageTrainer) -> float:
    """Time the calls of a step alone, with as many parts as the stage has."""
    import torch
    from torch import nn

    from workers.training.timing.stage_times import StageTimes

    times, parts = StageTimes(torch.device("cpu")), {name: nn.Identity() for name in trainer.path.module.parts}
    modules, nothing = list(parts.values()), torch.zeros(())
    phases = ("data", "copies", "forward", "loss", "backward", "rest", "checkpoints", "update", "rest")

    def steps(count: int) -> float:
        started = time.perf_counter()
        times.begin_steps()
        for _ in range(count):
            for phase in phases:
                times.at(phase)
                if phase == "forward":
                    for module in modules:
                        module(nothing)
            times.step_done()
        times.end_steps()
        return (time.perf_counter() - started) / count

    def modules_alone(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            for module in modules:
                module(nothing)
        return (time.perf_counter() - started) / count

    times.watch(parts)
    return min(steps(2000) for _ in range(5)) - min(modules_alone(2000) for _ in range(5))


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
