"""The plan as tables for people: what each stage trains, needs and costs. Nothing is run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.costs.formulas import Estimate
from orchestrator.plan import makespan
from orchestrator.plan.graph import Node, Plan, RegimePlan
from orchestrator.reports.commit_view import data_summary
from orchestrator.reports.part_names import abbreviated
from orchestrator.reports.words import data_lines
from orchestrator.runs.prepare import Prepared
from orchestrator.runs.why import reuse_line
from orchestrator.units import human_bytes, human_count, human_flops, human_seconds, seconds_text
from workers.domains.registry import Planning
from workers.models.base import StageTraining
from workers.specs.as_json import from_json
from workers.specs.experiment import TrainSpec

#: Wide enough for the whole table where the output is no terminal.
FILE_WIDTH = 170
#: Regimes that a row names as sharing its work.
_NAMED = 8


@dataclass(frozen=True)
class Row:
    """One line: a node, or the sets of one boundary together."""

    label: str
    nodes: tuple[Node, ...]
    detail: str = ""

    @property
    def estimate(self) -> Estimate:
        return total([node.estimate for node in self.nodes])


def total(estimates: Iterable[Estimate]) -> Estimate:
    """Work, bytes and time added up; parameters and memory of the largest."""
    items = list(estimates)
    return Estimate(
        parameters=max((item.parameters for item in items), default=0),
        trainable=max((item.trainable for item in items), default=0),
        peak_bytes=max((item.peak_bytes for item in items), default=0),
        snapshot_bytes=sum(item.snapshot_bytes for item in items),
        flops=sum(item.flops for item in items),
        seconds=sum(item.seconds for item in items),
        optimizer_bytes=max((item.optimizer_bytes for item in items), default=0),
        host_bytes=max((item.host_bytes or 0 for item in items), default=0),
        disk_bytes=max((item.disk_bytes or 0 for item in items), default=0),
    )


def regime_rows(plan: Plan, regime: RegimePlan, domain: Planning) -> list[Row]:
    """The lines of one regime: before each stage the sets it is the first to read, evaluations last. `domain`: what
    its data are."""
    rows: list[Row] = []
    shown: set[str] = set()
    for stage_id in regime.stages:
        stage = plan.node(stage_id)
        rounds = tuple(plan.node(node_id) for node_id in regime.work_of(stage_id))
        read = [set_id for node in rounds for set_id in regime.reads[node.id]]
        fresh = [plan.node(set_id) for set_id in with_previous(plan, read) if set_id not in shown]
        for boundary in dict.fromkeys(boundary_of(node) for node in fresh):
            nodes = tuple(node for node in fresh if boundary_of(node) == boundary)
            shown.update(node.id for node in nodes)
            rows.append(Row(f"snapshots after {boundary[-1][-1]}", nodes, _sets_detail(nodes, domain)))
        decision = regime.decisions[stage_id]
        label = stage.task["name"] + (f" ({len(rounds)} rounds)" if len(rounds) > 1 else "")
        source = domain.raw if decision.source == "images" else decision.source
        rows.append(Row(label, rounds, f"{source}: {decision.reason}{_seen_words(regime, stage_id)}"))
    if regime.averages:
        nodes = tuple(plan.node(node_id) for node_id in regime.averages)
        rows.append(Row("averages", nodes, f"{len(nodes)} of the head's replicas"))
    evaluations = dict.fromkeys((*regime.assembled.values(), regime.validation, regime.test))
    nodes = tuple(plan.node(node_id) for node_id in evaluations)
    rows.append(Row("evaluations", nodes, f"{len(nodes)} of the whole chain"))
    for benchmark, judged in regime.judged.items():
        nodes = tuple(plan.node(node_id) for node_id in judged.values())
        rows.append(Row(f"{benchmark} of stages", nodes, f"asks the whole network, {len(nodes)} times"))
    for question, answers in regime.diagnoses.items():
        nodes = tuple(plan.node(node_id) for node_id in answers.values())
        rows.append(Row(question, nodes, f"measured after {len(nodes)} stage{'s' if len(nodes) != 1 else ''}"))
    return rows


def _seen_words(regime: RegimePlan, stage: str) -> str:
    """The views of a stage that reads no stored ones, whose line has them."""
    seen = regime.views.get(stage)
    if seen is None or regime.decisions[stage].source == "snapshots":
        return ""
    return f", {seen.views} view{'s' if seen.views != 1 else ''} in {seen.epochs} epochs"


def with_previous(plan: Plan, set_ids: Sequence[str]) -> list[str]:
    """The sets and, before them, those they are rolled forward from."""
    found: dict[str, None] = {}
    for set_id in set_ids:
        chain: list[str] = []
        here: str | None = set_id
        while here is not None and here not in found:
            chain.append(here)
            here = plan.node(here).parents.get("previous")
        found.update(dict.fromkeys(reversed(chain)))
    return list(found)


def boundary_of(node: Node) -> tuple[tuple[str, ...], ...]:
    """Return the blocks that the rows of a set went through, by hop."""
    return tuple(tuple(hop) for hop in node.task["boundary"]["hops"])


def _sets_detail(nodes: Sequence[Node], domain: Planning) -> str:
    views = len({node.task["view"] for node in nodes if node.task["split"] == "train"})
    versions = sum(node.task["split"] == "validation" for node in nodes)
    train = domain.train_sets_words(views)
    made = "rolled forward by " if "previous" in nodes[0].parents else "from the start by "
    hops = boundary_of(nodes[0])
    blocks = hops[-1] if "previous" in nodes[0].parents else tuple(block for hop in hops for block in hop)
    if versions > 1:
        train = f"{versions} versions, {train}"
    spec = nodes[0].task["boundary"]
    kept = spec["dtype"] if spec["encoding"] == "plain" else f"{spec['dtype']} as {spec['encoding']}"
    return f"{train} + validation, {kept}, {made}{', '.join(abbreviated(blocks))}"


def render(prepared: Prepared) -> RenderableType:
    """All tables."""
    plan, config = prepared.plan, prepared.config
    head = Text()
    head.append(f"{config.run}", style="bold")
    head.append(
        f"  {_input(prepared)}, seed {config.seed}\n",
    )
    head.append(f"{len(plan.nodes)} nodes -> {config.run_dir}, store {config.store}")
    parts: list[RenderableType] = [head]
    optimizer = config.family.traits.large_optimizer
    for regime in plan.regimes.values():
        parts += [Text(), _table(plan, regime, config.domain, optimizer)]
        if regime.boundaries:
            parts.append(_boundaries(regime))
    shared = [node for node in plan.nodes if node.shared]
    parts += [Text(), _summary(plan, shared, optimizer)]
    parts += [Text(sentence) for sentence in (*_notes(prepared), reuse_line(prepared))]
    return Group(*parts)


def _notes(prepared: Prepared) -> Iterator[str]:
    """Sentences below the tables: what overlaps, what may be left out, and what all of it takes."""
    plan, config = prepared.plan, prepared.config
    everything = total(node.estimate for node in plan.nodes)
    slots = config.resources.slots
    yield from gang_words(prepared)
    for regime in plan.regimes.values():
        if regime.rounds:
            yield overlap_words(plan, regime, slots)
    for regime in plan.regimes.values():
        if regime.run_exit:
            asked = ", ".join(f"{key} {value:g}" for key, value in regime.run_exit.items())
            yield f"{regime.name} leaves out the stages after the network has reached run_exit ({asked})."
    for name, regime in plan.regimes.items():
        stages = [
            StageTraining(tuple(node.task["trained"]), from_json(TrainSpec, node.task["train"]))
            for node in map(plan.node, regime.stages)
        ]
        noted = config.family.notes(config.regime(name).model, prepared.found, stages)
        yield from (f"{name}: {note}" for note in (*noted, *regime.notes))
    if plan.unmeasured:
        yield (
            "Not measured yet (snapshots.costs: measured): what is stored is decided by counted work here, and for "
            "good once the run has measured one of its slots."
        )
    if prepared.stored_data is not None:
        found = data_summary(prepared.stored_data)
        yield f"Data, prepared already: {'; '.join(data_lines(found))}."
        yield from (f"Warning: data: {warning}." for warning in found.warnings)
    yield from (f"Warning: {warning}." for warning in prepared.warnings)
    basis = "measured (resources.gflops)" if config.resources.gflops != "auto" else "nominal speeds"
    yield (
        f"Predicted: {human_seconds(everything.seconds)} of work in one slot (slots: {slots}), "
        f"at most {human_bytes(plan.peak_snapshot_bytes)} of snapshots at one time, "
        f"{human_bytes(everything.snapshot_bytes)} written. Times are rough: {basis}. Nothing was run."
    )


def gang_words(prepared: Prepared) -> Iterator[str]:
    """Say whose memory the figures of stages are, where a gang trains them."""
    gang = prepared.config.resources.gang
    if gang.size is None:
        return
    stages = [node for node in prepared.plan.nodes if node.trains]
    together = [node for node in stages if node.estimate.ranks]
    if gang.size == "auto":
        counted = max((node.estimate.ranks or 1 for node in together), default=1)
        basis = f"the {counted} GPUs of this machine" if counted > 1 else "one device, since nobody knows here of more"
        yield f"resources.gang.size auto is counted as {basis}; a number says what a rank of so many would hold."
    if together:
        only = (
            "" if len(together) == len(stages) else f" ({len(together)} of {len(stages)}; others train on one device)"
        )
        yield (
            f"Memory of stages is that of one rank of {together[0].estimate.ranks} (resources.gang.strategy "
            f"{gang.strategy}){only}; work and time are those of one device, without what ranks send to each other."
        )


def overlap_words(plan: Plan, regime: RegimePlan, slots: int | str) -> str:
    """What a wave gains on several slots, in a sentence. `slots` `auto` counts as all that it can use."""
    nodes = [node for node in plan.nodes if regime.name in node.regimes]
    seconds = {node.id: node.estimate.seconds for node in nodes}
    work, path = makespan.work_s(nodes, seconds), makespan.critical_path_s(nodes, seconds)
    count = regime.width if slots == "auto" else int(slots)
    taken = makespan.makespan_s(nodes, seconds, count)
    return (
        f"{regime.name}: {human_seconds(work)} of work, {human_seconds(path)} of it one after the other, so at most "
        f"{work / path:.1f}x as fast on any number of slots; on {count} about {human_seconds(taken)} "
        f"({work / taken:.1f}x)."
    )


def _columns(title: str, optimizer: bool) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    names = ["parameters", "trainable", "peak memory", "snapshots", "FLOP", "time"]
    if optimizer:
        names.insert(3, "optimizer")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("input", overflow="fold")
    return table


def _figures(item: Estimate, optimizer: bool) -> tuple[str, ...]:
    state = (human_bytes(item.optimizer_bytes) if item.optimizer_bytes else "",)
    return (
        human_count(item.parameters),
        human_count(item.trainable),
        human_bytes(item.peak_bytes) if item.peak_bytes else "",
        *(state if optimizer else ()),
        human_bytes(item.snapshot_bytes) if item.snapshot_bytes else "",
        human_flops(item.flops),
        human_seconds(item.seconds),
    )


def _input(prepared: Prepared) -> str:
    """The model and its data in a few words."""
    config = prepared.config
    model = config.family.words(config.model, prepared.found)
    return f"{model} on {config.domain.words(config.data, prepared.data, human_count)}"


def _table(plan: Plan, regime: RegimePlan, domain: Planning, optimizer: bool) -> Table:
    title = regime.name if regime.name == regime.kind else f"{regime.name} ({regime.kind})"
    table = _columns(title, optimizer)
    rows = regime_rows(plan, regime, domain)
    for row in rows:
        others = {name for node in row.nodes for name in node.regimes if name != regime.name}
        detail = row.detail + (f" (shared with {_named(sorted(others))})" if others else "")
        style = "dim" if not row.nodes[0].trains else ""
        table.add_row(row.label, *_figures(row.estimate, optimizer), detail, style=style)
    table.add_section()
    whole = total(row.estimate for row in rows)
    peak = f"at most {human_bytes(regime.peak_snapshot_bytes)} of snapshots at one time"
    table.add_row("total", *_figures(whole, optimizer), peak if regime.peak_snapshot_bytes else "", style="bold")
    return table


def _named(regimes: Sequence[str]) -> str:
    """The first few by name, the others by their number: of thousands the tables would be as long as their square."""
    named = ", ".join(regimes[:_NAMED])
    return named if len(regimes) <= _NAMED else f"{named} and {len(regimes) - _NAMED} more"


def _boundaries(regime: RegimePlan) -> Table:
    """What each boundary costs stored and not stored."""
    basis = regime.boundaries[0].basis
    title = f"{regime.name}: snapshots or recompute, {basis} speeds"
    table = Table(title=title, title_justify="left", title_style="dim", show_edge=False, pad_edge=False)
    table.add_column("after", no_wrap=True)
    by_view = any(each.views is not None for each in regime.boundaries)
    for name in (*(("views",) if by_view else ()), "snapshots", "to make", "to read", "to recompute"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("decided", no_wrap=True)
    for each in regime.boundaries:
        table.add_row(
            each.label,
            *((str(each.views),) if by_view else ()),
            human_bytes(each.bytes),
            seconds_text(each.make_seconds),
            seconds_text(each.read_seconds),
            seconds_text(each.recompute_seconds),
            each.source,
            style="dim",
        )
    return table


def _summary(plan: Plan, shared: Sequence[Node], optimizer: bool) -> Table:
    table = _columns("shared", optimizer)
    for node in shared:
        used = "" if len(node.regimes) == len(plan.regimes) else _named(node.regimes)
        table.add_row(node.label, *_figures(node.estimate, optimizer), used)
    return table


def print_plan(prepared: Prepared, stream: TextIO | None = None) -> None:
    """Write the tables to `stream` (standard output)."""
    print_wide(render(prepared), stream)


def print_wide(tables: RenderableType, stream: TextIO | None = None) -> None:
    """Write tables as wide as the terminal, or as they want to be."""
    stream = sys.stdout if stream is None else stream
    width = shutil.get_terminal_size().columns if stream.isatty() else FILE_WIDTH
    Console(file=stream, width=width, highlight=False, soft_wrap=False).print(tables)
