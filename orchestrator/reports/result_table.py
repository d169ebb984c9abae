"""Print the regimes' results as a table on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.reports.quality import Quality, improvements, original_of, perplexity_text, quality_of
from orchestrator.reports.words import TITLES, MemoryBasis, finished
from orchestrator.units import DASH, bytes_text, count_text, percent_text, ratio_text, seconds_text


def print_table(summary: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """The regimes side by side: a table in a terminal, aligned plain text in a file or pipe."""
    rows = _result_rows(summary)
    console = Console(file=stream or sys.stdout, highlight=False)
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


def _result_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    regimes = summary["regimes"]
    memory = MemoryBasis(summary)
    base = next((r for r in regimes.values() if r["kind"] == "e2e" and finished(r)), None)
    peak = "peak device memory" if memory.device else "peak host growth"
    quality = quality_of(summary)
    gains = improvements(summary, quality)
    short = "acc." if quality.metric == "accuracy" else "loss"
    rows = [
        [
            "regime",
            f"test {short}",
            *(["perplexity"] if quality.metric == "loss" else []),
            f"val. {short}",
            *(["of e2e's gain"] if gains else []),
            peak,
            "of e2e",
            "time",
            "of e2e",
            "trained",
            "snapshots",
            "stages",
        ]
    ]
    if original_of(summary) or original_of(summary, "validation"):
        scores = _scores(original_of(summary), original_of(summary, "validation"), quality)
        rows.append(["as it came", *scores, *[DASH] * (len(rows[0]) - 1 - len(scores))])
    for name, regime in regimes.items():
        stages = regime["stages"]
        done = [stage for stage in stages if stage["status"] in ("done", "reused")]
        reused = sum(stage["reused"] for stage in stages)
        count = f"{len(done)}/{len(stages)}"
        if regime["status"] == "failed":
            count += " failed"
        elif reused:
            count += " reused" if reused == len(stages) else f", {reused} reused"
        compared = base is not None and finished(regime)
        ratio = regime["seconds"] / base["seconds"] if base and compared and base["seconds"] else None
        rows.append(
            [
                f"{TITLES[name]} ({name})" if name in TITLES else name,
                *_scores(regime["final"]["metrics"], regime["final"]["validation"], quality),
                *([percent_text(gains[name].share if name in gains else None, 0).replace("-", "−")] if gains else []),
                bytes_text(memory.of(regime)),
                percent_text(memory.share(memory.of(regime)), 0) if compared else DASH,
                seconds_text(regime["seconds"] or None),
                ratio_text(ratio),
                count_text(regime["trainable_parameters"]),
                bytes_text(regime["snapshot"]["bytes_written"]),
                count,
            ]
        )
    return rows


def _scores(test: Mapping[str, Any], validation: Mapping[str, Any], quality: Quality) -> list[str]:
    beside = [perplexity_text(test)] if quality.metric == "loss" else []
    return [quality.written(quality.value(test)), *beside, quality.written(quality.value(validation))]
