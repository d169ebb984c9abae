"""Whole runs as users start them: a second driver, a killed one, one taken over; and what can be seen meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, checkpoints, final_digests, summary_of, wait_for, write_config

from orchestrator.cli import main
from orchestrator.prepare import prepare
from orchestrator.status import observe

#: Stages of some seconds, in the driver's own process: no Ray.
LONG = {"training.epochs": 8, "training.checkpoint_every_s": 0.01, "split.base": 3, "evaluation.stages": False}


def start(output: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SEGPROP_"))}
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator.run", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def events(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)
def test_a_second_driver_is_refused_a_killed_one_replaced_at_once_and_a_living_one_taken_over(tmp_path: Path) -> None:
    reference = write_config(tmp_path / "reference", LONG)
    assert main(["run", str(reference), "--quiet"]) == 0

    config, run_dir = write_config(tmp_path, LONG), tmp_path / "run"
    first = start(tmp_path / "first.txt", str(config))
    wait_for(lambda: list(checkpoints(run_dir / "store")), 200, (tmp_path / "first.txt").read_text)

    # Beside a living one: refused, and everything is as it was.
    output = tmp_path / "second.txt"
    assert start(output, str(config)).wait(timeout=120) == 1
    assert f"driver {first.pid} on " in output.read_text()
    assert "works on this run" in output.read_text()
    assert first.poll() is None

    status = observe(str(run_dir)).look()
    assert status.state == "running"
    assert status.driver is not None
    assert str(first.pid) in status.driver

    # After a killed one: at once, from its checkpoint.
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=60)
    status = observe(str(run_dir)).look()
    assert status.state == "killed"
    assert any(stage.state == "stopped" for stage in status.regimes["segprop"].stages)
    third = start(tmp_path / "third.txt", str(config))
    before = len(events(run_dir))
    wait_for(lambda: len(events(run_dir)) > before, 120, (tmp_path / "third.txt").read_text)
    assert "listening" not in (tmp_path / "third.txt").read_text()

    # From a living one, when asked to: it stops by itself.
    count = len(list(checkpoints(run_dir / "store")))
    wait_for(lambda: len(list(checkpoints(run_dir / "store"))) >= min(count, 1), 120)
    fourth = start(tmp_path / "fourth.txt", str(config), "--take-over")
    assert third.wait(timeout=200) == 1
    assert "another driver has taken this run over" in (tmp_path / "third.txt").read_text()
    assert fourth.wait(timeout=400) == 0, (tmp_path / "fourth.txt").read_text()

    assert final_digests(prepare(config)) == final_digests(prepare(reference))
    assert summary_of(run_dir)["status"] == "done"
    status = observe(str(run_dir)).look()
    assert status.state == "done"
    assert {stage.state for stage in status.regimes["segprop"].stages} == {"done"}
    # Every attempt and every commit is in the log, over four drivers.
    lines = events(run_dir)
    assert {"submitted", "started", "committed", "released", "stopped"} <= {line["event"] for line in lines}
    committed = {line["node"] for line in lines if line["event"] == "committed"}
    assert committed >= {node.id for node in prepare(config).plan.nodes if node.kind == "train"}
    assert any(line.get("resumed") for line in lines if line["event"] == "committed")
    # Nothing left to do: no lease is needed, so also beside anybody.
    started = time.monotonic()
    assert start(output, str(config), "--quiet").wait(timeout=120) == 0
    assert time.monotonic() - started < 60


def test_a_driver_whose_store_vanishes_ends_with_the_reason_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    store, run_dir = tmp_path / "store", tmp_path / "run"
    config = write_config(tmp_path, {**LONG, "store": str(store), "resources.max_attempts": 2})
    output = tmp_path / "output.txt"
    driver = start(output, str(config))
    wait_for(lambda: list(checkpoints(store)), 200, output.read_text)
    # As when a volume is unmounted: another, empty and read-only place is there. (Root may write anywhere: a file.)
    store.rename(tmp_path / "kept")
    store.write_text("not a folder")
    assert driver.wait(timeout=200) == 1, output.read_text()
    text = output.read_text()
    assert "failed: " in text
    assert str(store) in text
    assert "Traceback" not in text
    store.unlink()
    (tmp_path / "kept").rename(store)
    assert start(output, str(config)).wait(timeout=300) == 0, output.read_text()
    assert summary_of(run_dir)["status"] == "done"
