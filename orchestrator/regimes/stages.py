"""Cut a chain into stages, as pure data: what each trains, what it passes through, which boundary it reads.

This is section 3 of the design, without files, weights or settings of training. Blocks are `0..n-1`; boundary
`d` enters block `d`, boundary `n` the head. With base prefix `p` and a global head of the last `r` blocks,
blocks `p..n-r-1` are intermediate and are trained one group of `segment_size` at a time. The base is trained at once
or, with `base_segment_size`, in such groups too, while the rest of it stays in the path.

One function for each way of cutting a chain; `table` says which regime uses which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Group = Literal["e2e", "base", "segments", "head", "final", "badam", "lisa"]
#: Name of SegProp's first stage.
FIRST = "stage1-base"


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


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a chain is cut into stages. The caller has checked 1 <= base and base + head <= blocks of the chain."""

    base: int
    head: int
    segment_size: int
    frozen_intermediate: bool
    train_base: bool
    #: False: every boundary is the same (decoder layers), so a segment meets the head as it is.
    adapters: bool = True
    #: Blocks of the base that stay as they are.
    untrained: frozenset[str] = frozenset()
    #: Least blocks of a first segment (a language model's embedding alone is none).
    first_segment: int = 1
    #: Blocks of the base that are trained at a time; None: all of it in one stage.
    base_segment_size: int | None = None
    #: The segment under the global head first, the base last. What lies between is frozen, not omitted.
    top_down: bool = False

    @property
    def first_piece(self) -> int:
        """Blocks of the base that the first stage trains."""
        if self.base_segment_size is None:
            return self.base
        return min(self.base, self.base_segment_size + self.first_segment - 1)


def end_to_end(blocks: tuple[str, ...], cut: Cut) -> tuple[Stage, ...]:
    """Train the whole chain in one stage."""
    everything = (*blocks, "head")
    return (Stage("e2e", "e2e", (), everything, everything),)


def by_blocks(name: Literal["badam", "lisa"]) -> Callable[[tuple[str, ...], Cut], tuple[Stage, ...]]:
    """Make the layout of a regime that trains the whole chain in one stage of this name, not all of it at a time."""

    def layout(blocks: tuple[str, ...], cut: Cut) -> tuple[Stage, ...]:
        path = (*blocks, "head")
        return (Stage(name, name, (), path, tuple(part for part in path if part not in cut.untrained)),)

    return layout


def layer_wise(blocks: tuple[str, ...], cut: Cut) -> tuple[Stage, ...]:
    """Train group after group, each with a local head, and the network's own head last."""
    size = cut.segment_size
    # A deep base is trained in one stage here too.
    first = max(cut.base, size + cut.first_segment - 1)
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


def segmented(blocks: tuple[str, ...], cut: Cut) -> tuple[Stage, ...]:
    """Train the base with the global head, whole or piece after piece, then segment after segment with the same
    head; top down, the other way round: then every boundary is that of the untrained network."""
    p, m = cut.base, len(blocks) - cut.head  # the global head begins at boundary m
    tail = (*blocks[m:], "head")

    def between(end: int) -> tuple[tuple[str, ...], tuple[int, int] | None]:
        """What stands between boundary `end` and the global head: frozen blocks, an adapter, or nothing."""
        if cut.frozen_intermediate:
            return blocks[end:m], None
        left, end = blocks[end:p], max(end, p)  # the rest of the base stays in the path
        if end == m:
            return left, None
        return ((*left, "adapter"), (end, m)) if cut.adapters else (left, None)

    stages: list[Stage] = []
    hops: tuple[tuple[str, ...], ...] = ()
    if not cut.train_base:
        hops = (blocks[:p],)
        if not cut.top_down:
            middle, adapter = between(p)
            stages.append(Stage(FIRST, "base", hops, (*middle, *tail), tail, adapter))
    groups: list[_Segment] = []
    for group, kind in _groups(blocks[:m], cut):
        groups.append(_Segment(group, kind, hops))
        hops = (*hops, group)
    for each in reversed(groups) if cut.top_down else groups:
        end = sum(map(len, each.hops)) + len(each.blocks)
        middle, adapter = between(end)
        name = f"stage{len(stages) + 1}-{_span(each.blocks) if each.hops else 'base'}"
        trained = tuple(block for block in each.blocks if block not in cut.untrained)
        path = (*each.blocks, *middle, *tail)
        stages.append(Stage(name, each.group, each.hops, path, (*trained, *tail), adapter))
    return tuple(stages)


@dataclass(frozen=True)
class _Segment:
    """Blocks that are trained together, before they are a stage."""

    blocks: tuple[str, ...]
    group: Group
    hops: tuple[tuple[str, ...], ...]


def _groups(blocks: tuple[str, ...], cut: Cut) -> Iterator[tuple[tuple[str, ...], Group]]:
    """Yield the blocks that are trained together, with the group that settings know their stage by."""
    p = cut.base
    if cut.train_base:
        first = cut.first_piece
        yield blocks[:first], "base"
        for start in range(first, p, cut.base_segment_size or p):
            yield blocks[start : min(start + (cut.base_segment_size or p), p)], "base"
    for start in range(p, len(blocks), cut.segment_size):
        yield blocks[start : start + cut.segment_size], "segments"


def _span(group: tuple[str, ...]) -> str:
    return group[0] if len(group) == 1 else f"{group[0]}-{group[-1]}"
