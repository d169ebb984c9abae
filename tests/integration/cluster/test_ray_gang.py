"""Gangs as Ray Train starts them, through the command a user types: the weights of one device, one gang for the run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lm_running import lm_changes
from running import RayHome, checkpoints, final_digests, summary_of, wait_for, write_config

from orchestrator.runs.prepare import prepare

#: Minutes of starting Ray Train, three times. `test_gang.py` compares the ranks themselves without it.
pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]


def gang_config(folder: Path, **resources: Any) -> Path:
    """Two stages of a tiny Llama on a gang of two ranks, with no slot beside it unless asked for."""
    return write_config(
        folder,
        {
            **lm_changes(folder),
            "regimes": ["segprop"],
            "training.epochs": 2,
            "training.checkpoint_every_s": 0.01,
            "resources": {"runner": "ray", "device": "cpu", "threads": 1, "gang": {"size": 2}, **resources},
        },
    )


def test_a_run_in_a_gang_survives_the_loss_of_a_rank_with_the_same_bits(tmp_path: Path, ray_home: RayHome) -> None:
    home = RayHome(ray_home.folder / "gang")
    home.folder.mkdir()
    whole, output = gang_config(tmp_path / "whole", slots=1), tmp_path / "output.txt"
    assert home.start(str(whole), output=output).wait(timeout=600) == 0, output.read_text()
    home.wait_gone()
    summary = summary_of(tmp_path / "whole" / "run")
    stages = summary["regimes"]["segprop"]["stages"]
    assert [stage["world_size"] for stage in stages] == [2, 2]
    assert len({rank["pid"] for stage in stages for rank in stage["where"]["ranks"]}) == 2, "one gang for both stages"
    gang = {rank["pid"] for rank in stages[0]["where"]["ranks"]}
    assert all(item["where"]["pid"] not in gang for item in summary["work"] if item["kind"] != "train")

    # The same on ranks alone, one of which is killed in mid-stage.
    killed = gang_config(tmp_path / "killed")
    driver = home.start(str(killed), output=output)
    wait_for(lambda: list(checkpoints(tmp_path / "killed" / "run" / "store")), 300, output.read_text)
    ranks = [pid for pid, title in home.processes().items() if title.startswith("ray::RayTrainWorker")]
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    assert driver.wait(timeout=600) == 0, output.read_text()
    assert "worker lost, a rank of the gang" in output.read_text()
    home.wait_gone()
    assert final_digests(prepare(killed)) == final_digests(prepare(whole))
