"""Digests of files: by content, read once, remembered as long as nothing was written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from workers import file_digests
from workers.file_digests import contents_digest, file_digest
from workers.models.causal_lm.pretrained.checkpoint import weights_digest
from workers.models.causal_lm.pretrained.locate import Located

GIB = 2**30


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, in which young files too are remembered: ctime cannot be set back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "_SETTLED_NS", -1)
    return tmp_path / "cache" / "segprop" / "digests.json"


def remembered(memory: Path) -> dict[str, str]:
    return json.loads(memory.read_text())["digests"] if memory.exists() else {}  # type: ignore[no-any-return]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_digest_is_the_sha256_and_is_taken_from_memory_the_next_time(tmp_path: Path, memory: Path) -> None:
    path = write(tmp_path / "a", b"content")
    expected = hashlib.sha256(b"content").hexdigest()
    assert file_digest(path) == expected
    (state,) = remembered(memory)
    memory.write_text(json.dumps({"format": 1, "digests": {state: "from memory"}}))
    assert file_digest(path) == "from memory"


def test_bytes_written_with_size_and_time_kept_are_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"content")
    times = path.stat()
    before = file_digest(path), contents_digest([("a", path)])
    path.write_bytes(b"CONTENT")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert file_digest(path) == hashlib.sha256(b"CONTENT").hexdigest() != before[0]
    assert contents_digest([("a", path)]) != before[1]


def test_a_copy_has_the_digest_of_the_original(tmp_path: Path) -> None:
    files = {
        f"{folder}/{number}": write(tmp_path / "a" / folder / str(number), bytes([number]))
        for number in range(9)
        for folder in ("x", "y")
    }
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    first = contents_digest(files.items())
    assert contents_digest((name, tmp_path / "b" / name) for name in reversed(files)) == first
    os.rename(tmp_path / "b" / "x" / "3", tmp_path / "b" / "y" / "10")
    moved = {**{name: tmp_path / "b" / name for name in files if name != "x/3"}, "y/10": tmp_path / "b" / "y" / "10"}
    assert contents_digest(moved.items()) != first


def test_a_folder_of_small_files_takes_one_entry_and_a_large_file_its_own(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "_LARGE", 100)
    names = ["x/1", "x/2", "x/3", "y/1"]
    files = {name: write(tmp_path / name, name.encode()) for name in names}
    files["x/large"] = write(tmp_path / "x" / "large", bytes(101))
    contents_digest(files.items())
    assert len(remembered(memory)) == 3


def test_the_memory_is_bounded_and_keeps_what_was_used_last(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_digests, "_ENTRIES", 3)
    paths = [write(tmp_path / str(number), bytes([number])) for number in range(5)]
    digests = [file_digest(path) for path in paths]
    assert list(remembered(memory).values()) == digests[2:]


def test_young_files_are_not_remembered(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digests, "_SETTLED_NS", 60_000_000_000)
    file_digest(write(tmp_path / "a", b"content"))
    assert remembered(memory) == {}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', '{"format": 1, "digests": [1]}'])
def test_a_damaged_memory_is_an_empty_one(tmp_path: Path, memory: Path, content: str) -> None:
    write(memory, content.encode())
    path = write(tmp_path / "a", b"content")
    assert file_digest(path) == hashlib.sha256(b"content").hexdigest()
    assert len(remembered(memory)) == 1


def test_without_a_place_for_the_memory_files_are_read_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "no folder", b"")))
    assert file_digest(write(tmp_path / "a", b"x")) == hashlib.sha256(b"x").hexdigest()


def test_weights_above_a_gibibyte_are_known_by_all_their_bytes_and_not_by_time(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(GIB + 4096)
    first = weights_digest(Located(tmp_path))
    os.utime(path, ns=(1, 1))
    assert weights_digest(Located(tmp_path)) == first, "the same bytes at another time"
    with path.open("r+b") as file:
        file.seek(3_000_000)
        file.write(b"\x01")
    os.utime(path, ns=(1, 1))
    assert weights_digest(Located(tmp_path)) != first, "one byte, with size and time kept"
