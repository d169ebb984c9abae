"""List the regimes, one row each: how a chain is cut into stages, what the cut allows, and how reports show it.

A regime that needs no new kind of node is one row here: configurations, plans, runs and reports ask the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.regimes.blocks import BlockRule
from orchestrator.regimes.stages import Cut, Stage, by_blocks, end_to_end, layer_wise, segmented


@dataclass(frozen=True, kw_only=True)
class RegimeKind:
    """One row. `layout` takes the names of the blocks in forward order."""

    layout: Callable[[tuple[str, ...], Cut], tuple[Stage, ...]]
    #: What reports call a regime that is named after its kind.
    title: str
    #: What it trains, for the cards of a report.
    words: str
    #: The same where the network is a language model; empty: `words`.
    text_words: str = ""
    #: Colours of regimes of this kind in figures, first to last.
    shades: tuple[str, ...] = ("#5c6773", "#39424c", "#8a949e", "#b3bac1")
    #: Trains the whole network in one stage: stores no boundaries.
    whole: bool = False
    #: Others are compared with it.
    baseline: bool = False
    #: Its parts take turns at being trained; None: all are trained at every step.
    blocks: BlockRule | None = None
    #: `split.base` and `split.head` cut the chain, and every stage trains the same global head.
    has_base: bool = False
    #: Its stages may overlap (`pipeline: wavefront`).
    may_wave: bool = False
    #: The network is whole after every stage, so a good score may end the regime early (`run_exit`).
    may_end_early: bool = False
    #: What `variant` may say, the default first -> whether the chain's head is then pooling and classifier alone.
    variants: Mapping[str, bool] = field(default_factory=dict)
    #: Runs where a configuration names no regimes.
    by_default: bool = False


REGIMES: dict[str, RegimeKind] = {
    "e2e": RegimeKind(
        layout=end_to_end,
        title="End-to-end",
        words="all blocks at once, one loss",
        shades=("#3b6fb6", "#1f3f70", "#5b93d9", "#7a7fc4"),
        whole=True,
        baseline=True,
        by_default=True,
    ),
    "lw": RegimeKind(
        layout=layer_wise,
        title="Layer-wise",
        words="block after block, each with a local classifier",
        text_words="block after block, each with its own copy of the head",
        shades=("#c2571a", "#7c3610", "#d98a3d", "#b08a2e"),
        variants={"published": True, "mapped": False},
        by_default=True,
    ),
    "segprop": RegimeKind(
        layout=segmented,
        title="SegProp",
        words="segment after segment, each with the network's own head",
        shades=("#0e8a6d", "#07503f", "#5f9e2f", "#2a9fa6"),
        has_base=True,
        may_wave=True,
        may_end_early=True,
        by_default=True,
    ),
    "badam": RegimeKind(
        layout=by_blocks("badam"),
        title="BAdam",
        words="one block after the other with Adam, whose state ends with its turn; one loss",
        shades=("#8b4fa8", "#552a6b", "#b57fcf", "#7a5c99"),
        whole=True,
        # Those of its authors' code; a block is there what a part is here.
        blocks=BlockRule(steps=50, orders=("ascending", "descending", "random")),
    ),
    "lisa": RegimeKind(
        layout=by_blocks("lisa"),
        title="LISA",
        words="the head and a few blocks at a time, drawn by chance; one loss",
        text_words="embedding, head and a few layers at a time, drawn by chance; one loss",
        shades=("#a8324f", "#6b1c30", "#cf6f87", "#8f4a5b"),
        whole=True,
        blocks=BlockRule(steps=20, orders=("sampled",), count=2, ends_always=True),
    ),
}


def layout(kind: str, blocks: Sequence[str], cut: Cut) -> tuple[Stage, ...]:
    """Return the stages of one regime in order."""
    return REGIMES[kind].layout(tuple(blocks), cut)


def kinds_that(allowed: Callable[[RegimeKind], bool]) -> str:
    """Name the kinds whose row says so, for a message."""
    return ", ".join(name for name, row in REGIMES.items() if allowed(row))
