"""Three machines, of which some are lost: the run finishes on what is left, or says why not; nothing stays behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, RayHome, checkpoints, final_digests, summary_of, wait_for, write_config

from orchestrator.cli import main
from orchestrator.runs.prepare import prepare

LONG = {
    "regimes": ["segprop", "lw"],
    "training.epochs": 8,
    "training.checkpoint_every_s": 0.01,
    "split.base": 3,
    "evaluation.stages": False,
}
#: A node that does not answer is lost for Ray after half a minute by itself; the rest is a busy machine's.
pytestmark = pytest.mark.timeout(1500)


@dataclass
class Machines:
    process: subprocess.Popen[str]
    address: str
    log: Path

    def ask(self, command: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def left(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("left")
        return found


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, ray_home: RayHome) -> Iterator[tuple[Machines, RayHome]]:
    home = RayHome(ray_home.folder / "three")
    home.folder.mkdir()
    log = tmp_path_factory.mktemp("three") / "log.txt"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "three_nodes.py"), str(home.folder)],
            env=home.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, log.read_text()
    yield Machines(process, json.loads(line), log), home
    process.communicate("", timeout=120)
    home.kill_all()


def on(machines: Machines, slots: int, **more: Any) -> dict[str, Any]:
    return {
        "resources": {
            "runner": "ray",
            "device": "cpu",
            "slots": slots,
            "threads": 1,
            "address": machines.address,
            "max_attempts": 5,
            **more,
        }
    }


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_what_no_machine_has_is_refused_with_what_there_is(machines: tuple[Machines, RayHome], tmp_path: Path) -> None:
    cluster, home = machines
    config = write_config(tmp_path, {**LONG, **on(cluster, 1, labels={"zone": "z"}, accelerator="H100")})
    output = tmp_path / "output.txt"
    assert home.start(str(config), output=output).wait(timeout=300) == 2
    assert "resources.labels: no machine of the cluster has zone: z; there is zone: a, b" in output.read_text()
    assert "resources.accelerator: no machine of the cluster has H100; there is: none" in output.read_text()


@pytest.mark.long
def test_a_removed_node_and_a_killed_raylet_cost_attempts_but_nothing_else(
    machines: tuple[Machines, RayHome], tmp_path: Path
) -> None:
    cluster, home = machines
    reference = write_config(tmp_path / "reference", LONG)
    assert main(["run", str(reference), "--quiet"]) == 0
    expected = final_digests(prepare(reference))
    config = write_config(tmp_path, {**LONG, **on(cluster, 3)})
    output, run_dir = tmp_path / "output.txt", tmp_path / "run"
    driver = home.start(str(config), output=output)
    wait_for(lambda: list(checkpoints(run_dir / "store")), 400, output.read_text)
    cluster.ask("remove 2")
    wait_for(lambda: [event for event in events(run_dir) if event["event"] == "committed"], 400, output.read_text)
    cluster.ask("kill 1")
    assert driver.wait(timeout=900) == 0, output.read_text()
    assert final_digests(prepare(config)) == expected
    assert summary_of(run_dir)["status"] == "done"

    assert not home.workers()
    wait_for(lambda: cluster.left()["nodes"] == 2, 120, lambda: str(cluster.left()))
    wait_for(lambda: cluster.left()["held"] == 0, 60, lambda: str(cluster.left()))
    assert cluster.left() == {"nodes": 2, "actors": 0, "groups": 0, "held": 0}

    # With too few devices left it ends, with the reason and in time; with enough again it goes on.
    more = {**LONG, "seed": 7, **on(cluster, 1, labels={"zone": "a"}, worker_deadline_s=10)}
    config = write_config(tmp_path / "again", more)
    output, run_dir = tmp_path / "again.txt", tmp_path / "again" / "run"
    driver = home.start(str(config), output=output)
    wait_for(lambda: list(checkpoints(run_dir / "store")), 400, output.read_text)
    cluster.ask("remove 0")
    started = time.monotonic()
    assert driver.wait(timeout=300) == 1, output.read_text()
    assert time.monotonic() - started < 120
    assert "no worker has come (back) within 10 s" in output.read_text()
    assert "0 machines with 0 CPU and 0 GPU are left" in output.read_text()
    assert any(event["event"] == "retried" and "lost" in event["error"] for event in events(run_dir))
    cluster.ask("add")
    assert home.start(str(config), output=output).wait(timeout=600) == 0, output.read_text()
    assert summary_of(run_dir)["status"] == "done"
    assert cluster.left()["actors"] == 0
