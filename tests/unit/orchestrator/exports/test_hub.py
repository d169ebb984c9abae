"""`segprop push`: what is sent is what was exported, and nothing is sent where something is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, Hub, running_hub
from huggingface_hub import constants

from cache_store.records.record_io import dump_record
from orchestrator.cli import main
from workers.export import FORMAT
from workers.file_digests import file_digest
from workers.specs.export_files import EXPORTED

CARD = "---\nlibrary_name: transformers\n---\n# A model\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def write_export(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights " * 100)
    (folder / "config.json").write_text("{}")
    files = {path.name: [path.stat().st_size, file_digest(path)] for path in folder.iterdir()}
    (folder / EXPORTED).write_bytes(dump_record({"format": FORMAT, "sources": {}, "files": files}, "x"))
    (folder / "README.md").write_text(CARD)
    return folder


def test_a_folder_becomes_one_commit_with_its_card(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_export(tmp_path / "m")
    assert main(["push", str(folder), "me/model", "--private"]) == 0
    assert capsys.readouterr().out == f"{hub.endpoint}/me/model/commit/1\n"
    assert hub.repositories == {"me/model": True}
    assert hub.files["me/model"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.cards == [CARD]


def test_of_a_run_the_regime_is_uploaded_that_is_named(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for name in ("e2e", "segprop"):
        write_export(run / "model" / name)
    (run / "config.yaml").write_text("{}")
    assert main(["push", str(run), "me/model"]) == 2
    assert "name one of e2e, segprop" in capsys.readouterr().err
    assert main(["push", str(run), "me/model", "--adapter"]) == 2
    assert f"segprop export {run} --adapter writes it" in capsys.readouterr().err
    assert hub.asked == []
    assert main(["push", str(run), "me/model", "--regime", "segprop"]) == 0
    assert "model.safetensors" in hub.files["me/model"]


@pytest.mark.parametrize(
    ("spoil", "name", "words"),
    [
        ("token", "me/model", "HF_TOKEN: is not set"),
        ("folder", "me/model", "there is no such folder"),
        ("record", "me/model", "is no folder that segprop export wrote"),
        ("weights", "me/model", "model.safetensors: missing, or not as it was written"),
        ("", "model", "is no name on the hub; give OWNER/NAME"),
        ("", "../model", "is no name on the hub"),
    ],
)
def test_nothing_is_sent_where_something_is_missing(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: str,
    name: str,
    words: str,
) -> None:
    folder = tmp_path / "m"
    if spoil != "folder":
        write_export(folder)
    if spoil == "token":
        monkeypatch.delenv("HF_TOKEN")
    if spoil == "record":
        (folder / EXPORTED).unlink()
    if spoil == "weights":
        (folder / "model.safetensors").write_bytes(b"weighty " * 100)
    assert main(["push", str(folder), name]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert hub.asked == []


@pytest.mark.parametrize(("status", "code", "words"), [(403, 1, "may write there"), (500, 1, "the hub failed")])
def test_what_the_hub_refuses_is_said_in_a_line(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, code: int, words: str
) -> None:
    hub.fails = status
    assert main(["push", str(write_export(tmp_path / "m")), "me/model"]) == code
    assert words in capsys.readouterr().err


def test_a_hub_that_is_not_there_is_said_in_a_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(write_export(tmp_path / "m")), "me/model"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_a_repository_that_is_to_be_private_and_is_not_gets_nothing(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["me/model"] = False
    assert main(["push", str(write_export(tmp_path / "m")), "me/model", "--private"]) == 2
    assert "is there already, and public; nothing was uploaded" in capsys.readouterr().err
    assert hub.files == {}
