"""What a run directory holds: only the driver that has the run writes there, whatever lies in the way."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import TINY, summary_of, tree, write_config

from cache_store.records.nodes import Commit, NodeStore
from cache_store.storage.open import open_storage
from orchestrator.cli import main
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.run_lease import RunLease
from orchestrator.runs import session
from orchestrator.runs.prepare import prepare
from orchestrator.runs.run_dir import claim_run_dir

MORE: dict[str, Any] = {"regimes": {"segprop": {}, "e2e": {}}}


def run(config: Path, *arguments: str) -> int:
    return main(["run", str(config), "--quiet", "run=story", *arguments])


@contextmanager
def at_work(config: Path) -> Iterator[RunLease]:
    """Stand for a driver of this process that has claimed its run and works on it."""
    prepared = prepare(config, ["run=story"])
    storage = open_storage(prepared.config.store)
    with session.leased(prepared, prepared.plan, storage, partial(claim_run_dir, prepared), False) as lease:
        yield lease


def without_store(run_dir: Path) -> dict[str, tuple[int, int]]:
    return {name: found for name, found in tree(run_dir).items() if not name.startswith("store/")}


def test_a_refused_command_leaves_the_directory_to_the_run_at_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write_config(tmp_path), write_config(tmp_path, MORE, "more")
    run_dir = tmp_path / "run"
    with at_work(first):
        before = without_store(run_dir)
        assert run(second) == 1
        assert "works on this run directory with other settings" in capsys.readouterr().err
        assert without_store(run_dir) == before
    # The first goes on as if nobody had asked; the second grows the directory once the first is gone.
    claim_run_dir(prepare(first, ["run=story"]))
    with at_work(second):
        assert set(yaml.safe_load((run_dir / "config.yaml").read_text())["regimes"]) == {"segprop", "e2e"}


def test_a_refused_sweep_leaves_the_directory_to_the_sweep_at_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestrator.sweeps.prepare import claim_sweep_dir, prepare_sweep

    section = {"parameters": {"split.base": {"grid": [1, 2]}}, "metric": "segprop.validation.accuracy"}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**TINY, "run_dir": str(tmp_path / "run"), "sweep": section}))
    sweep = prepare_sweep(path)
    storage = open_storage(sweep.config.store)
    as_run = sweep.trials[0].prepared
    config = as_run.config.model_copy(update={"run": sweep.run, "run_dir": str(sweep.run_dir)})
    held = session.leased(
        prepared=replace(as_run, config=config, plan=sweep.plan),
        plan=sweep.plan,
        storage=storage,
        claim_directory=partial(claim_sweep_dir, sweep),
        take_over=False,
    )
    with held:
        before = without_store(tmp_path / "run")
        assert main(["sweep", str(path), "--quiet", "sweep.parameters.split.base.grid=[1, 2, 3]"]) == 1
        assert "works on this run directory with other settings" in capsys.readouterr().err
        assert without_store(tmp_path / "run") == before


def test_a_run_with_other_settings_can_be_taken_over_and_its_driver_stops(tmp_path: Path) -> None:
    first, second = write_config(tmp_path), prepare(write_config(tmp_path, MORE, "more"), ["run=story"])
    with at_work(first) as lease:
        storage = open_storage(second.config.store)
        with session.leased(second, second.plan, storage, partial(claim_run_dir, second), True) as other:
            lease._thread.join(timeout=60)
            assert lease.superseded
            assert not other.superseded


SHORT: dict[str, Any] = {
    "regimes": ["e2e"],
    "training.epochs": 1,
    "data.train_limit": 32,
    "data.test_limit": 16,
    "data.validation": 16,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a small finished run whose store lies beside its directory."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, {**SHORT, "store": str(folder / "store")})
    assert run(config) == 0
    return config


@contextmanager
def without_room(folder: Path) -> Iterator[None]:
    """Let nothing be written below `folder`, as on a full disk."""
    real = os.fsync

    def full(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


@pytest.mark.parametrize("command", ["run", "export", "report"])
def test_a_full_run_directory_is_an_error_in_a_sentence(
    finished: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = finished.parent / "run"
    (run_dir / "model" / "e2e" / "model.safetensors").unlink()
    with without_room(run_dir):
        code = run(finished) if command == "run" else main([command, str(run_dir)])
    assert code == 1
    assert "No space left on device; free some space and run again" in capsys.readouterr().err
    assert run(finished) == 0
    assert (run_dir / "model" / "e2e" / "model.safetensors").exists()


def test_a_removed_run_directory_is_made_again_with_its_configuration(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = write_config(tmp_path, {**SHORT, "store": str(tmp_path / "store")})

    class Removing(CommitLog):
        def add(self, node_id: str, commit: Commit) -> None:
            super().add(node_id, commit)
            shutil.rmtree(run_dir, ignore_errors=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "CommitLog", Removing)
        assert run(config) == 0
    names = {path.name for path in run_dir.iterdir()}
    # Points are told from when there are some: the file may be one that was removed.
    assert names - {"points.jsonl", "tb_live"} == {
        "config.yaml",
        "driver.json",
        "model",
        "plan.json",
        "report.html",
        "summary.json",
        "tb",
    }
    assert main(["report", str(run_dir)]) == 0


def test_records_of_the_directory_may_be_anything(finished: Path, tmp_path: Path) -> None:
    """What a run leaves there for itself decides nothing: it is written again, and nothing waits."""
    run_dir = finished.parent / "run"
    for name in ("driver.json", "log.jsonl", "summary.json", "plan.json", "points.jsonl"):
        for kind in ("pipe", "link", "bytes"):
            path = run_dir / name
            path.unlink(missing_ok=True)
            elsewhere = tmp_path / f"{name}-{kind}"
            elsewhere.write_text("of somebody else")
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "link":
                path.symlink_to(elsewhere)
            else:
                path.write_bytes(b"\xff\xfe\0[" * 99)
            with at_work(finished):
                logging.getLogger("segprop").info("something happened")
            assert run(finished) == 0
            assert elsewhere.read_text() == "of somebody else"
            path.unlink(missing_ok=True)


NONSENSE: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "nulls": b"model: null\ndata: null\nregimes: null\nstore: null\nresources: null\n",
    "a list": b"[1, 2]",
    "deep": b"[" * 50_000,
    "long number": b"seed: " + b"9" * 6000,
    "zero bytes": b"\0" * 100,
    "another encoding": "seed: 1\n".encode("utf-16"),
    "huge": b"# " + b"x" * (2 << 20),
    "regimes of nothing": b"regimes: 7\n",
    "store of nothing": b"store: [1]\nmodel: {name: resnet18}\n",
}


@pytest.mark.parametrize("command", ["run", "status", "report", "export"])
def test_a_configuration_of_nonsense_is_bad_input(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run_dir = write_config(tmp_path, SHORT), tmp_path / "run"
    (run_dir / "store").mkdir(parents=True)
    held = run_dir / "config.yaml"

    def refused(what: str) -> None:
        code = run(config) if command == "run" else main([command, str(run_dir)])
        assert code == 2, what
        assert "segprop: " in capsys.readouterr().err

    for what, data in NONSENSE.items():
        held.write_bytes(data)
        refused(what)
        if command == "status":
            for pointer in (b'{"plan": "' + b"d" * 32 + b'"}', b"[" * 50_000):
                (run_dir / "driver.json").write_bytes(pointer)
                refused(what)
    held.unlink()
    os.mkfifo(held)
    refused("a pipe")
    held.unlink()
    held.symlink_to("/dev/zero")
    refused("a device")
    held.unlink()
    held.mkdir()
    refused("a folder")


def test_a_budget_holds_in_the_run_its_record_and_its_report(tmp_path: Path) -> None:
    changes = {"budget": {"samples": "e2e"}, "training.epochs": 8, "regimes": ["e2e", "segprop"], "split.base": 3}
    config = write_config(tmp_path, changes)
    assert main(["run", str(config), "--quiet"]) == 0
    summary = summary_of(tmp_path / "run")
    run = {name: [len(stage["curve"]) for stage in regime["stages"]] for name, regime in summary["regimes"].items()}
    assert run == {"e2e": [8], "segprop": [4, 4]}
    (note,) = summary["regimes"]["segprop"]["notes"]
    assert note.startswith("epochs a stage by the budget: 4")
    # Again by the file, and by the record, which holds the epochs: nothing is left to do.
    for path in (config, tmp_path / "run" / "config.yaml"):
        prepared = prepare(path)
        nodes = NodeStore(open_storage(prepared.config.store))
        assert all(nodes.commit_of(node) is not None for node in prepared.plan.targets)
