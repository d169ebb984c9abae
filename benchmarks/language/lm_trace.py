"""Trace stages of the shipped language configurations, without a device: what torch's memory tracker finds in the real
step, beside what the plan predicts; and both beside what an H200 held (results of `lm_memory`)."""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, Report, Table

GIB = 2**30
DATA = harness.ROOT / "tests" / "data"
#: Configuration -> what plans it without weights and without data of its own.
SHIPPED = {
    "lm_quickstart": (),
    "smollm2_segprop": ("smollm2-135m",),
    "llama_segprop": ("llama-3.1-8b",),
    "mistral_nemo_segprop": ("mistral-nemo-12b",),
}
#: Results of the device -> case -> settings with which a plan means the same stage, and the stage's number. Weights
#: were rounded to the nearest then, and a step was one micro-batch.
ON_H200: dict[str, dict[str, tuple[int, str]]] = {
    "lm_memory-cuda-micro4": {
        "stage1/base1": (0, "split.base=1"),
        "stage1/base18": (0, "split.base=18"),
        "stage2": (1, "training.activation_checkpointing=false"),
        "stage2+lora": (
            1,
            "training.activation_checkpointing=false training.lora.rank=16 training.lm_head=frozen",
        ),
        "e2e+checkpointing": (0, "regimes=[e2e]"),
    },
}
AS_MEASURED = "split.intermediate=omit snapshots.mode=always training.optimizer.rounding=nearest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--configs", nargs="*", choices=SHIPPED, default=list(SHIPPED), help="only these")
    parser.add_argument("--cases", nargs="*", help="only these cases of the H200")
    parser.add_argument("--all-stages", action="store_true", help="not only the first, the second and the last")


def result_name(options: argparse.Namespace) -> str:
    return "lm_trace"


def run(options: argparse.Namespace) -> Report:
    results: dict[str, Json] = {}
    for name in options.configs:
        for index in (None,) if options.all_stages else (0, 1, -1):
            results.update(_traced(f"{name}.yaml", SHIPPED[name], index, name))
    beside = [] if options.quick else _beside_h200(options.cases, results)
    worst = max((abs(each["deviation"]) for each in results.values()), default=0.0)
    far = max((abs(row[column]) for row in beside for column in (3, 5)), default=None)
    return Report(
        title="memory of language models' stages: planned, and traced without a device",
        settings={"configs": ", ".join(options.configs), "all_stages": options.all_stages},
        results=results,
        tables=[
            Table(
                "GiB at the worst moment",
                ("stage", "planned", "traced", "plan off by, %", "parameters", "gradients", "optimizer", "activations"),
                [_row(name, each) for name, each in results.items()],
            ),
            Table("Beside an H200, GiB", ("case", "measured", "planned", "off by, %", "traced", "off by, %"), beside),
        ],
        targets=[
            ("the plan within 5% of the trace", f"{worst:.1%}", worst <= 0.05),
            ("both within 10% of the H200", "-" if far is None else f"{far:.1f}%", None if far is None else far <= 10),
        ],
        notes=[
            "Traced: the training code's own path, loss, optimizer and accumulation, of tensors without bytes, under "
            "torch.distributed._tools.mem_tracker; two steps.",
            "Measured: torch.cuda.max_memory_allocated, of lm_memory-cuda-micro4 (see there).",
        ],
    )


def _traced(file: str, model: tuple[str, ...], index: int | None, name: str, *overrides: str) -> dict[str, Json]:
    """Stage -> figures, of one stage of a configuration or of all."""
    from orchestrator.runs.prepare import prepare
    from orchestrator.runs.trace import trace

    given = [f"model.path={DATA / model[0]}", "data.name=stdlib"] if model else []
    prepared = prepare(harness.ROOT / "configs" / file, [*given, "resources.device=cuda", *overrides])
    found: dict[str, Json] = {}
    for stage in trace(prepared, only=index):
        harness.say(f"{name}/{stage.regime}/{stage.name}: {stage.deviation:+.1%}, {stage.found.seconds:.0f} s")
        found[f"{name}/{stage.regime}/{stage.name}"] = stage.to_json()
    return found


def _beside_h200(cases: list[str] | None, results: dict[str, Json]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for file, named in ON_H200.items():
        measured = json.loads((harness.RESULTS / f"{file}.json").read_text())["results"]
        for case, (index, overrides) in named.items():
            if cases is not None and case not in cases:
                continue
            settings = (*AS_MEASURED.split(), "training.micro_batch=4", "training.batch_size=4", *overrides.split())
            (each,) = _traced("llama_segprop.yaml", ("llama-3.1-8b",), index, f"h200 {case}", *settings).values()
            results[f"as measured/{case}"] = each
            there = measured[case]["peak_allocated_bytes"]
            planned, traced = each["predicted_bytes"], each["found"]["peak"]
            rows.append(
                (
                    case,
                    there / GIB,
                    planned / GIB,
                    100 * (planned / there - 1),
                    traced / GIB,
                    100 * (traced / there - 1),
                )
            )
    return rows


def _row(name: str, each: Json) -> tuple[object, ...]:
    found = each["found"]
    kinds = ("parameters", "gradients", "optimizer", "activations")
    return (
        name,
        each["predicted_bytes"] / GIB,
        found["peak"] / GIB,
        100 * each["deviation"],
        *(found[kind] / GIB for kind in kinds),
    )
