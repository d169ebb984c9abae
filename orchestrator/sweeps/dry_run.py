"""Print what a sweep would run: its trials, what they share, and what that saves. Loads neither torch nor Ray."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.reports.words import NODE_WORDS
from orchestrator.runs.dry_run import FILE_WIDTH
from orchestrator.sweeps import plan
from orchestrator.sweeps.plan import Shared
from orchestrator.sweeps.prepare import PreparedSweep
from orchestrator.sweeps.space import short_keys, value_text
from orchestrator.units import human_bytes, human_seconds


def print_sweep(sweep: PreparedSweep, stream: TextIO | None = None) -> None:
    """Write the tables to `stream` (standard output)."""
    stream = sys.stdout if stream is None else stream
    width = shutil.get_terminal_size().columns if stream.isatty() else FILE_WIDTH
    Console(file=stream, width=width, highlight=False, soft_wrap=False).print(render(sweep))


def render(sweep: PreparedSweep) -> RenderableType:
    """Return all tables."""
    section, metric = sweep.section, sweep.metric
    asked = {trial.name: trial.prepared.plan.nodes for trial in sweep.trials}
    kinds = plan.sharing(asked, lambda node: node.estimate.seconds)
    everything = plan.total(kinds.values())
    head = Text()
    head.append(sweep.run, style="bold")
    scheduler = "every trial to its end" if section.scheduler.name == "all" else section.scheduler.name
    head.append(f"  {len(sweep.trials)} trials, {scheduler}, by {metric.key} ({metric.mode})\n")
    head.append(f"{len(sweep.plan.nodes)} nodes -> {sweep.run_dir}, store {sweep.config.store}")
    peaks = sorted((trial.prepared.plan.peak_snapshot_bytes for trial in sweep.trials), reverse=True)
    note = (
        f"Predicted: {human_seconds(everything.seconds_run)} of work in one slot (slots: "
        f"{sweep.config.resources.slots}) instead of {human_seconds(everything.seconds_asked)} for the trials on their "
        f"own; at most {human_bytes(sum(peaks))} of snapshots at one time, if all trials ran side by side. Times are "
        "rough. Nothing was run."
    )
    if section.scheduler.name == "asha":
        note += " asha will stop some of the trials early."
    return Group(head, Text(), _trials(sweep), Text(), _sharing(kinds, everything), Text(), Text(note))


def _trials(sweep: PreparedSweep) -> Table:
    table = Table(title="trials", title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    keys = list(sweep.section.parameters)
    for short in short_keys(keys).values():
        table.add_column(short, justify="right")
    for name in ("stages", "new", "peak memory", "snapshots", "time alone", "time here"):
        table.add_column(name, justify="right", no_wrap=True)
    seen: set[str] = set()
    for trial in sweep.trials:
        nodes = trial.prepared.plan.nodes
        new = [node for node in nodes if node.id not in seen]
        stages = [node for node in nodes if node.trains]
        table.add_row(
            trial.name,
            *(value_text(trial.parameters[key]) for key in keys),
            str(len(stages)),
            str(sum(node.id not in seen for node in stages)),
            human_bytes(max(node.estimate.peak_bytes for node in stages)),
            human_bytes(trial.prepared.plan.peak_snapshot_bytes),
            human_seconds(sum(node.estimate.seconds for node in nodes)),
            human_seconds(sum(node.estimate.seconds for node in new)),
        )
        seen.update(node.id for node in nodes)
    return table


def _sharing(kinds: Mapping[str, Shared], everything: Shared) -> Table:
    table = Table(title="shared", title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("what", no_wrap=True)
    for name in ("asked", "run", "time asked", "time run"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: list[tuple[str, Shared, Any]] = [(NODE_WORDS.get(kind, kind), shared, "") for kind, shared in kinds.items()]
    for what, shared, style in (*rows, ("all", everything, "bold")):
        cells = (
            str(shared.asked),
            str(shared.run),
            human_seconds(shared.seconds_asked),
            human_seconds(shared.seconds_run),
        )
        table.add_row(what, *cells, style=style)
    return table
