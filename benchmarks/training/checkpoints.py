"""A stage with a checkpoint every so many seconds beside the same stage without: time, and memory beside the state.

A random Llama of 86 million parameters is trained end to end on text; both cases run the training code itself, each in
a process of its own, from the same weights on the same tokens, in turns. Ratios are of the two runs of one round. Time
is that of the epoch's steps; memory the highest private memory of the process while they run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
import uuid
from functools import partial

from benchmarks import harness
from benchmarks.harness import Json, Report, Table

SLOWER = 1.02
BESIDE = 64_000_000
#: 86 million parameters.
SHAPE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
TINY = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--every", type=float, default=20.0, help="seconds between checkpoints (%(default)s)")
    parser.add_argument("--steps", type=int, help="steps of a run (40; quick 8)")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step (%(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sample (%(default)s)")
    parser.add_argument("--repeats", type=int, help="rounds (5; quick 1)")


def run(options: argparse.Namespace) -> Report:
    steps = options.steps or (8 if options.quick else 40)
    repeats = options.repeats or (1 if options.quick else 5)
    with harness.workspace() as folder:
        config = folder / "config.yaml"
        settings = _config(options, TINY if options.quick else SHAPE, steps, str(folder / "run"))
        config.write_text(json.dumps(settings))  # JSON is YAML
        harness.say("tokens and weights")
        program = ("-m", "benchmarks.training.checkpoints")
        harness.child(*program, "prepare", str(config))
        every = 0.2 if options.quick else options.every
        cases = {"without": "1e9", "with": str(every)}
        runs = harness.interleave(
            {name: partial(harness.child, *program, seconds, str(config)) for name, seconds in cases.items()}, repeats
        )
    pairs = list(zip(runs["with"], runs["without"], strict=True))
    time_ratio = harness.summary([a["seconds"] / b["seconds"] for a, b in pairs])
    beside = harness.summary([(a["peak_host_bytes"] - b["peak_host_bytes"]) / 1e6 for a, b in pairs])
    count = statistics.median(run["checkpoints"] for run in runs["with"])
    state = runs["with"][0]["state_bytes"]
    return Report(
        title=f"a stage with a checkpoint every {every:g} s beside the same one without",
        settings={
            "steps": steps,
            "tokens a step": options.batch * options.length,
            "state, MB": round(state / 1e6),
            "every, s": every,
            "repeats": repeats,
            "threads": harness.cores(),
        },
        results={"runs": runs, "time": time_ratio, "beside_mb": beside, "checkpoints": count},
        tables=[
            Table(
                "Of one round",
                ("seconds without", "with", "ratio", "checkpoints", "memory beside the state, MB"),
                [
                    (
                        harness.spread(harness.summary([run["seconds"] for run in runs["without"]])),
                        harness.spread(harness.summary([run["seconds"] for run in runs["with"]])),
                        harness.spread(time_ratio),
                        count,
                        harness.spread(beside),
                    )
                ],
            )
        ],
        targets=[
            (f"time at most {SLOWER:g} of that without", f"{time_ratio['median']:.3f}", time_ratio["median"] <= SLOWER),
            (
                f"memory beside the state at most {BESIDE / 1e6:g} MB",
                f"{beside['median']:.0f} MB",
                beside["median"] <= BESIDE / 1e6,
            ),
        ],
    )


def _config(options: argparse.Namespace, shape: Json, steps: int, run_dir: str) -> Json:
    return {
        "model": {"family": "causal_lm", "config": shape, "tokenizer": "bytes"},
        "data": {
            "name": "stdlib",
            "sequence_length": options.length,
            "train_limit": options.batch * steps,
            "validation_limit": options.batch,
            "test_limit": 1,
        },
        "training": {
            "epochs": 1,
            "batch_size": options.batch,
            "optimizer": {"lr": 1e-4},
            "commit": "last",
        },
        "regimes": ["e2e"],
        "evaluation": {"stages": False},
        "resources": {"runner": "local", "device": "cpu", "slots": 1, "threads": harness.cores()},
        "run_dir": run_dir,
    }


# --- in a process of its own -------------------------------------------------------------------------------


def measure(every_s: float, config: str) -> Json:
    """Train the stage under a node of its own; its seconds and peak, and how many checkpoints were committed."""
    import torch

    from benchmarks.language.lm_stage import order_of
    from cache_store import crashpoints
    from cache_store.storage.open import open_storage
    from workers.control import ThreadControl
    from workers.environment import WorkerEnvironment, prepare_process
    from workers.specs import as_json, tasks
    from workers.training.trainer import StageTrainer

    committed: list[float] = []

    def reach(name: str) -> None:
        if name == "checkpoint.committed":
            committed.append(time.monotonic())

    crashpoints._armed, crashpoints._reach_armed = True, reach
    _, order = order_of(config, "e2e", 0)
    task = as_json.from_json(tasks.StageTask, order.task)
    task = dataclasses.replace(task, train=dataclasses.replace(task.train, checkpoint_every_s=every_s))
    prepare_process(torch.device("cpu"), order.threads, deterministic=task.train.deterministic)
    environment = WorkerEnvironment(open_storage(order.store), torch.device("cpu"), order.threads, ThreadControl())
    stage = StageTrainer(task, order.parents, environment, environment.nodes.attempt(uuid.uuid4().hex))
    commit = stage.run()
    assert commit is not None
    (epoch,) = commit.result["epochs"]
    return {
        "seconds": epoch["seconds"],
        "peak_host_bytes": epoch["peak_host_bytes"],
        "checkpoints": len(committed),
        # Parameters and two moments.
        "state_bytes": 3 * sum(parameter.nbytes for parameter in stage.path.parameters),
    }


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        from benchmarks.language.lm_stage import order_of

        order_of(sys.argv[2], "e2e", 0)
        print("{}")
    else:
        print(json.dumps(measure(float(sys.argv[1]), sys.argv[2])))
