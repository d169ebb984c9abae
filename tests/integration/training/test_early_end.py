"""A regime that ends as soon as the whole network is good enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from running import Lab, digests, final_digests, summary_of, write_config

from orchestrator.cli import main
from orchestrator.runs.prepare import prepare

CHANGES: dict[str, Any] = {
    "data.train_limit": 32,
    "split": {"base": 2, "intermediate": "frozen"},
    "training.epochs": 1,
    "training.head_optimizer": "carry",
}


def test_stages_after_the_target_commit_what_they_were_given_and_read_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path, {**CHANGES, "run_exit": {"accuracy": 0.01, "loss": 100.0}})
    assert main(["run", str(config), "--quiet"]) == 0
    summary = summary_of(tmp_path / "run")
    regime = summary["regimes"]["segprop"]
    assert [stage["exit"] for stage in regime["stages"]] == ["epochs", "run target", "run target"]
    assert regime["ended_early"]["after"] == "stage1-base"
    assert regime["final"]["validation"] == regime["stages"][0]["assembled"]
    assert regime["snapshot"] == {"hits": 0, "misses": 0, "bytes_read": 0, "bytes_written": 0}
    assert "ended early" in (tmp_path / "run" / "report.html").read_text()

    prepared = prepare(config)
    lab = Lab(prepared)
    first, second, last = (digests(lab.commit(f"segprop/stage{name}")) for name in ("1-base", "2-seg3", "3-seg4"))
    assert first["head"] == second["head"] == last["head"]
    final = final_digests(prepared)["segprop"]
    assert final == {"seg1": first["seg1"], "seg2": first["seg2"], **last, "seg3": second["seg3"]}
    assert (tmp_path / "run" / "model" / "segprop" / "model.safetensors").exists()
    # Nothing is left to do, and no released set is made again.
    assert main(["run", str(config), "--quiet"]) == 0
    assert summary_of(tmp_path / "run")["nodes"]["reused"] == len(prepared.plan.nodes)


def test_a_target_that_is_never_reached_changes_no_bit(tmp_path: Path) -> None:
    found = []
    for name, changes in (("plain", {}), ("gated", {"run_exit": {"loss": 1e-9}})):
        lab = Lab.make(tmp_path / name, {**CHANGES, **changes})
        for node in lab.prepared.plan.nodes:
            if node.kind == "train":
                lab.run(node.label)
        found.append(final_digests(lab.prepared))
    assert found[0] == found[1]
