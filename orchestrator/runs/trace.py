"""Trace the stages of a plan: what torch's memory tracker finds in the real step, beside what the plan predicts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.runs.prepare import Prepared
from orchestrator.units import human_bytes
from workers.specs.as_json import from_json
from workers.specs.tasks import StageTask
from workers.specs.tier_bytes import LEAVING_BYTES

if TYPE_CHECKING:
    from workers.tracing import TracedMemory


@dataclass(frozen=True)
class StageTrace:
    """One stage. `predicted_bytes`: by the plan's formulas. `waiting_bytes`: gradients that may wait on a GPU for their
    way to the host, which a trace does not see: there they are gone at once."""

    regime: str
    name: str
    predicted_bytes: int
    found: TracedMemory
    waiting_bytes: int = 0
    #: Of a gang that trains it together; figures are those of its first.
    ranks: int | None = None

    @property
    def deviation(self) -> float:
        """How much more the plan predicts than was found, as a share of what was found."""
        return self.predicted_bytes / (self.found.peak + self.waiting_bytes) - 1

    def to_json(self) -> dict[str, Any]:
        """JSON, for `segprop plan --json`."""
        return {**asdict(self), "deviation": round(self.deviation, 4)}


def trace(prepared: Prepared) -> Iterator[StageTrace]:
    """Trace stage after stage as on a GPU, each in seconds."""
    for regime in prepared.plan.regimes.values():
        for node_id in regime.stages:
            yield trace_node(prepared, regime.name, node_id)


def trace_node(prepared: Prepared, regime: str, node_id: str) -> StageTrace:
    """Trace one stage of a plan as on a GPU."""
    # torch, transformers and the training code: only for those who ask.
    from workers.distributed.gang import ALONE, Gang
    from workers.tracing import trace_stage

    node = prepared.plan.node(node_id)
    task = from_json(StageTask, node.task)
    sample = prepared.config.domain.sample(prepared.config.data, prepared.data)
    gang, ranks = prepared.config.resources.gang, node.estimate.ranks or 1
    found = trace_stage(task, sample, gang=Gang(size=ranks, strategy=gang.strategy) if ranks > 1 else ALONE)
    waiting = waiting_bytes(prepared, task, node.estimate.trainable)
    return StageTrace(regime, task.name, node.estimate.peak_bytes, found, waiting, node.estimate.ranks)


def waiting_bytes(prepared: Prepared, task: StageTask, trainable: int) -> int:
    """What gradients of a stage may take while they wait for their way to the host."""
    if not task.tiers.updates_on_host:
        return 0
    config = prepared.config
    narrow = task.train.lora is None and config.family.narrow_weights(config.model, prepared.found)
    return min(LEAVING_BYTES, (2 if narrow else 4) * trainable)


def traced(prepared: Prepared) -> list[StageTrace]:
    """All stages, with a word on standard error after each."""
    found = []
    for stage in trace(prepared):
        print(f"traced {stage.regime}/{stage.name} in {stage.found.seconds:.0f} s", file=sys.stderr, flush=True)
        found.append(stage)
    return found


def render(stages: list[StageTrace]) -> RenderableType:
    """All stages as a table."""
    table = Table(
        title="traced: the real step with tensors without bytes, at its worst moment",
        title_justify="left",
        title_style="bold",
        show_edge=False,
        pad_edge=False,
    )
    for name in ("regime", "stage"):
        table.add_column(name, no_wrap=True)
    kinds = ("parameters", "gradients", "optimizer", "activations", "temporary")
    for name in ("planned", "traced", "may wait", "deviation", *kinds, "on the host"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in stages:
        table.add_row(
            stage.regime,
            stage.name,
            human_bytes(stage.predicted_bytes) + (f" a rank of {stage.ranks}" if stage.ranks else ""),
            human_bytes(stage.found.peak),
            human_bytes(stage.waiting_bytes),
            f"{stage.deviation:+.1%}",
            *(human_bytes(getattr(stage.found, kind)) for kind in (*kinds, "host")),
        )
    note = (
        "May wait: gradients on their way to the host, which a trace cannot see. "
        "Not counted: the device's context, what a kernel takes inside one operation, gaps between allocations."
    )
    return Group(table, Text(note))
