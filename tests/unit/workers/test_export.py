"""An exported folder is what was trained, file by file, or is written again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cache_store.errors import StorageFull, StoreError
from cache_store.records.nodes import NodeStore
from cache_store.storage.open import open_storage
from workers import tensor_files
from workers.export import Trained, export
from workers.models.chain import state_digest
from workers.models.resnet.parts import initial_state, part_names
from workers.specs.experiment import Experiment, ImageSpec, ResNetSpec

pytestmark = pytest.mark.timeout(120)


@dataclass
class Made:
    """A model of initial weights, committed, and a folder that it was exported to."""

    trained: Trained
    nodes: NodeStore
    folder: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("export")
    model = ResNetSpec(name="resnet18", stem="small", classifier="linear")
    experiment = Experiment(model=model, data=ImageSpec(name="digits", image_size=16), classes=10, seed=0)
    nodes = NodeStore(open_storage(str(folder / "store")))
    state = initial_state(model, 10, 0)
    attempt = nodes.attempt("0" * 32)
    attempt.write("state.safetensors", tensor_files.TensorStream(state))
    where = {"host": "", "pid": 0, "device": "cpu", "threads": 1, "started": 0.0, "finished": 0.0}
    commit = attempt.commit({"digest": state_digest(state), "seconds": 0.0, "where": where})
    trained = Trained(experiment, dict.fromkeys(part_names(model, 16, 10), commit), lambda: commit)
    export(trained, nodes, folder / "model")
    return Made(trained, nodes, folder / "model")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def foreign(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"of another model")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def linked(path: Path) -> None:
    other = path.parent.with_name(f"{path.parent.name}-elsewhere")
    path.rename(other)
    path.symlink_to(other)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "flipped": flipped,
    "foreign": foreign,
    "a link": linked,
    "a pipe": piped,
}
FILES = ("model.safetensors", "model.json", "load_model.py", "segprop_export.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_became_of_a_file_it_is_written_again(made: Made, tmp_path: Path, name: str, damage: str) -> None:
    target = tmp_path / "model"
    shutil.copytree(made.folder, target)
    DAMAGE[damage](target / name)
    export(made.trained, made.nodes, target)
    assert contents(target) == contents(made.folder)
    assert not any((target / file).is_symlink() for file in FILES[:-1])


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "{}", "[" * 100_000, '{"format": ' + "9" * 6000 + "}", '{"format":1,"sources":null,"files":null}'],
    ids=["null", "list", "nothing in it", "deep", "long number", "nulls"],
)
def test_a_record_of_nonsense_is_none(made: Made, tmp_path: Path, text: str) -> None:
    target = tmp_path / "model"
    shutil.copytree(made.folder, target)
    (target / "segprop_export.json").write_text(text)
    export(made.trained, made.nodes, target)
    assert contents(target) == contents(made.folder)


def test_a_whole_export_is_left_alone_unless_it_is_asked_for_anew(made: Made, tmp_path: Path) -> None:
    target = tmp_path / "model"
    shutil.copytree(made.folder, target)
    (target / "notes.txt").write_text("of the user")
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    export(made.trained, made.nodes, target)
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    export(made.trained, made.nodes, target, anew=True)
    assert all((target / name).stat().st_mtime_ns > before[target / name] for name in FILES)
    assert (target / "notes.txt").exists()


def test_files_may_be_read_by_whom_the_user_lets(made: Made, tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            export(made.trained, made.nodes, tmp_path / oct(mask))
        finally:
            os.umask(before)
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / oct(mask)).iterdir()} == {mode}


def test_a_folder_in_a_files_place_and_a_full_disk_are_typed_errors(made: Made, tmp_path: Path) -> None:
    target = tmp_path / "model"
    (target / "model.safetensors").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"cannot write .*model\.safetensors: "):
        export(made.trained, made.nodes, target)
    if Path("/dev/full").exists():
        target = tmp_path / "full"
        target.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            real = os.fsync

            def full(descriptor: int) -> None:
                with open("/dev/full", "wb", buffering=0) as device:
                    device.write(b"x")  # ENOSPC, as the system says it
                real(descriptor)

            patch.setattr(os, "fsync", full)
            with pytest.raises(StorageFull, match="free some space"):
                export(made.trained, made.nodes, target)
        assert contents(target) == {}


def test_the_record_names_every_file(made: Made) -> None:
    record = json.loads((made.folder / "segprop_export.json").read_text())
    assert set(record["files"]) == set(FILES) - {"segprop_export.json"}
    assert record["files"]["model.safetensors"][0] == (made.folder / "model.safetensors").stat().st_size
