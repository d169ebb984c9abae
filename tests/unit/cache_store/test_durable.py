"""Local files beside a store, replaced whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cache_store.errors import StorageFull, first_line
from cache_store.storage.durable import write_atomically


def test_a_file_is_replaced_whole_and_may_be_read_by_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "summary.json"
    for data in (b"first", b"", b"second, and longer"):
        write_atomically(target, data)
        assert target.read_bytes() == data
        assert stat.S_IMODE(target.stat().st_mode) == 0o644
        assert os.listdir(target.parent) == ["summary.json"]


def test_a_failure_leaves_the_file_as_it_was_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "summary.json"
    write_atomically(target, b"before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull, match="No space left"):
        write_atomically(target, b"after")
    assert target.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_the_first_line_of_an_error_is_what_it_says_first_or_its_type() -> None:
    assert first_line(ValueError("\n what happened\nand where")) == "what happened"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(KeyError("rope_type")) == "KeyError: 'rope_type'", "the key alone says nothing"
    assert first_line(ValueError("Validation error for field 'x':\n  TypeError: no\nmore")) == (
        "Validation error for field 'x': TypeError: no"
    ), "an announcement comes with what it announces"
