"""Rows of tables about work: how often blocks ran, what was decided for boundaries, every task with its prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.reports.part_names import abbreviated, follows, in_order
from orchestrator.reports.records import ForwardCount, RegimeSummary, WorkFigures, WorkSummary
from orchestrator.reports.words import STATUS_WORDS
from orchestrator.units import DASH, bytes_text, ratio_text, seconds_text

#: Regime -> what it is called, or its colour.
Named = Mapping[str, str]


def forward_rows(regimes: Mapping[str, RegimeSummary], names: Named, palette: Named) -> list[dict[str, str]]:
    """Return a row a block; neighbours that ran equally often share one."""
    return [
        {
            "regime": names[name],
            "colour": palette[name],
            "block": ", ".join(abbreviated(blocks)),
            "samples": f"{counted.samples:,}",
            "pairs": f"{counted.sample_views:,}" if counted.sample_views else DASH,
            "ratio": ratio_text(counted.per_sample_view),
        }
        for name, regime in regimes.items()
        for blocks, counted in _equal_neighbours(regime.forwards)
    ]


def boundary_rows(regimes: Mapping[str, RegimeSummary], names: Named, palette: Named) -> list[dict[str, str]]:
    """Return what was decided for every boundary, with what it was predicted to cost and what it did."""
    rows = []
    for name, regime in regimes.items():
        for item in regime.boundaries:
            row = {
                "regime": names[name],
                "colour": palette[name],
                "label": item.label,
                "source": item.source,
                "reason": item.reason,
                "basis": item.basis,
                "views": DASH if item.views is None else str(item.views),
            }
            for suffix, figures in (("predicted", item.predicted), ("measured", item.measured)):
                row[f"bytes_{suffix}"] = bytes_text(figures.bytes)
                row[f"make_seconds_{suffix}"] = seconds_text(figures.make_seconds)
                row[f"read_seconds_{suffix}"] = seconds_text(figures.read_seconds)
                row[f"recompute_seconds_{suffix}"] = seconds_text(figures.recompute_seconds)
            rows.append(row)
    return rows


def _equal_neighbours(forwards: Mapping[str, ForwardCount]) -> list[tuple[list[str], ForwardCount]]:
    groups: list[tuple[list[str], ForwardCount]] = []
    for block in in_order(list(forwards)):
        if groups and block.startswith("layer") and follows(groups[-1][0][-1], block):
            blocks, counted = groups[-1]
            if counted == forwards[block]:
                blocks.append(block)
                continue
        groups.append(([block], forwards[block]))
    return groups


#: Kind of node -> the figures that mean something for it.
_RELEVANT: Mapping[str, Sequence[str]] = {
    "train": ("peak_bytes", "seconds"),
    "materialize": ("snapshot_bytes", "seconds"),
    "evaluate": ("seconds",),
    "average": ("seconds",),
    "questions": ("seconds",),
    "judge": ("seconds",),
    "boundaries": ("seconds",),
    "data": ("seconds",),
    "model": ("seconds",),
}


def work_row(item: WorkSummary) -> dict[str, str]:
    """Return a task's figures, predicted and measured, as far as they mean something for its kind."""
    row = {"label": item.label, "status": STATUS_WORDS.get(item.status, item.status)}
    shown = _RELEVANT.get(item.kind, ())
    for suffix, figures in (("predicted", item.predicted), ("measured", item.measured)):
        row |= {f"{key}_{suffix}": text if key in shown else "" for key, text in _figure_texts(figures).items()}
    return row


def _figure_texts(figures: WorkFigures) -> dict[str, str]:
    return {
        "peak_bytes": bytes_text(figures.peak_bytes),
        "snapshot_bytes": bytes_text(figures.snapshot_bytes),
        "seconds": seconds_text(figures.seconds),
    }
