"""A small language model's run on real Ray, killed at five moments."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_running import lm_changes, write_checkpoint
from running import Lab, RayHome, final_digests, summary_of, tree, write_config

from orchestrator.runs.prepare import prepare

#: Where a process kills itself, and at which of its own visits.
DRIVER_KILLS = ("driver.committed:3",)
WORKER_KILLS = ("stage.step:7", "checkpoint.committed:1", "shard.written:2", "node.committed:4")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_language_models_run_killed_at_five_moments_loses_nothing(tmp_path: Path, ray_home: RayHome) -> None:
    changes = {
        **lm_changes(tmp_path),
        "model": {"family": "causal_lm", "path": str(write_checkpoint(tmp_path / "model", tied=True))},
        "data.pack": False,
        "training.epochs": 3,
        "training.commit": "best",
        "training.micro_batch": 3,
        "training.precision": "bf16",
        "training.checkpoint_every_s": 0.001,  # at the end of every epoch
        "regimes": {
            "frozen": {"kind": "segprop", "split": {"intermediate": "frozen"}},
            "lora": {"kind": "segprop", "training": {"lora": {"rank": 2, "dropout": 0.1}}},
        },
    }
    reference = Lab.make(tmp_path / "reference", changes)
    reference.run_all(("data", "model", "train", "materialize"))
    expected = final_digests(reference.prepared)

    resources = {"runner": "ray", "device": "cpu", "slots": 2, "threads": 1, "max_attempts": 10}
    config = write_config(tmp_path, {**changes, "resources": resources})
    ray_home.run_through_kills(config, driver=DRIVER_KILLS, workers=WORKER_KILLS)
    assert final_digests(prepare(config)) == expected
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "done"
    assert {name: regime["export"] for name, regime in summary["regimes"].items()} == {
        "frozen": "model/frozen",
        "lora": "model/lora",
    }
    assert not [path for path in tree(tmp_path / "run" / "store") if "/quarantine/" in path]
