"""Trace stages of the shipped language configurations, without a device: what torch's memory tracker finds in the real
step, beside what the plan predicts; and both beside what an H200 held (results of `lm_memory`).

Figures are kept stage by stage in `<out>/lm_trace.partial.json`: `--resume` takes those of stages whose task is still
the same, so a run that is killed loses one stage, and a changed configuration costs its own stages alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Json, Report, Table

GIB = 2**30
DATA = harness.ROOT / "tests" / "data"
#: Kinds of memory that results show.
_KINDS = ("parameters", "gradients", "optimizer", "activations")
#: What a trace may differ from the plan by, and both from the H200, as shares.
OF_TRACE, OF_H200 = 0.05, 0.10


@dataclass(frozen=True)
class Case:
    """Stages of one configuration. `model`: folder of tests/data with its config.json, `settings`: overrides,
    `stages`: which of every regime (None: all)."""

    file: str
    model: str | None = None
    settings: str = ""
    stages: tuple[int, ...] | None = (0, 1, -1)


#: The 70B model on one card with the host's memory, as the head of its configuration says.
_ONE_CARD = "resources.gang.size=null memory.optimizer=host memory.frozen=host training.micro_batch=4"
#: Everything on the device, the segment and the global head alone.
_EIGHT_BITS = "split.intermediate=omit training.optimizer.name=adamw8bit training.micro_batch=1"

#: Name -> what is traced. Sweeps: the trials that need most and least.
SHIPPED = {
    "llama_segprop": Case("llama_segprop", "llama-3.1-8b"),
    "llama_segprop 8 bits": Case("llama_segprop", "llama-3.1-8b", _EIGHT_BITS, stages=(1, -1)),
    "llama_segprop_24gb": Case("llama_segprop_24gb", "llama-3.1-8b"),
    "llama_segprop_24gb e2e": Case("llama_segprop_24gb", "llama-3.1-8b", "regimes=[e2e]"),
    "llama_segprop_12gb": Case("llama_segprop_12gb", "llama-3.1-8b", stages=(0, 1, 6, -1)),
    "mistral_nemo_segprop": Case("mistral_nemo_segprop", "mistral-nemo-12b"),
    "mistral_nemo_segprop_24gb": Case("mistral_nemo_segprop_24gb", "mistral-nemo-12b", stages=(0, 1, 5, -1)),
    # A gang's ranks are not traced: one card, behind the base.
    "llama70b_segprop one card": Case("llama70b_segprop", "llama-3.1-70b", _ONE_CARD, stages=(8,)),
    "llama_sweep base 24": Case("llama_sweep", "llama-3.1-8b", "split.base=24"),
    "llama_sweep base 1 head 0": Case("llama_sweep", "llama-3.1-8b", "split.base=1 split.head=0 regimes=[segprop]"),
    "nemo_sweep base 32": Case("nemo_sweep", "mistral-nemo-12b", "split.base=32"),
    "lm_quickstart": Case("lm_quickstart"),
    "smollm2_segprop": Case("smollm2_segprop", "smollm2-135m"),
    "smollm2_equal_time": Case("smollm2_equal_time", "smollm2-135m"),
}
#: As an H200 was measured: weights were rounded to the nearest then, and a step was one micro-batch.
_AS_MEASURED = (
    "split.intermediate=omit snapshots.mode=always training.optimizer.rounding=nearest training.micro_batch=4 "
    "training.batch_size=4 "
)
_LORA = "training.lora.rank=16 training.lm_head=frozen"
_WHOLE_STEP = "training.activation_checkpointing=false"


def _h200(stage: int, settings: str) -> Case:
    return Case("llama_segprop", "llama-3.1-8b", _AS_MEASURED + settings, (stage,))


#: Results of the device -> case -> what the plan calls the same stage.
ON_H200: dict[str, dict[str, Case]] = {
    "lm_memory-cuda-micro4": {
        "stage1/base1": _h200(0, "split.base=1"),
        "stage1/base18": _h200(0, "split.base=18"),
        "stage2": _h200(1, _WHOLE_STEP),
        "stage2+lora": _h200(1, f"{_WHOLE_STEP} {_LORA}"),
        "e2e+checkpointing": _h200(0, "regimes=[e2e]"),
        "e2e+lora": _h200(0, f"regimes=[e2e] {_LORA}"),
    },
    "lm_memory-cuda-micro4-adamw8bit": {
        "stage1/base18": _h200(0, "split.base=18 training.optimizer.name=adamw8bit"),
        "e2e+checkpointing": _h200(0, "regimes=[e2e] training.optimizer.name=adamw8bit"),
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--configs", nargs="*", choices=SHIPPED, default=list(SHIPPED), help="only these")
    parser.add_argument(
        "--cases", nargs="*", help="only these that an H200 was measured with: RESULT/CASE; none named: none"
    )
    parser.add_argument("--all-stages", action="store_true", help="not only the first, the second and the last")
    parser.add_argument("--resume", action="store_true", help="keep figures of stages whose task is the same still")


def result_name(options: argparse.Namespace) -> str:
    return "lm_trace-shipped" if options.cases == [] else "lm_trace"


def run(options: argparse.Namespace) -> Report:
    kept = _Kept(options.out / "lm_trace.partial.json", options.resume)
    results: dict[str, Json] = {}
    for name in options.configs:
        case = SHIPPED[name]
        stages = None if options.all_stages else case.stages
        results.update(_traced(name, case, stages, kept))
    beside = [] if options.quick else list(_beside_h200(options.cases, results, kept))
    worst = max((abs(each["deviation"]) for each in results.values()), default=0.0)
    far = max((abs(row[column]) for row in beside for column in (4, 6)), default=None)
    return Report(
        title="memory of language models' stages: planned, and traced without a device",
        settings={"configs": ", ".join(options.configs), "all_stages": options.all_stages},
        results=results,
        tables=[
            Table(
                "GiB at the worst moment",
                ("stage", "planned", "traced", "may wait", "plan off by, %", *_KINDS),
                [_row(name, each) for name, each in results.items()],
            ),
            Table(
                "Beside an H200, GiB",
                ("result", "case", "measured", "planned", "off by, %", "traced", "off by, %"),
                beside,
            ),
        ],
        targets=[
            (f"the plan within {OF_TRACE:.0%} of the trace", f"{worst:.1%}", worst <= OF_TRACE),
            (
                f"both within {OF_H200:.0%} of the H200",
                "-" if far is None else f"{far:.1f}%",
                None if far is None else far <= 100 * OF_H200,
            ),
        ],
        notes=[
            "Traced: the training code's own path, loss, optimizer and accumulation, of tensors without bytes, under "
            "torch.distributed._tools.mem_tracker.",
            "May wait: gradients that wait on a GPU for their way to the host (memory.optimizer), at most 512 MiB: a "
            "trace cannot see them, the plan counts them.",
            "Measured: torch.cuda.max_memory_allocated (see lm_memory-cuda-micro4).",
            f"Tracing took {sum(each['found']['seconds'] for each in results.values()):.0f} s for {len(results)} "
            "stages; stages whose task is another one's were traced once.",
        ],
    )


class _Kept:
    """Figures by node id, in a file that grows with every stage."""

    def __init__(self, file: Path, resume: bool) -> None:
        self._file = file
        self._figures: dict[str, Json] = json.loads(file.read_text()) if resume and file.is_file() else {}

    def get(self, node: str) -> Json | None:
        return self._figures.get(node)

    def put(self, node: str, figures: Json) -> None:
        self._figures[node] = figures
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self._figures))


def _traced(name: str, case: Case, stages: tuple[int, ...] | None, kept: _Kept) -> dict[str, Json]:
    """Stage -> figures, of some stages of every regime of a configuration."""
    from orchestrator.runs.prepare import prepare
    from orchestrator.runs.trace import trace_node, waiting_bytes
    from workers.specs.as_json import from_json
    from workers.specs.tasks import StageTask

    given = [f"model.path={DATA / case.model}", "data.name=stdlib"] if case.model else []
    file = harness.ROOT / "configs" / f"{case.file}.yaml"
    prepared = prepare(file, [*given, "resources.device=cuda", *case.settings.split()])
    found: dict[str, Json] = {}
    for regime in prepared.plan.regimes.values():
        count = len(regime.stages)
        indices = range(count) if stages is None else sorted({i % count for i in stages if -count <= i < count})
        for node_id in (regime.stages[index] for index in indices):
            figures = kept.get(node_id)
            if figures is None:
                figures = asdict(trace_node(prepared, regime.name, node_id))
                kept.put(node_id, figures)
            # The plan's formulas are asked every time.
            node = prepared.plan.node(node_id)
            waiting = waiting_bytes(prepared, from_json(StageTask, node.task), node.estimate.trainable)
            predicted = {"predicted_bytes": node.estimate.peak_bytes, "waiting_bytes": waiting}
            beside = {"predicted_host_bytes": node.estimate.host_bytes, "link_bytes": node.estimate.link_bytes}
            each = {**figures, "regime": regime.name, **predicted, **beside}
            each["deviation"] = round(node.estimate.peak_bytes / (each["found"]["peak"] + waiting) - 1, 4)
            title = f"{name}/{regime.name}/{each['name']}"
            harness.say(f"{title}: {each['deviation']:+.1%}, {each['found']['seconds']:.0f} s")
            found[title] = each
    return found


def _beside_h200(only: list[str] | None, results: dict[str, Json], kept: _Kept) -> Iterator[tuple[Any, ...]]:
    for file, cases in ON_H200.items():
        measured = json.loads((harness.RESULTS / f"{file}.json").read_text())["results"]
        for name, case in cases.items():
            if only is not None and f"{file}/{name}" not in only:
                continue
            (each,) = _traced(f"h200 {name}", case, case.stages, kept).values()
            results[f"as measured/{file}/{name}"] = each
            there = measured[name]["peak_allocated_bytes"]
            planned, traced = each["predicted_bytes"], each["found"]["peak"]
            yield (
                file,
                name,
                there / GIB,
                planned / GIB,
                100 * (planned / there - 1),
                traced / GIB,
                100 * (traced / there - 1),
            )


def _row(name: str, each: Json) -> tuple[object, ...]:
    found = each["found"]
    return (
        name,
        each["predicted_bytes"] / GIB,
        found["peak"] / GIB,
        each["waiting_bytes"] / GIB,
        100 * each["deviation"],
        *(found[kind] / GIB for kind in _KINDS),
    )
