"""Multiple-choice questions: what they are, whatever file they come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cache_store.errors import DataError
from cache_store.suggest import did_you_mean
from workers.specs.language import TextSpec


class Candidate(NamedTuple):
    """Only `continuation` is scored, given `context`."""

    context: str
    continuation: str


class Question(NamedTuple):
    """Its candidates, and which of them is right. Without the examples before it: see `with_shots`. `asked` is the
    question with its choices as it was published, for telling it from others."""

    candidates: tuple[Candidate, ...]
    correct: int
    asked: str

    def shown(self) -> str:
        """Word it as an example for another question, with its answer."""
        right = self.candidates[self.correct]
        return right.context + right.continuation + "\n\n"

    def with_shots(self, before: str) -> Question:
        """Return the same question after `before`."""
        return self._replace(candidates=tuple(Candidate(before + c.context, c.continuation) for c in self.candidates))


def no_subset(data: TextSpec, allowed: Iterable[str]) -> DataError:
    """Return the error for a subset that is not there, with the nearest one that is."""
    names = list(allowed)
    hint = did_you_mean(str(data.subset), names)
    return DataError(f"data.subset: {data.path} has no {data.subset!r}{hint} (it has {', '.join(names)})")
