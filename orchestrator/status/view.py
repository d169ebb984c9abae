"""Show `segprop status` to people: one table a regime, and what is under way beside the stages."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.progress import describe
from orchestrator.reports.words import STATE_WORDS, data_lines
from orchestrator.status.observe import FAILED, RUNNING, STOPPED, Observer, RegimeStatus, RunStatus, StageStatus
from orchestrator.units import DASH, bytes_text, percent_text, rate_text, score_text, seconds_text

COLOURS = {"done": "green", RUNNING: "cyan", FAILED: "red", STOPPED: "yellow", "killed": "yellow"}
#: Columns of a table that is written to a file.
WIDE = 200
HEADER = ("stage", "state", "epochs", "val.", "chain", "loss", "rate", "waits", "time", "left", "attempts", "machine")
LEFT = (0, 1, len(HEADER) - 1)


def show(status: RunStatus, stream: TextIO | None = None) -> None:
    """Print one look."""
    _console(stream).print(render(status))


def _console(stream: TextIO | None) -> Console:
    console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDE  # a file has no edge
    return console


def watch(observer: Observer, every_s: float, stream: TextIO | None = None) -> RunStatus:
    """Look again every `every_s` seconds until the run has ended; the last look. In a terminal the table is redrawn,
    elsewhere printed whenever something but the clock has changed."""
    console = _console(stream)
    status = observer.look()
    if not console.is_terminal:
        said = ""
        while True:
            text = _plain(status)
            if text != said:
                console.print(render(status))
                said = text
            if status.ended:
                return status
            time.sleep(every_s)
            status = observer.look()
    with Live(render(status), console=console, auto_refresh=False) as live:
        while not status.ended:
            time.sleep(every_s)
            status = observer.look()
            live.update(render(status), refresh=True)
    return status


def _plain(status: RunStatus) -> str:
    """Return what makes a look worth printing: states and epochs, not seconds."""
    stages = [(stage.state, stage.epochs) for regime in status.regimes.values() for stage in regime.stages]
    return repr((status.state, stages, [task.label for task in status.tasks], list(status.failures)))


def render(status: RunStatus) -> RenderableType:
    parts: list[RenderableType] = [_headline(status)]
    for name, regime in status.regimes.items():
        parts += [Text(), _regime_line(name, regime), _table(regime.stages)]
    if status.tasks:
        parts += [Text(), Text("beside the stages", style="bold")]
        for task in status.tasks:
            machine = f" on {task.machine}" if task.machine else ""
            parts.append(Text(f"  {task.label}{machine}: {describe(task.progress)}"))
    if status.away is not None:
        parts.append(Text(f"store away: {status.away}", style="red"))
    if status.data is not None:
        parts += [Text(), Text(f"data: {'; '.join(data_lines(status.data))}")]
        parts += [Text(f"data: {warning}", style="yellow") for warning in status.data.warnings]
    for label, reason in status.failures.items():
        parts.append(Text(f"{label}: failed: {reason}", style="red"))
    return Group(*parts)


def _headline(status: RunStatus) -> Text:
    nodes = status.nodes
    counts = ", ".join(f"{nodes[key]} {key}" for key in ("running", "waiting", "failed") if nodes[key])
    words = [
        f"{nodes['done']} of {nodes['total']} tasks done" + (f" ({counts})" if counts else ""),
        f"snapshots {bytes_text(status.snapshot_bytes)}",
    ]
    if status.last_activity_s is not None:
        words.append(f"last activity {seconds_text(round(status.last_activity_s))} ago")
    line = Text.assemble(
        (status.run, "bold"),
        ": ",
        (STATE_WORDS.get(status.state, status.state), COLOURS.get(status.state, "")),
        " · " + " · ".join(words),
    )
    if status.driver is not None:
        line.append(f"\n{status.driver}")
    return line


def _regime_line(name: str, regime: RegimeStatus) -> Text:
    line = Text.assemble((name, "bold"), ": ", (regime.state, COLOURS.get(regime.state, "")))
    for split, metrics in (("validation", regime.validation), ("test", regime.test)):
        if metrics:
            line.append(f" · {split} {score_text(metrics)}")
    return line


def _table(stages: Iterable[StageStatus]) -> Table:
    rows = [HEADER, *map(_row, stages)]
    # What nothing is known of yet has no column.
    shown = [column for column in range(len(HEADER)) if any(row[column] != DASH for row in rows[1:])]
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for column in shown:
        table.add_column(
            HEADER[column], justify="left" if column in LEFT else "right", header_style="dim", no_wrap=True
        )
    for row in rows[1:]:
        table.add_row(*(Text(row[column], style=COLOURS.get(row[column], "")) for column in shown))
    return table


def _row(stage: StageStatus) -> tuple[str, ...]:
    return (
        f"  {stage.name}",
        stage.state,
        str(stage.epochs) if stage.epochs_planned is None else f"{stage.epochs}/{stage.epochs_planned}",
        score_text(stage.metrics) or DASH,
        score_text(stage.assembled) or DASH,
        DASH if stage.loss is None else f"{stage.loss:.4f}",
        DASH if stage.rate is None else f"{rate_text(stage.rate)}/s",
        percent_text(stage.waiting, 0),
        seconds_text(stage.seconds),
        seconds_text(stage.seconds_left),
        str(stage.attempts) if stage.attempts else DASH,
        stage.machine or DASH,
    )
