"""Samples over the spooled tokens of a split: where they lie, which of their tokens count, their positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workers.data.text.samples.ragged import flat_rows, offsets_of
from workers.data.text.samples.spool import Spool
from workers.data.text.tokens.encode import Encoded

#: Tokens looked at in one go.
_CHUNK = 1 << 22


@dataclass
class Samples:
    """A table with a line a sample. `starts` and `lengths` int64: its tokens in the spool; `targets` int64: how many
    of them count; `group` int64 and `correct` uint8: the question it is a candidate of, and whether the right one."""

    starts: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    group: np.ndarray
    correct: np.ndarray

    def take(self, rows: np.ndarray) -> Samples:
        """Return some of them, in the given order."""
        return Samples(*(column[rows] for column in vars(self).values()))


def cut_overlong(encoded: Encoded, longest: int, keep_end: bool) -> tuple[Encoded, int]:
    """Cut sequences to `longest` tokens (their last ones with `keep_end`); returns them, and how many were longer. What
    is then the first token of a sequence is no target."""
    overlong = int((encoded.lengths > longest).sum())
    if not overlong:
        return encoded, 0
    lengths = np.minimum(encoded.lengths, longest)
    starts = offsets_of(encoded.lengths)[:-1]
    if keep_end:
        starts = starts + encoded.lengths - lengths
    rows = flat_rows(starts, lengths)
    flags = encoded.flags[rows]
    firsts = offsets_of(lengths)[:-1]
    flags[firsts[lengths > 0]] = 0
    return Encoded(encoded.tokens[rows], flags, lengths, encoded.owners, encoded.correct), overlong


def without(encoded: Encoded, dropped: np.ndarray) -> Encoded:
    """Keep the sequences where `dropped` (bool, one a sequence) is not set."""
    kept = np.flatnonzero(~dropped)
    lengths = encoded.lengths[kept]
    rows = flat_rows(offsets_of(encoded.lengths)[:-1][kept], lengths)
    return Encoded(encoded.tokens[rows], encoded.flags[rows], lengths, encoded.owners[kept], encoded.correct[kept])


def packed_samples(tokens: int, length: int, spool: Spool) -> Samples:
    """Cut all tokens into samples of exactly `length`; the last may be shorter."""
    starts = np.arange(0, tokens, length, dtype=np.int64)
    lengths = np.minimum(length, tokens - starts)
    return _table(starts, lengths, np.arange(len(starts)), np.ones(len(starts), np.uint8), spool)


def document_samples(lengths: np.ndarray, group: np.ndarray, correct: np.ndarray, spool: Spool) -> Samples:
    """Make a sample of every sequence."""
    return _table(offsets_of(lengths)[:-1], lengths, group, correct, spool)


@dataclass
class Laid:
    """Samples, and the `pieces` they consist of in this order: lines of their own table, where a sample is several
    documents. `documents`: where positions restart in the spool, or None: with every piece, or (`running`) with every
    sample."""

    samples: Samples
    pieces: Samples
    documents: np.ndarray | None = None
    running: bool = False


def whole_samples(pieces: Samples, longest: int, *, running: bool) -> Laid:
    """Join documents of at most `longest` tokens into samples of as many as fit, each into the fullest that has room,
    the longest first (best fit decreasing). Samples go by their first documents."""
    bins = best_fit(pieces.lengths, longest)
    order = np.lexsort((np.arange(len(bins)), bins))
    ordered = pieces.take(order)
    count = int(bins.max()) + 1 if len(bins) else 0

    def total(column: np.ndarray) -> np.ndarray:
        return np.bincount(bins, column, count).astype(np.int64)

    lengths = total(pieces.lengths)
    samples = Samples(
        offsets_of(lengths)[:-1], lengths, total(pieces.targets), np.arange(count), np.ones(count, np.uint8)
    )
    ordered.group = bins[order]
    return Laid(samples, ordered, running=running)


def best_fit(lengths: np.ndarray, longest: int) -> np.ndarray:
    """Choose a sample for every document, int64 from 0, such that none takes more than `longest` tokens."""
    taken = np.empty(len(lengths), np.int64)
    #: Room left -> samples that have it; bit r of `rooms`: some have room r.
    open_: dict[int, list[int]] = {}
    rooms = count = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sample = open_[room].pop()
            if not open_[room]:
                rooms ^= 1 << room
        else:
            room, sample, count = longest, count, count + 1
        taken[document] = sample
        left = room - length
        open_.setdefault(left, []).append(sample)
        rooms |= 1 << left
    first = np.full(count, len(lengths), np.int64)
    np.minimum.at(first, taken, np.arange(len(lengths)))
    number = np.empty(count, np.int64)
    number[np.argsort(first)] = np.arange(count)
    renumbered: np.ndarray = number[taken]
    return renumbered


def laid_fields(laid: Laid, tokens: range, spool: Spool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `token_fields` of a range of the tokens of all samples, which begins and ends with samples."""
    begins = offsets_of(laid.pieces.lengths)
    inside = np.arange(*np.searchsorted(begins[:-1], (tokens.start, tokens.stop)))
    found = token_fields(laid.pieces.take(inside), spool, laid.documents)
    if not laid.running:
        return found
    sample = np.searchsorted(laid.samples.starts, np.arange(tokens.start, tokens.stop), side="right") - 1
    positions = np.arange(tokens.start, tokens.stop) - laid.samples.starts[sample]
    return found[0], found[1], positions.astype(np.int32)


def _table(starts: np.ndarray, lengths: np.ndarray, group: np.ndarray, correct: np.ndarray, spool: Spool) -> Samples:
    targets = np.zeros(len(starts), np.int64)
    for first, last in chunks(lengths, _CHUNK):
        begin = int(starts[first])
        flags = spool.flags(begin, int(starts[last - 1] + lengths[last - 1])).astype(np.int64)
        inside = starts[first:last] - begin
        # A sample's first token has nothing before it to be predicted from.
        targets[first:last] = np.add.reduceat(flags, inside) - flags[inside]
    return Samples(starts, lengths, targets, group, correct)


def chunks(lengths: np.ndarray, tokens: int) -> list[tuple[int, int]]:
    """Find ranges of consecutive samples (none empty) of at most `tokens` together, or of one that is longer."""
    offsets = offsets_of(lengths)
    ranges = []
    first = 0
    while first < len(lengths):
        last = int(np.searchsorted(offsets, offsets[first] + tokens, side="right")) - 1
        last = max(last, first + 1)
        ranges.append((first, last))
        first = last
    return ranges


def token_fields(
    samples: Samples, spool: Spool, documents: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of these samples' tokens in order: token int32, target uint8, position int32. With `documents`, where each
    begins in the spool (ascending), positions restart with every one; otherwise with every sample."""
    rows = flat_rows(samples.starts, samples.lengths)
    origin = np.repeat(samples.starts, samples.lengths)
    if documents is not None:
        owner = np.searchsorted(documents, rows, side="right") - 1
        origin = np.maximum(origin, documents[owner])
    tokens, targets = _spooled(samples, spool)
    targets[offsets_of(samples.lengths)[:-1]] = 0
    return tokens, targets, (rows - origin).astype(np.int32)


def _spooled(samples: Samples, spool: Spool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and flags of these samples. They may be few and far apart: each look takes in a bounded stretch."""
    pieces = []
    stretches = np.flatnonzero(np.diff(samples.starts // _CHUNK)) + 1
    for places in np.split(np.arange(len(samples.starts)), stretches):
        starts, lengths = samples.starts[places], samples.lengths[places]
        first = int(starts.min())
        rows = flat_rows(starts - first, lengths)
        pieces.append([column[rows] for column in spool.read(first, int((starts + lengths).max()))])
    tokens, flags = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
    return tokens, flags
