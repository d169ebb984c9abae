"""Make block schedules of a stage that trains a whole network: which of its parts take turns, which always train.

What a plan predicts of one is the mean and the most over `choices`: one for every block, each as likely as the others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from workers.specs.tasks import BlockOrder, BlockSchedule

HEAD = "head"


@dataclass(frozen=True, kw_only=True)
class BlockRule:
    """What a kind of regime lets a configuration say of its blocks."""

    #: Optimizer steps of a choice where nothing is said.
    steps: int
    #: Orders there are; the first is the default.
    orders: tuple[BlockOrder, ...]
    #: Blocks at one time where nothing is said; None: always one.
    count: int | None = None
    #: Embedding and head train at every step and are no blocks.
    ends_always: bool = False


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """What a regime says of its blocks, with the defaults of its kind."""

    steps: int
    order: BlockOrder
    count: int = 1


@dataclass(frozen=True)
class Trained:
    """What a stage trains. `stem`: parts before the layers (an embedding)."""

    parts: Sequence[str]
    stem: Collection[str] = ()
    #: Stem and head hold a matrix together.
    tied: bool = False
    #: The head's matrix stays as it is: a normalisation is left of it, and of a stem that shares the matrix nothing.
    frozen_head: bool = False


def blocks_of(rule: BlockRule, trained: Trained) -> tuple[tuple[str, ...], ...]:
    """Return what takes turns, in chain order: every part by itself, but that a matrix which two parts share is one
    block's, and a normalisation alone goes with the layer before it."""
    layers = [(part,) for part in trained.parts if part not in trained.stem and part != HEAD]
    if rule.ends_always:
        return tuple(layers)
    stem = [(part,) for part in trained.parts if part in trained.stem]
    if trained.frozen_head:
        *before, last = layers
        return (*([] if trained.tied else stem), *before, (*last, HEAD))
    if trained.tied and stem:
        *before, shared = stem
        return (*before, (*shared, HEAD), *layers)
    return (*stem, *layers, (HEAD,))


def block_schedule(rule: BlockRule, settings: BlockSettings, trained: Trained) -> BlockSchedule:
    """Return the schedule of a stage."""
    ends = tuple(part for part in trained.parts if part in trained.stem or part == HEAD)
    return BlockSchedule(
        blocks=blocks_of(rule, trained),
        steps=settings.steps,
        order=settings.order,
        count=settings.count,
        always=ends if rule.ends_always else (),
    )


def choices(schedule: BlockSchedule) -> tuple[frozenset[str], ...]:
    """Return sets of parts that are trained at one time, in each of which stand `count` neighbours: every block is in
    as many, so means over them are those of all that can be chosen, and the lowest blocks are among them, which reach
    deepest."""
    blocks = schedule.blocks
    return tuple(
        frozenset(
            (
                *schedule.always,
                *(part for place in range(schedule.count) for part in blocks[(first + place) % len(blocks)]),
            )
        )
        for first in range(len(blocks))
    )


def turns_words(schedule: BlockSchedule, steps: int) -> str:
    """Say how the parts of a stage of so many steps take turns, and whether each of them has one."""
    blocks, turns = len(schedule.blocks), -(-steps // schedule.steps)
    beside = f" beside {' and '.join(schedule.always)}" if schedule.always else ""
    chosen = f"{schedule.count} of {blocks} blocks at a time{beside}, {schedule.order}"
    words = (
        f"Trains {chosen}, {schedule.steps} steps each: about {turns} turn{'s' if turns > 1 else ''} in {steps} steps."
    )
    if turns * schedule.count >= blocks:
        return words
    most = steps * schedule.count // blocks
    remedy = f"blocks.steps at most {most}, or with more epochs" if most else "more epochs"
    return f"{words} Not every block has its turn; with {remedy}, it may."
