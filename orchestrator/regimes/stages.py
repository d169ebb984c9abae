"""The stages of a regime as pure data: what each trains, what it passes through, which boundary it reads.

This is section 3 of the design, without files, weights or settings of training. Blocks are `0..n-1`; boundary
`d` enters block `d`, boundary `n` the head. With base prefix `p` and a global head of the last `r` blocks,
blocks `p..n-r-1` are intermediate and are trained one group of `segment_size` at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["e2e", "lw", "segprop"]
Group = Literal["e2e", "base", "segments", "head", "final"]


@dataclass(frozen=True)
class Stage:
    """One stage. `hops` lead from the images to the boundary it reads: () when it reads images."""

    name: str
    group: Group
    hops: tuple[tuple[str, ...], ...]
    #: Parts in forward order, with `adapter` or `aux` where the stage has one.
    path: tuple[str, ...]
    #: Parts whose weights this stage commits.
    trained: tuple[str, ...]
    #: Boundaries the adapter leads from and to.
    adapter: tuple[int, int] | None = None
    #: Boundary the local head reads.
    aux: int | None = None


def layout(
    kind: Kind,
    blocks: Sequence[str],
    *,
    base: int,
    head: int,
    segment_size: int,
    frozen_intermediate: bool,
    train_base: bool,
    adapters: bool = True,
    untrained: Collection[str] = (),
    first_segment: int = 1,
) -> tuple[Stage, ...]:
    """The stages of one regime in order. The caller has checked 1 <= base and base + head <= len(blocks).

    `adapters` false: every boundary is the same (decoder layers), so a segment meets the head as it is. `untrained`:
    blocks of the base that stay as they are. `first_segment`: least blocks of LW's first segment (a language model's
    embedding alone is none).
    """
    names = tuple(blocks)
    if kind == "e2e":
        everything = (*names, "head")
        return (Stage("e2e", "e2e", (), everything, everything),)
    if kind == "lw":
        return _layer_wise(names, segment_size, max(base, segment_size + first_segment - 1))
    tail = len(names) - head
    return _segprop(names, base, tail, segment_size, frozen_intermediate, train_base, adapters, frozenset(untrained))


def _layer_wise(blocks: tuple[str, ...], size: int, first: int) -> tuple[Stage, ...]:
    """`first`: blocks of the first segment, so that a deep base is trained in one stage here too."""
    stages: list[Stage] = []
    hops: tuple[tuple[str, ...], ...] = ()
    for start in (0, *range(first, len(blocks), size)):
        group = blocks[start : start + (size if start else first)]
        name = f"stage{len(stages) + 1}-{_span(group)}"
        end = start + len(group)
        stages.append(Stage(name, "segments", hops, (*group, "aux"), group, aux=end))
        hops = (*hops, group)
    # Every block has been trained with a local head by now; the real head has not.
    stages.append(Stage("head", "head", hops, ("head",), ("head",)))
    return tuple(stages)


def _segprop(
    blocks: tuple[str, ...],
    p: int,
    m: int,
    size: int,
    frozen: bool,
    train_base: bool,
    adapters: bool,
    untrained: frozenset[str],
) -> tuple[Stage, ...]:
    """`m = n - r` is the boundary where the global head begins."""
    base, tail = blocks[:p], (*blocks[m:], "head")

    def between(end: int) -> tuple[tuple[str, ...], tuple[int, int] | None]:
        """What stands between boundary `end` and the global head: frozen blocks, an adapter, or nothing."""
        if end == m:
            return (), None
        if frozen:
            return blocks[end:m], None
        return (("adapter",), (end, m)) if adapters else ((), None)

    middle, adapter = between(p)
    if train_base:
        trained = tuple(block for block in base if block not in untrained)
        first = Stage("stage1-base", "base", (), (*base, *middle, *tail), (*trained, *tail), adapter)
    else:
        first = Stage("stage1-base", "base", (base,), (*middle, *tail), tail, adapter)
    stages = [first]
    hops: tuple[tuple[str, ...], ...] = (base,)
    for start in range(p, m, size):
        group = blocks[start : min(start + size, m)]
        middle, adapter = between(start + len(group))
        name = f"stage{len(stages) + 1}-{_span(group)}"
        stages.append(Stage(name, "segments", hops, (*group, *middle, *tail), (*group, *tail), adapter))
        hops = (*hops, group)
    return tuple(stages)


def _span(group: tuple[str, ...]) -> str:
    return group[0] if len(group) == 1 else f"{group[0]}-{group[-1]}"
