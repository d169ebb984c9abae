"""Whole runs as users start them: a second driver, a killed one, one taken over; and what can be seen meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, checkpoints, summary_of, wait_for, write_config

from orchestrator.runs.prepare import prepare
from orchestrator.status.observe import observe

#: Alone, some seconds; what is waited for is given a busy machine's time.
pytestmark = pytest.mark.timeout(1500)
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


def count(run_dir: Path, name: str) -> int:
    return sum(event["event"] == name for event in events(run_dir))


def test_a_second_driver_is_refused_a_killed_one_replaced_at_once_and_a_living_one_taken_over(tmp_path: Path) -> None:
    """Drivers are held still where a quick machine would otherwise be done before the next one is there."""
    config, run_dir = write_config(tmp_path, LONG), tmp_path / "run"
    outputs = [tmp_path / f"{name}.txt" for name in ("first", "second", "third", "fourth")]
    first = start(outputs[0], str(config))
    wait_for(lambda: list(checkpoints(run_dir / "store")), 400, outputs[0].read_text)
    first.send_signal(signal.SIGSTOP)

    # Beside a living one: refused, and everything is as it was.
    assert start(outputs[1], str(config)).wait(timeout=300) == 1
    assert f"driver {first.pid} on " in outputs[1].read_text()
    assert "works on this run" in outputs[1].read_text()
    status = observe(str(run_dir)).look()
    assert status.state == "running"
    assert status.driver is not None
    assert str(first.pid) in status.driver

    # After a killed one: at once, from its checkpoint.
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=60)
    status = observe(str(run_dir)).look()
    assert status.state == "killed"
    assert [stage.state for stage in status.regimes["segprop"].stages] == ["stopped", "waiting"]
    before = count(run_dir, "started")
    third = start(outputs[2], str(config))
    wait_for(lambda: count(run_dir, "started") > before, 400, outputs[2].read_text)
    third.send_signal(signal.SIGSTOP)
    assert "listening" not in outputs[2].read_text()

    # From a living one, when asked to: it stops by itself.
    before = count(run_dir, "submitted")
    fourth = start(outputs[3], str(config), "--take-over")
    wait_for(lambda: count(run_dir, "submitted") > before, 400, outputs[3].read_text)
    third.send_signal(signal.SIGCONT)
    assert third.wait(timeout=300) == 1
    assert "another driver has taken this run over" in outputs[2].read_text()
    assert fourth.wait(timeout=600) == 0, outputs[3].read_text()

    assert summary_of(run_dir)["status"] == "done"
    status = observe(str(run_dir)).look()
    assert status.state == "done"
    assert {stage.state for stage in status.regimes["segprop"].stages} == {"done"}
    # Everything that happened is in the log, over four drivers.
    lines = events(run_dir)
    assert {"submitted", "started", "committed", "released"} <= {line["event"] for line in lines}
    committed = {line["node"] for line in lines if line["event"] == "committed"}
    assert committed >= {node.id for node in prepare(config).plan.nodes if node.kind == "train"}
    assert any(line.get("resumed") for line in lines if line["event"] == "committed")


def test_a_driver_whose_store_vanishes_ends_with_the_reason_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    store, run_dir = tmp_path / "store", tmp_path / "run"
    config = write_config(
        tmp_path, {**LONG, "store": str(store), "resources.max_attempts": 2, "resources.store_deadline_s": 1}
    )
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
