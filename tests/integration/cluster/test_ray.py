"""Runs on real Ray: the same numbers as in one process, whatever is lost on the way."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import TOKEN
from running import RayHome, checkpoints, final_digests, summary_of, wait_for, write_config

from cache_store.errors import UserError
from cache_store.records.nodes import NodeStore
from cache_store.storage.open import open_storage
from orchestrator.cli import main
from orchestrator.runs.prepare import prepare

#: Stages of some seconds, with a checkpoint a second.
LONG = {
    "regimes": ["segprop"],
    "data.train_limit": 128,
    "training.epochs": 12,
    "training.precision": "bf16",
    "training.channels_last": True,
    "training.checkpoint_every_s": 0.01,
    "split.base": 3,
}
THREE = {"regimes": ["e2e", "lw", "segprop"], "training.epochs": 1, "data.train_limit": 48, "evaluation.stages": False}


def on_ray(slots: int = 1, **more: Any) -> dict[str, Any]:
    return {"resources": {"runner": "ray", "device": "cpu", "slots": slots, "threads": 1, **more}}


@pytest.fixture(scope="module")
def long_reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    config = write_config(tmp_path_factory.mktemp("long"), LONG)
    assert main(["run", str(config), "--quiet"]) == 0
    return final_digests(prepare(config))


def resumed(config: Path) -> int:
    """How often stages went on from a checkpoint."""
    prepared = prepare(config)
    nodes = NodeStore(open_storage(prepared.config.store))
    commits = [nodes.commit_of(node.id) for node in prepared.plan.nodes if node.kind == "train"]
    return sum(commit.result["resumed"] for commit in commits if commit)


@pytest.mark.timeout(600)
def test_the_command_finishes_on_a_cluster_with_the_weights_of_the_in_process_runner(
    tmp_path: Path, cluster: str, ray_home: RayHome
) -> None:
    local = write_config(tmp_path / "local", THREE)
    assert main(["run", str(local), "--quiet"]) == 0
    config = write_config(tmp_path, {**THREE, **on_ray(2, address=cluster)})
    output = tmp_path / "output.txt"
    assert ray_home.start(str(config), output=output, **TOKEN).wait(timeout=500) == 0, output.read_text()
    assert final_digests(prepare(config)) == final_digests(prepare(local))
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "done"
    pids = {item["where"]["pid"] for item in summary["work"]}
    assert len(pids) == 2, "two slots, two workers, kept for the whole run"
    assert "segprop/stage4-seg4: done" in output.read_text()
    # The same command again: nothing to do, so no Ray (the address is not even looked at).
    again = write_config(tmp_path, {**THREE, **on_ray(2, address="192.0.2.1:1")}, "again")
    started = time.monotonic()
    assert ray_home.start(str(again), "run=tiny", output=output).wait(timeout=120) == 0, output.read_text()
    assert time.monotonic() - started < 60
    assert summary_of(tmp_path / "run")["nodes"]["reused"] == summary["nodes"]["total"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_worker_killed_in_mid_stage_is_retried_with_the_same_outcome(
    tmp_path: Path, cluster: str, ray_home: RayHome, long_reference: dict[str, dict[str, str]]
) -> None:
    config = write_config(tmp_path, {**LONG, **on_ray(address=cluster)})
    output = tmp_path / "output.txt"
    driver = ray_home.start(str(config), output=output, **TOKEN)
    wait_for(lambda: list(checkpoints(tmp_path / "run" / "store")), 300, output.read_text)
    (pid,) = ray_home.workers()
    os.kill(pid, signal.SIGKILL)
    assert driver.wait(timeout=500) == 0, output.read_text()
    assert "worker lost" in output.read_text()
    assert "attempt 2 of 3" in output.read_text()
    assert resumed(config) == 1
    assert final_digests(prepare(config)) == long_reference


def test_more_slots_than_there_are_is_bad_input_that_says_what_is_missing(
    tmp_path: Path, cluster: str, ray_home: RayHome
) -> None:
    config = write_config(tmp_path, {**THREE, **on_ray(3, address=cluster)})
    output = tmp_path / "output.txt"
    assert ray_home.start(str(config), output=output, **TOKEN).wait(timeout=120) == 2
    text = output.read_text()
    assert "3 slots need 3 CPU, the cluster has 2" in text
    assert "lower resources.slots" in text
    assert not (tmp_path / "run" / "store" / "nodes").exists(), "nothing was started"


def test_a_cluster_that_does_not_let_us_in_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray itself takes minutes to give up.
    import ray

    from orchestrator.runners.ray import RayRunner, RaySettings

    def refuse(**options: Any) -> None:
        assert options["address"] == "192.0.2.1:6379"
        raise ConnectionError("Failed to connect") from RuntimeError("InvalidAuthToken\n…")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError, match=r"no Ray cluster lets us in at 192\.0\.2\.1:6379 \(InvalidAuthToken\)"):
        RayRunner(RaySettings(slots=1, threads=1, device="cpu", address="192.0.2.1:6379")).start()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_sigterm_stops_in_order_and_the_same_command_goes_on(
    tmp_path: Path, long_reference: dict[str, dict[str, str]], ray_home: RayHome
) -> None:
    # A Ray of its own, as users have it.
    home = RayHome(ray_home.folder / "own")
    home.folder.mkdir()
    config = write_config(tmp_path, {**LONG, **on_ray()})
    output = tmp_path / "output.txt"
    driver = home.start(str(config), output=output)
    wait_for(lambda: list(checkpoints(tmp_path / "run" / "store")), 300, output.read_text)
    driver.terminate()
    assert driver.wait(timeout=120) == 1, output.read_text()
    assert "run the same command to go on" in output.read_text()
    home.wait_gone()
    assert summary_of(tmp_path / "run")["status"] == "stopped"
    assert list(checkpoints(tmp_path / "run" / "store"))
    assert home.start(str(config), output=output).wait(timeout=500) == 0, output.read_text()
    home.wait_gone()
    assert resumed(config) >= 1
    assert final_digests(prepare(config)) == long_reference
