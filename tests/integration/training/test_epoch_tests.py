"""`evaluation.every: epoch`: the test split is scored after every epoch, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from running import Lab, StopAfter, digests

from cache_store.errors import Interrupted
from workers.training import clocks

EVERY: dict[str, Any] = {
    "training.epochs": 2,
    "training.commit": "last",
    "model.dropout": 0.5,
    "data.views": "auto",
    "evaluation.every": "epoch",
    "regimes": ["e2e", "lw", "segprop"],
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """All stages of the three regimes, with scores after every epoch."""
    made = Lab.make(tmp_path_factory.mktemp("tested"), EVERY)
    made.run_all()
    return made


def epochs(lab: Lab, label: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = list(lab.commit(label).result["epochs"])
    return found


def test_the_last_epoch_scores_what_the_evaluation_of_the_finished_network_does(lab: Lab) -> None:
    for regime, last in (("e2e", "e2e"), ("lw", "head"), ("segprop", "stage4-seg4")):
        final = lab.commit(f"{regime}/final test").result["metrics"]
        assert epochs(lab, f"{regime}/{last}")[-1]["test"] == final


def test_stages_with_an_adapter_or_a_local_head_score_their_own_path_beside_the_network(lab: Lab) -> None:
    aux = {
        node.label: ["test_auxiliary" in epoch for epoch in epochs(lab, node.label)]
        for node in lab.prepared.plan.nodes
        if node.kind == "train"
    }
    assert {label for label, found in aux.items() if found == [False, False]} == {
        "e2e/e2e",
        "lw/head",
        "segprop/stage4-seg4",
    }
    assert all(found in ([True, True], [False, False]) for found in aux.values())
    for label in ("segprop/stage2-seg2", "lw/stage2-seg2"):
        for epoch in epochs(lab, label):
            assert set(epoch["test"]) == set(epoch["test_auxiliary"]) == {"loss", "accuracy"}
            # Blocks behind the stage are random still.
            assert epoch["test"] != epoch["test_auxiliary"]
            assert epoch["test_seconds"] > 0


def test_a_stage_is_given_the_weights_of_the_whole_network(lab: Lab) -> None:
    node = lab.node("segprop/stage2-seg2")
    assert node.task["test"]["path"] == ["seg1", "seg2", "seg3", "seg4", "head"]
    assert {role for role in node.parents if role.startswith("weights/")} == {
        f"weights/{part}" for part in node.task["test"]["path"]
    }


def test_scoring_changes_no_bit_of_what_is_trained_and_ids_only_where_it_is_asked_for(lab: Lab, tmp_path: Path) -> None:
    plain = Lab.make(tmp_path, {key: value for key, value in EVERY.items() if key != "evaluation.every"})
    for label in ("e2e/e2e", "segprop/stage2-seg2"):
        commit = plain.run(label)
        assert "test" not in plain.node(label).task
        assert all("test" not in epoch for epoch in commit.result["epochs"])
        assert digests(commit) == digests(lab.commit(label))
        assert plain.node(label).id != lab.node(label).id
    assert plain.node("model").id == lab.node("model").id


def test_a_stage_that_is_stopped_goes_on_with_the_scores_it_had(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "REPORT_EVERY_S", 0.0)
    other, label = lab.linked_copy(tmp_path), "segprop/stage1-base"
    other.forget(label)
    with pytest.raises(Interrupted, match="epoch 2, step 2"):
        other.run(label, StopAfter(8))
    resumed = other.run(label)
    assert resumed.result["resumed"] == 1
    assert digests(resumed) == digests(lab.commit(label))
    for key in ("test", "test_auxiliary", "validation_loss"):
        assert [epoch[key] for epoch in resumed.result["epochs"]] == [epoch[key] for epoch in epochs(lab, label)]
