"""Find the settings nearest to those asked for with which stages fit a device. Pure: what settings take is asked of the
caller.

Nearest is what changes the least of what is learned. First what leaves every sum as it is: activations computed again,
frozen blocks on the host, smaller micro-batches; and updates on the host, which rounds differently. Then a base that is
trained in pieces, the largest first. Then what rounds (moments in 8 bits, frozen matrices in 8 or 4) and what trains
less (the LM head left as it is, low-rank adapters). Every change of the first kind comes before any of the second, and
those before any of the third. Micro-batches of a few samples keep a device waiting, so streaming and recomputing go
before them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

#: Micro-batches smaller than this cost more time than recomputing activations does: 11,726 tokens a second with one
#: sample of 1,024, 49,400 with four (benchmarks/results/lm_memory-cuda.md, lm_memory-cuda-micro4.md).
EASY_MICRO = 4
#: How far such small micro-batches are from what was asked.
_SMALL = 4

#: Changed settings, dotted: of `training`, or of the section that stands before the first dot (`SECTIONS`).
Settings = Mapping[str, Any]
SECTIONS = ("memory", "split")
#: One thing that may be changed: how far each change is from what was asked, and the settings that make it.
Choice = Sequence[tuple[int, Settings]]
#: Blocks of the base that are trained at a time.
PIECES = "split.base_segment_size"
#: Into how many pieces a base may be cut; and into one a block.
_CUTS = (2, 3, 4, 6, 9)

#: What may become of settings without a change of what is learned.
_SAME: dict[str, tuple[tuple[int, Any], ...]] = {
    "activation_checkpointing": ((1, True),),
    "memory.activations": ((1, "recompute"),),
    "memory.frozen": ((2, "host"),),
    "memory.optimizer": ((8, "host"),),
}
#: What may become of settings that decide what is learned.
_LEARNED: dict[str, tuple[tuple[int, Any], ...]] = {
    "optimizer.name": ((4, "adamw8bit"),),
    "frozen_weights": ((5, "int8"), (6, "nf4")),
    "lm_head": ((12, "frozen"),),
    "lora.rank": ((24, 16),),
}


def section_of(key: str) -> tuple[str, str]:
    """Return the section of a dotted setting, and the setting in it."""
    section, dot, rest = key.partition(".")
    return (section, rest) if dot and section in SECTIONS else ("training", key)


@dataclass(frozen=True)
class Fit:
    """Settings with which everything fits, and what they take at most."""

    settings: Settings
    peak_bytes: int


@dataclass(frozen=True)
class _Search:
    """`peak`, `usable` and `micro` as of `nearest_fit`."""

    peak: Callable[[Settings], int | None]
    usable: int
    micro: int

    def largest(self, settings: Settings, least: int) -> Fit | None:
        """The settings with the largest micro-batch that fits, which is at least `least`."""
        found = largest_micro(partial(self._peak_with, settings), self.usable, least, self.micro)
        if found is None:
            return None
        size, taken = found
        return Fit(_with_micro(settings, size, self.micro), taken)

    def hopeless(self, base: Settings, farthest: Settings) -> bool:
        """Whether `base` does not fit with all changes that are left, nor goes together with more or less of them."""
        most = self._peak_with({**base, **farthest}, 1)
        return most > self.usable if most is not None else self._peak_with(base, 1) is None

    def _peak_with(self, settings: Settings, size: int) -> int | None:
        return self.peak(_with_micro(settings, size, self.micro))


def nearest_fit(peak: Callable[[Settings], int | None], usable: int, micro: int, given: Settings) -> Fit | None:
    """Return the nearest settings whose peak is at most `usable` bytes; None where none have one.

    `peak`: what changed settings take at most (None: they do not go together); every change of this module lowers it or
    leaves it. `micro`: samples of a micro-batch now; it only becomes smaller. `given`: what the settings that may be
    changed are now; those that it does not name stay. `split.base_segment_size` is the blocks of the base that are
    trained at a time.
    """
    search = _Search(peak, usable, micro)
    same = [choice for key in _SAME if (choice := _choice(key, _SAME[key], given))]
    pieces: list[Settings] = [{}, *({PIECES: size} for size in _smaller(given.get(PIECES)))]
    learned = [choice for key in _LEARNED if (choice := _choice(key, _LEARNED[key], given))]
    all_same = {key: value for choice in same for key, value in choice[-1][1].items()}
    for _, changed in _combined(learned):
        if search.hopeless(changed, {**all_same, **pieces[-1]}):
            continue
        for piece in pieces:
            if search.hopeless({**changed, **piece}, all_same):
                continue
            for least, settings in _nearest_first(micro, same):
                found = search.largest({**settings, **piece, **changed}, least)
                if found is not None:
                    return found
    return None


def largest_micro(peak: Callable[[int], int | None], usable: int, least: int, most: int) -> tuple[int, int] | None:
    """Return the largest micro-batch from `least` to `most` whose peak is at most `usable` bytes, and that peak; None
    where `least` does not fit. The peak grows with the micro-batch."""
    taken = peak(least)
    if taken is None or taken > usable:
        return None
    best = (least, taken)
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        taken = peak(middle)
        if taken is None or taken > usable:
            high = middle - 1
        else:
            low, best = middle, (middle, taken)
    return best


def evened(micro: int, batch: int) -> int:
    """Return the smallest micro-batch that takes as many steps through a batch as `micro`: the same passes, less
    memory."""
    return -(-batch // -(-batch // micro))


def _choice(key: str, choices: tuple[tuple[int, Any], ...], given: Settings) -> Choice:
    """What may become of one setting, as it is now."""
    if key not in given:
        return ()
    found = [(distance, {key: value}) for distance, value in choices if given[key] != value]
    # Masters lie where updates are computed.
    along = {"memory.masters": "host"} if key == "memory.optimizer" and given.get("memory.masters") == "device" else {}
    return [(distance, {**settings, **along}) for distance, settings in found]


def _smaller(blocks: int | None) -> list[int]:
    """Pieces that so many blocks of a base may be trained in, the largest first."""
    if blocks is None:
        return []
    sizes = {-(-blocks // cuts) for cuts in (*_CUTS, blocks) if cuts <= blocks}
    return sorted(sizes - {blocks}, reverse=True)


def _combined(choices: Sequence[Choice]) -> Iterator[tuple[int, Settings]]:
    """Yield all combinations of changes, none among them, with their distances; the nearest first."""
    unchanged: tuple[int, Settings] = (0, {})
    found = []
    for changes in itertools.product(*([unchanged, *choice] for choice in choices)):
        settings = {key: value for _, change in changes for key, value in change.items()}
        found.append((sum(distance for distance, _ in changes), settings))
    found.sort(key=lambda item: item[0])
    yield from found


def _nearest_first(micro: int, choices: Sequence[Choice]) -> Iterator[tuple[int, Settings]]:
    """Yield (least micro-batch, changed settings), the nearest first."""
    sizes = [(0, EASY_MICRO), (_SMALL, 1)] if micro > EASY_MICRO else [(0, 1)]
    found = [(far + small, least, settings) for far, settings in _combined(choices) for small, least in sizes]
    found.sort(key=lambda item: item[0])
    for _, least, settings in found:
        yield least, settings


def _with_micro(settings: Settings, size: int, micro: int) -> Settings:
    return settings if size == micro else {"micro_batch": size, **settings}
