"""Find the questions of a benchmark that a model was trained on, by the digests in its folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_store.errors import CorruptRecord, DataError
from cache_store.records.record_io import read_local
from cache_store.storage.durable import read_regular
from workers.overlap import TrainedQuestions
from workers.specs.export_files import FACTS

#: Of a file of digests; those of 10 million rows of words have 80 MB.
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Contamination:
    """Of `asked` questions a model was trained on `same`, and on near-duplicates of `near` more; `example`: one."""

    asked: int
    same: int
    near: int
    example: str

    def to_json(self) -> dict[str, Any]:
        """Return what a score's notes say."""
        return asdict(self)

    def words(self) -> str:
        """Say it in a sentence."""
        return (
            f"it was trained on {self.same} of the {self.asked} questions and on near-duplicates (13 words in a row) "
            f"of {self.near} others"
        )


def read_trained(folder: Path) -> TrainedQuestions | None:
    """Read what the model in `folder` was trained on; None where nothing is said of it. DataError for broken files."""
    facts = folder / FACTS
    try:
        says = read_local(facts)
    except CorruptRecord as error:
        raise DataError(error.message) from error
    name = None if says is None else says.get("questions")
    if name is None:
        return None
    file = folder / Path(str(name)).name
    try:
        return TrainedQuestions.from_bytes(read_regular(file, _MOST_BYTES), str(file))
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}), and {FACTS} says that it holds what the model was trained on; "
            "export the model again"
        ) from error


def contamination(trained: TrainedQuestions | None, asked: Iterable[str]) -> Contamination | None:
    """Compare the questions of a task with those trained on; None when there is nothing of them."""
    if trained is None:
        return None
    found = [(question, trained.likeness(question)) for question in asked]
    hits = [question for question, likeness in found if likeness is not None]
    if not hits:
        return None
    same = sum(likeness == "same" for _, likeness in found)
    example = " ".join(hits[0].split())
    return Contamination(len(found), same, len(hits) - same, example if len(example) <= 90 else f"{example[:89]}…")
