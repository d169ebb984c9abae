"""The table of text formats: a format is a row, which everything else goes through."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from text_makers import BYTES, source_of, store

from cache_store.errors import DataError
from workers.data.text.corpora.base import Corpus, Record
from workers.data.text.formats import TEXT_FORMATS, TextFormat, data_is_packed
from workers.data.text.inspect import inspect_text
from workers.data.text.prepare import prepare_text
from workers.data.text.splits import split_documents
from workers.data.text.tokens.encode import text_encoder
from workers.specs.language import TextSpec


class Lines(Corpus):
    """A format from outside the package: every line of one file is a document."""

    def __init__(self, data: TextSpec) -> None:
        if data.path is None:
            raise DataError("data.path: none given for lines; allowed: a file of lines")
        self._path = data.path
        self._lines = Path(data.path).read_text().splitlines()
        self.documents = {"train": len(self._lines)}
        self.bytes = {"train": sum(map(len, self._lines))}
        self.fingerprint = hashlib.sha256("\n".join(self._lines).encode()).hexdigest()

    def records(self, split: str, wanted: np.ndarray) -> Iterator[tuple[int, Record]]:
        for number in np.flatnonzero(wanted).tolist():
            yield number, Record(self._lines[number], self._path, number)


def spec_of(path: str | None, **changes: Any) -> TextSpec:
    name: Any = "lines"
    return TextSpec(name=name, path=path, validation=2, test=2, sequence_length=64, **changes)


def test_every_name_a_configuration_takes_has_a_row() -> None:
    assert get_args(get_type_hints(TextSpec)["name"]) == tuple(TEXT_FORMATS)


def test_which_formats_are_packed_and_which_ask_questions() -> None:
    names: Any = tuple(TEXT_FORMATS)
    assert {name for name in names if data_is_packed(TextSpec(name=name))} == {"text", "hub", "stdlib"}
    assert {name: row.candidates for name, row in TEXT_FORMATS.items() if row.candidates > 1} == {
        "mmlu": 4,
        "winogrande": 2,
    }


@pytest.mark.parametrize("running", [False, True])
def test_text_is_prepared_and_read_in_a_format_that_was_only_entered_as_a_row(
    tmp_path: Path, running: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEXT_FORMATS, "lines", TextFormat(Lines, text_encoder, running=running))
    (tmp_path / "lines.txt").write_text("".join(f"line number {i}\n" for i in range(30)))
    data = spec_of(str(tmp_path / "lines.txt"))
    outline = inspect_text(data)
    assert outline.documents == {"train": 26, "validation": 2, "test": 2}
    snapshots = store()
    result = prepare_text(data, BYTES, 0, snapshots, fingerprint=outline.fingerprint)
    assert result.packed == running
    assert result.rows["train"] == (6 if running else 26)
    source = source_of(data, snapshots=snapshots, result=result)
    ids = source.batch(np.arange(source.rows)).ids
    read = bytes(token for token in ids.flatten().tolist() if token < 256).decode()
    assert read == "".join(_trained(data))


def _trained(data: TextSpec) -> list[str]:
    corpus = Lines(data)
    _, numbers = split_documents(data, 0, corpus.documents)["train"]
    wanted = np.zeros(30, bool)
    wanted[numbers] = True
    return [record.value for _, record in corpus.records("train", wanted)]


def test_what_it_refuses_reaches_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEXT_FORMATS, "lines", TextFormat(Lines, text_encoder))
    with pytest.raises(DataError, match="allowed: a file of lines"):
        inspect_text(spec_of(None))
