"""The files of ZeRO-3: what DeepSpeed's kernel would do, the folder of a process, and troubles of a disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache_store.errors import StorageFull, UserError
from workers.distributed import swap_files
from workers.distributed.swap_files import AsyncFiles, SwapFolder, check_room, read_numbers, write_numbers


@pytest.mark.parametrize("numbers", [0, 1, 1000, 5000])
def test_what_was_written_is_read_in_pieces_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: int
) -> None:
    monkeypatch.setattr(swap_files, "PIECE", 4096)
    files, path = AsyncFiles(), str(tmp_path / "a.swp")
    values, others = torch.randn(numbers), torch.randn(numbers).to(torch.bfloat16)
    assert files.async_pwrite(values, path, 0) == files.async_pwrite(others, path + "b", 0) == 0
    assert files.wait() == 2
    assert files.wait() == 0
    back, narrow = torch.empty(numbers), torch.empty(numbers, dtype=torch.bfloat16)
    files.async_pread(back, path, 0)
    files.async_pread(narrow, path + "b", 0)
    assert files.wait() == 2
    assert torch.equal(back, values)
    assert torch.equal(narrow, others)


def test_a_stretch_of_a_file_is_read_and_changed(tmp_path: Path) -> None:
    path, values = str(tmp_path / "a.swp"), torch.arange(10.0)
    write_numbers(path, 0, values)
    write_numbers(path, 3, torch.tensor([30.0, 40.0]))
    assert read_numbers(path, 2, 4).tolist() == [2.0, 30.0, 40.0, 5.0]


def test_only_what_a_handle_made_counts_as_its_memory() -> None:
    files, other = AsyncFiles(), AsyncFiles()
    buffer = files.new_cpu_locked_tensor(16, torch.zeros(1, dtype=torch.float32))
    assert other.is_pinned(buffer[4:8])
    assert not other.is_pinned(torch.zeros(16))
    assert not other.is_pinned(torch.Tensor())
    assert files.free_cpu_locked_tensor(buffer)
    assert not files.free_cpu_locked_tensor(buffer)
    assert not other.is_pinned(buffer)
    kept = files.new_cpu_locked_tensor(16, buffer)
    del files
    assert not other.is_pinned(kept), "its address may be another's one day"


def test_a_file_that_is_shorter_than_what_was_written_is_an_error_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.swp"
    path.write_bytes(b"1234")
    files = AsyncFiles()
    files.async_pread(torch.empty(4), str(path), 0)
    with pytest.raises(UserError, match=r"zero3\.disk: .*a\.swp"):
        files.wait()
    with pytest.raises(UserError, match="No such file"):
        read_numbers(str(tmp_path / "none"), 0, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_says_so() -> None:
    files = AsyncFiles()
    files.async_pwrite(torch.empty(4), "/dev/full", 0)
    with pytest.raises(StorageFull, match="the disk is full"):
        files.wait()


def test_a_disk_without_room_is_refused_with_the_numbers(tmp_path: Path) -> None:
    check_room(tmp_path, 1, 2)
    with pytest.raises(StorageFull, match=r"2 ranks of this machine need 2000000000\.0 GB, [\d.]+ GB are free"):
        check_room(tmp_path, 10**18, 2)


def test_a_folder_is_its_processs_and_one_that_was_killed_leaves_none_for_long(tmp_path: Path) -> None:
    code = f"""
import os, pathlib
from workers.distributed.swap_files import SwapFolder
folder = SwapFolder(pathlib.Path({str(tmp_path)!r}))
(folder.path / "a.swp").write_bytes(b"1")
os._exit(9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.glob("*/a.swp")
    mine = SwapFolder(tmp_path)
    assert not left.exists()
    second = SwapFolder(tmp_path)
    assert mine.path.is_dir(), "its process lives"
    mine.close()
    mine.close()
    assert not mine.path.exists()
    second.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"zero3\.disk: .*cannot be written .*; allowed: a folder on a local disk"):
        SwapFolder(tmp_path / "file")
