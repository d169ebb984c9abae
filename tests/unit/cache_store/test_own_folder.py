"""A folder of a process's own is gone with it, also where the process was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cache_store.records.own_folder import OwnFolder


def test_a_folder_is_removed_with_what_it_holds(tmp_path: Path) -> None:
    with OwnFolder(tmp_path, "mine-") as place:
        assert place.stat().st_mode & 0o077 == 0
        (place / "large").write_bytes(b"x")
        with OwnFolder(tmp_path, "mine-") as beside:
            # Whoever comes later leaves those alone that are in use, and whatever else lies there.
            assert beside != place
            assert (place / "large").exists()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from cache_store.records.own_folder import OwnFolder;"
        "place = OwnFolder(pathlib.Path(sys.argv[1]), 'mine-').path; (place / 'large').write_bytes(b'x'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (left,) = tmp_path.glob("mine-*/large")
    (tmp_path / "other").mkdir()
    with OwnFolder(tmp_path, "mine-"):
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_what_others_left_under_such_names_stops_nobody(tmp_path: Path) -> None:
    """In a machine's temporary folder anybody may put a link, a folder or a pipe where a lock would be."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "mine-link.lock").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine-folder.lock").mkdir()
    os.mkfifo(tmp_path / "mine-pipe.lock")
    (tmp_path / "mine-pipe").symlink_to(tmp_path / "kept")
    with OwnFolder(tmp_path, "mine-") as folder:
        assert folder.is_dir()
    assert (tmp_path / "kept").is_dir()
    assert not (tmp_path / "elsewhere").exists()
