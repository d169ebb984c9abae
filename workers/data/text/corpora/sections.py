"""Documents split inside, where there are too few of them to hold whole ones out: one book as one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from workers.data.text.corpora.base import Corpus, Record

#: A gap is at most this share of a document.
_LARGEST_GAP = 0.05
#: Characters in which a line or a word ends, so that a cut tears neither apart.
_NEAR = 500


class Sections(Corpus):
    """The documents of another corpus, each as its beginning (train) and as sections at its end, one for each split in
    `held_out` (shares of a document). `gap` characters before every section are left out, so that what a model is
    scored on is not what it has just read on."""

    def __init__(self, whole: Corpus, held_out: Mapping[str, float], gap: int) -> None:
        self._whole = whole
        self._held_out = dict(held_out)
        self._gap = gap
        count, size = whole.documents["train"], whole.bytes["train"]
        self.fingerprint = whole.fingerprint
        self.documents = {**whole.documents, **dict.fromkeys(held_out, count)}
        self.bytes = {**whole.bytes, **{split: round(share * size) for split, share in held_out.items()}}
        self.bytes["train"] = size - sum(self.bytes[split] for split in held_out)
        names = " and ".join(held_out)
        documents = "one document" if count == 1 else f"{count} documents"
        self.notes = (
            *whole.notes,
            f"{documents}, too few to hold whole ones out: {names} are sections at the end, behind gaps of at most "
            f"{gap} characters",
        )

    def records(self, split: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        """See `Corpus`."""
        if split != "train" and split not in self._held_out:
            yield from self._whole.records(split, wanted)
            return
        for number, record in self._whole.records("train", wanted):
            if isinstance(record.value, str):
                inside = sections(record.value, self._held_out, self._gap)[split]
                record = record._replace(value=record.value[inside])
            yield number, record


def too_few(documents: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, float]:
    """Return the splits (and their shares) that have to be held out inside documents: none where whole ones can be, or
    where counts of documents are asked for. `documents`: those of the data's own splits."""
    held_out = {split: share for split, share in shares.items() if not documents.get(split)}
    counts = [round(share * documents["train"]) for share in held_out.values()]
    if any(share >= 1 for share in held_out.values()) or (min(counts, default=1) and sum(counts) < documents["train"]):
        return {}
    return held_out


def sections(text: str, held_out: Mapping[str, float], gap: int) -> dict[str, slice]:
    """Choose the characters of train and of each held-out section, in this order, with a gap before each section.
    Sections end with lines, or words."""
    left = len(text) * max(0.0, 1 - sum(held_out.values()))
    gap = int(min(gap, _LARGEST_GAP * len(text), left / (2 * len(held_out))))
    begin, found = len(text), {}
    for split, share in reversed(list(held_out.items())):
        end, begin = begin, _whole(text, max(0, begin - round(share * len(text))), begin)
        found[split] = slice(begin, end)
        begin = _whole(text, max(0, begin - gap), begin)
    return {"train": slice(0, begin), **dict(reversed(list(found.items())))}


def _whole(text: str, at: int, last: int) -> int:
    """Return where the line that is read at a place ends, or its word, if that is near and before `last`."""
    for separator in ("\n", " "):
        found = text.find(separator, at, min(last, at + _NEAR))
        if 0 < at <= found:
            return found + 1
    return at
