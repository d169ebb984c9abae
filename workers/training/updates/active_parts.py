"""Say which parts of a stage are trained at each of its steps: block coordinate descent, as pure arithmetic.

BAdam (Luo et al., arXiv 2404.02827) takes block after block, LISA (Pan et al., arXiv 2403.17919) draws some layers
beside the embedding and the head. In both a choice is kept for some steps, and the optimizer's state of what was chosen
ends with it. A choice is a function of the seed and the step alone, so a stage that was killed goes on with the same
one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workers.seeds import derive_seed
from workers.specs.tasks import BlockOrder, BlockSchedule

#: What names a stage to `derive_seed`.
Seed = Sequence[str | int]


def _ascending(blocks: int, place: int, seed: Seed) -> int:
    return place


def _descending(blocks: int, place: int, seed: Seed) -> int:
    return blocks - 1 - place


def _random(blocks: int, place: int, seed: Seed) -> int:
    return _shuffled(blocks, seed)[place]


#: Order -> the block at a place of a cycle through all of them, by how many there are, the place and the cycle's seed.
_CYCLES: dict[BlockOrder, Callable[[int, int, Seed], int]] = {
    "ascending": _ascending,
    "descending": _descending,
    "random": _random,
}


def turn_of(schedule: BlockSchedule, step: int) -> int:
    """Return which choice step `step` of the stage belongs to; both count from 0."""
    return step // schedule.steps


def active_parts(schedule: BlockSchedule, seed: Seed, turn: int) -> frozenset[str]:
    """Return the parts that are trained in a turn, those that are always trained among them."""
    blocks = schedule.blocks
    if schedule.order == "sampled":
        chosen = _shuffled(len(blocks), (*seed, "blocks", turn))[: schedule.count]
    else:
        cycle, place = divmod(turn, len(blocks))
        chosen = [_CYCLES[schedule.order](len(blocks), place, (*seed, "blocks", cycle))]
    return frozenset((*schedule.always, *(part for index in chosen for part in blocks[index])))


def _shuffled(count: int, seed: Seed) -> list[int]:
    """Permute 0..count-1."""
    return sorted(range(count), key=lambda index: (derive_seed(*seed, index), index))
