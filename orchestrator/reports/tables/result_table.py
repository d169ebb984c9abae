"""Print the regimes' results as a table on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.reports.quality import Quality, improvements, original_of, perplexity_text, quality_of
from orchestrator.reports.records import Metrics, RegimeSummary, Summary
from orchestrator.reports.tables import benchmarks
from orchestrator.reports.words import MemoryBasis, baseline_of, of_kind, trained_text
from orchestrator.units import DASH, bytes_text, percent_text, ratio_text, seconds_text


def print_table(summary: Summary, stream: TextIO | None = None) -> None:
    """Print the regimes one below another, in a terminal too narrow for that side by side; aligned plain text in a file
    or pipe."""
    console = Console(file=stream or sys.stdout, highlight=False)
    rows = _result_rows(summary)
    if not console.is_terminal or _widest(rows) <= console.width:
        print_rows(console, rows)
        _print_notes(console, summary)
        return
    header, *body = rows
    while body:
        # As many regimes as fit beside their figures' names, and at least one.
        count = max(
            (n for n in range(1, len(body) + 1) if _widest(_turned(header, body[:n])) <= console.width), default=1
        )
        print_rows(console, _turned(header, body[:count]))
        body = body[count:]
    _print_notes(console, summary)


def _print_notes(console: Console, summary: Summary) -> None:
    for sentence in benchmarks.notes_of(summary):
        console.file.write(f"{sentence}\n")
    console.file.flush()


def print_places(run_dir: Path, summary: Summary) -> None:
    """Print where the report and the exported models of a run lie."""
    places = [
        run_dir / "report.html",
        *(run_dir / regime.export for regime in summary.regimes.values() if regime.export),
    ]
    for title, place in zip(("report", *("model" for _ in places[1:])), places, strict=True):
        sys.stdout.write(f"{title}  {place}\n")
    sys.stdout.flush()


def _turned(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[list[str]]:
    """Make columns of rows: the names of the figures are the first."""
    return [list(column) for column in zip(header, *body, strict=True)]


def _widest(rows: Sequence[Sequence[str]]) -> int:
    """Count the characters across of a table that rich draws of these rows."""
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return sum(widths) + 3 * len(widths) + 1


def print_rows(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Print a header and its rows, the first column to the left: as a table in a terminal, else as aligned text."""
    header, *body = rows
    if console.is_terminal:
        table = Table(header_style="bold")
        for index, title in enumerate(header):
            table.add_column(title, justify="left" if index == 0 else "right")
        for row in body:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        console.file.write("  ".join(cells).rstrip() + "\n")
    console.file.flush()


def _result_rows(summary: Summary) -> list[list[str]]:
    memory = MemoryBasis(summary)
    quality = quality_of(summary)
    gains = improvements(summary, quality)
    short = quality.row.short
    yardstick, judged = baseline_of(summary) or "e2e", benchmarks.asked_of(summary)
    header = [
        "regime",
        f"test {short}",
        *(["perplexity"] if quality.perplexed else []),
        f"val. {short}",
        *([f"of {yardstick}'s gain"] if gains else []),
        "peak device memory" if memory.device else "peak host growth",
        f"of {yardstick}",
        "time",
        f"of {yardstick}",
        "trained",
        "snapshots",
        "stages",
    ]
    header[1:1] = map(benchmarks.title, judged)
    rows = [header]
    if original_of(summary) or original_of(summary, "validation") or summary.judged:
        scores = _scores(original_of(summary), original_of(summary, "validation"), quality)
        scores = [*benchmarks.cells(summary.judged, judged), *scores]
        rows.append(["as it came", *scores, *[DASH] * (len(header) - 1 - len(scores))])
    whole = summary.regimes.get(yardstick)
    base = whole if whole is not None and whole.done else None
    for name, regime in summary.regimes.items():
        peak, compared = memory.of(regime), base is not None and regime.done
        ratio = regime.seconds / base.seconds if base and compared and base.seconds else None
        title, gain = of_kind(name).title, gains.get(name)
        rows.append(
            [
                name if title == name else f"{title} ({name})",
                *benchmarks.cells(regime.judged, judged),
                *_scores(regime.final.metrics, regime.final.validation, quality),
                *([percent_text(gain.share if gain else None, 0).replace("-", "−")] if gains else []),
                bytes_text(peak),
                percent_text(memory.share(peak), 0) if compared else DASH,
                seconds_text(regime.seconds or None),
                ratio_text(ratio),
                trained_text(regime),
                bytes_text(regime.snapshot.bytes_written),
                _stages(regime),
            ]
        )
    return rows


def _stages(regime: RegimeSummary) -> str:
    """Write how many of the stages are done: `3/5`, `5/5 reused`, `2/5 failed`."""
    total, reused = len(regime.stages), sum(stage.reused for stage in regime.stages)
    count = f"{sum(stage.done for stage in regime.stages)}/{total}"
    if regime.status == "failed":
        return f"{count} failed"
    if not reused:
        return count
    return f"{count} reused" if reused == total else f"{count}, {reused} reused"


def _scores(test: Metrics, validation: Metrics, quality: Quality) -> list[str]:
    beside = [perplexity_text(test)] if quality.perplexed else []
    return [quality.written(quality.value(test)), *beside, quality.written(quality.value(validation))]
