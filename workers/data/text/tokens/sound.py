"""Encode what can be encoded of some records, and say what is wrong with the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cache_store.errors import DataError
from workers.data.text.corpora.base import Record
from workers.data.text.corpora.findings import Findings
from workers.data.text.tokens.encode import Encoded

#: Records that are named at once.
NAMED = 10


@dataclass(frozen=True)
class Fault:
    """A record that cannot be used, and why."""

    record: Record
    error: DataError

    @property
    def what(self) -> str:
        """Return why, without the place."""
        return str(self.error.details.get("what", self.error.message))


@dataclass
class Sound:
    """The records of a batch that could be encoded, in order, what they were encoded to, and the others."""

    records: list[Record] = field(default_factory=list)
    pieces: list[Encoded] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def encoded(self) -> Encoded:
        """Return all pieces as one; owners are numbers of `records`."""
        findings = Findings()
        for piece in self.pieces:
            findings.merge(piece.findings)
        columns: dict[str, np.ndarray] = {
            name: np.concatenate([np.empty(0, kind), *(getattr(piece, name) for piece in self.pieces)])
            for name, kind in _COLUMNS.items()
        }
        return Encoded(**columns, findings=findings)


_COLUMNS = {"tokens": np.int32, "flags": np.uint8, "lengths": np.int64, "owners": np.int64, "correct": np.uint8}


def encode_sound(records: Sequence[Record], encode: Callable[[Sequence[Record]], Encoded]) -> Sound:
    """Encode a batch as `encode` does. Where that raises DataError, halves are tried, down to the record that is the
    reason: a few bad ones cost little."""
    sound = Sound(faults=[Fault(record, record.error) for record in records if record.error is not None])
    waiting = [[record for record in records if record.error is None]]
    while waiting:
        part = waiting.pop()
        if not part:
            continue
        try:
            piece = encode(part)
        except DataError as error:
            if len(part) == 1:
                sound.faults.append(Fault(part[0], error))
            else:
                waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
            continue
        piece.owners = piece.owners + len(sound.records)
        sound.records += part
        sound.pieces.append(piece)
    return sound


def refuse(faults: Iterable[Fault]) -> None:
    """Raise one DataError that names the first of these records; do nothing where there are none."""
    messages = [fault.error.message for fault in faults]
    if not messages:
        return
    named, more = messages[:NAMED], len(messages) - NAMED
    named[-1] += f" (and {more} more)" if more > 0 else ""
    named[-1] += "; data.bad: skip leaves such rows out"
    raise DataError("\n".join(named), problems=named)
