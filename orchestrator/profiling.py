"""Run `segprop profile`: where the time of one stage's steps goes, in this process and without touching the run."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cache_store.errors import UserError
from cache_store.storage.base import Storage
from cache_store.storage.layered import LayeredStorage
from cache_store.storage.open import existing_storage, open_storage
from cache_store.suggest import did_you_mean
from orchestrator.plan.graph import Node, Plan
from orchestrator.reports.tables.time_table import WORDS, cores, part_shares, share
from orchestrator.runners.base import RunnerRequest
from orchestrator.runners.factory import settle_here
from orchestrator.runs.prepare import Prepared
from orchestrator.units import DASH, percent_text
from workers.specs.orders import WorkOrder
from workers.specs.results import PHASES, TimeSpent

if TYPE_CHECKING:
    from workers.tasks.profile import ProfileOrder, StageProfile

#: What is written.
TRACE, FIGURES, TABLES = "trace.json", "profile.json", "profile.txt"
#: Columns of tables in a file.
WIDTH = 110


@dataclass(frozen=True)
class Found:
    """The stage that is meant: its regime, and the node of its first round."""

    regime: str
    node: Node


def find_stage(plan: Plan, stage: str | None, regime: str | None) -> Found:
    """Find the stage that a user means: by its name or number (from 1), by `regime/name`; None: the first. Without a
    regime, the first one that has it. UserError, with the nearest name, when there is none."""
    before, slash, name = (stage or "").rpartition("/")
    regime = before if slash and regime is None else regime
    if regime is not None and regime not in plan.regimes:
        near = did_you_mean(regime, plan.regimes) or f"; it has {', '.join(plan.regimes)}"
        raise UserError(f"--regime: {regime!r} is not in this configuration{near}")
    candidates = list(plan.regimes) if regime is None else [regime]
    names = {each: [str(plan.node(node).task["name"]) for node in plan.regimes[each].stages] for each in candidates}
    for each in candidates:
        index = _index(name, names[each])
        if index is not None:
            last = plan.regimes[each].stages[index]
            return Found(each, plan.node(plan.regimes[each].work_of(last)[0]))
    known = [f"{each}/{one}" for each in candidates for one in names[each]]
    near = did_you_mean(name, [one for each in candidates for one in names[each]])
    allowed = "; there are " + ", ".join(known)
    raise UserError(f"--stage: {stage!r} is no stage here{near or allowed}")


def _index(name: str, names: Sequence[str]) -> int | None:
    if not name:
        return 0
    if name.isdecimal():
        return int(name) - 1 if 1 <= int(name) <= len(names) else None
    return names.index(name) if name in names else None


def profile(prepared: Prepared, found: Found, steps: int, out: Path | None) -> tuple[StageProfile, Path]:
    """Run the first steps of a stage and write what they took into `out`; returns that and the folder.

    Nothing is written to the run directory or its store; what the store has is used."""
    # Its library says on standard error that it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from workers.tasks.profile import profile_stage

    stage = str(found.node.task["name"])
    folder = out or Path("profiles") / f"{prepared.config.run}-{found.regime}-{stage}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder}: cannot be made ({error.strerror})") from None
    with tempfile.TemporaryDirectory(prefix="segprop-profile-") as scratch:
        trace = Path(scratch) / TRACE
        storage, notes = _storage(prepared.config.store, Path(scratch))
        taken = profile_stage(_order(prepared, found, steps, trace), storage)
        taken = replace(taken, notes=(*notes, *taken.notes))
        shutil.move(trace, folder / TRACE)
    (folder / FIGURES).write_text(json.dumps({"regime": found.regime, **taken.to_json()}, indent=1) + "\n")
    with (folder / TABLES).open("w") as file:
        show(taken, found.regime, file)
    return taken, folder


def _storage(store: str, scratch: Path) -> tuple[Storage, list[str]]:
    """A store of its own, above that of the run where there is one; and what to say of it."""
    own = open_storage(str(scratch / "store"))
    try:
        return LayeredStorage(own, existing_storage(store)), []
    except UserError as error:
        return own, [f"nothing of the run is used: {error.message}"]


def _order(prepared: Prepared, found: Found, steps: int, trace: Path) -> ProfileOrder:
    from workers.tasks.profile import ProfileOrder

    plan, config = prepared.plan, prepared.config
    _, threads, device = settle_here(RunnerRequest(config.resources, plan, config.store))

    def order(node: Node) -> WorkOrder:
        return WorkOrder(
            node_id=node.id,
            kind=node.kind,
            task=node.task,
            parents={},
            store=config.store,
            device=device,
            threads=threads,
            snapshot_memory=config.resources.snapshot_memory,
            checkpoint_memory=config.resources.checkpoint_memory,
        )

    before = _ancestors(plan, found.node)
    return ProfileOrder(
        order=order(found.node),
        parents=found.node.parents,
        makers={node.id: order(node) for node in before if node.prepares or node.initializes},
        initial=next(node.id for node in before if node.initializes),
        steps=steps,
        trace=trace,
    )


def _ancestors(plan: Plan, node: Node) -> list[Node]:
    """All nodes that a node is built on, in the order of the plan."""
    seen: set[str] = set()
    waiting = list(node.parents.values())
    while waiting:
        here = waiting.pop()
        if here not in seen:
            seen.add(here)
            waiting += plan.node(here).parents.values()
    return plan.in_order(seen)


# -- tables ----------------------------------------------------------------------------------------------------


def show(taken: StageProfile, regime: str, stream: TextIO | None = None) -> None:
    """Print the tables, as wide as the terminal or as a file wants them."""
    console = Console(file=stream or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(render(taken, regime))


def render(taken: StageProfile, regime: str) -> RenderableType:
    """All that was found, as tables."""
    times = taken.times
    each = times.seconds / max(times.steps, 1)
    head = (
        f"{regime}/{taken.stage}: {times.steps} steps of {taken.batch_size} samples"
        + (f", {taken.micro_batch} at a time" if taken.micro_batch != taken.batch_size else "")
        + f", {1000 * each:.1f} ms each, on {taken.device} with {taken.threads} thread{'s' * (taken.threads != 1)}"
    )
    notes = [Text(f"Note: {note}.") for note in taken.notes]
    return Group(Text(head, style="bold"), *notes, Text(), _phases(times), Text(), _operators(taken))


def _phases(times: TimeSpent) -> Table:
    table = _table("by phase, in ms a step", "phase")
    columns = ["clock", "share", "processor", "cores", *(["host's clock"] if times.host is not None else [])]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in phase_rows(times):
        table.add_row(*(Text(cell) for cell in cells))
    return table


def phase_rows(times: TimeSpent) -> Iterator[list[str]]:
    """Yield a row a phase, the parts of the forward pass behind it, and the sum."""

    def milliseconds(seconds: float | None) -> str:
        return DASH if seconds is None else f"{1000 * seconds / max(times.steps, 1):.2f}"

    for phase in PHASES:
        if phase not in times.phases:
            continue
        seconds, processor = times.phases[phase], times.processor.get(phase)
        clock = seconds if times.host is None else times.host.get(phase)
        cells = [WORDS[phase], milliseconds(seconds), percent_text(share(times, phase)), milliseconds(processor)]
        host = [] if times.host is None else [milliseconds(clock)]
        yield [*cells, cores(clock, processor), *host]
        if phase == "forward":
            for part, of_forward in part_shares(times).items():
                taken = of_forward * seconds
                yield [f"  {part}", milliseconds(taken), percent_text(taken / times.seconds), *[""] * (2 + len(host))]
    total = milliseconds(times.seconds)
    host = [] if times.host is None else [milliseconds(sum(times.host.values()))]
    processor = times.processor_seconds
    yield ["all", total, percent_text(1.0), milliseconds(processor), cores(times.seconds, processor), *host]


def _operators(taken: StageProfile) -> Table:
    table = _table(f"operators, in ms a step, of {taken.traced_steps} steps that were recorded", "operator")
    on_device = taken.operators_device_seconds > 0
    for name in ("calls", "host", *(["device"] if on_device else []), "share"):
        table.add_column(name, justify="right", no_wrap=True)
    whole = taken.operators_device_seconds if on_device else taken.operators_host_seconds
    for each in taken.operators:
        seconds = each.device_seconds if on_device else each.host_seconds
        times = [each.host_seconds, *([each.device_seconds] if on_device else [])]
        table.add_row(
            Text(each.name),
            f"{each.calls / taken.traced_steps:.0f}",
            *(f"{1000 * value / taken.traced_steps:.2f}" for value in times),
            percent_text(seconds / whole if whole else None),
        )
    return table


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column(first, overflow="fold")
    return table
