"""`snapshots.costs: measured`: measured once, then every invocation over the store decides alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_running import lm_changes
from running import final_digests, write_config

from cache_store.records.nodes import Commit, NodeStore
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import existing_storage
from orchestrator.runs.prepare import Prepared, prepare
from orchestrator.runs.run_dir import claim_run_dir
from orchestrator.runs.session import execute


@pytest.fixture(autouse=True)
def in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures good enough to be there."""
    monkeypatch.setattr("workers.tasks.measure.MOST_S", 0.02)


COSTS = {"build", "group", "batch", "write", "open", "read"}


def run(path: Path, *overrides: str) -> Prepared:
    prepared = prepare(path, overrides)
    claim_run_dir(prepared)
    assert execute(prepared, quiet=True) == 0
    return prepare(path, overrides)


def summary_of(prepared: Prepared) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((prepared.run_dir / "summary.json").read_text())
    return found


def measurement(prepared: Prepared) -> Commit:
    (node,) = [node for node in prepared.plan.nodes if node.kind == "measure"]
    commit = NodeStore(existing_storage(prepared.config.store)).commit_of(node.id)
    assert commit is not None
    return commit


@pytest.mark.parametrize("kind", ["images", "text"])
def test_a_run_measures_first_and_every_later_invocation_takes_its_figures(kind: str, tmp_path: Path) -> None:
    changes = lm_changes(tmp_path) if kind == "text" else {"training.epochs": 1}
    changes |= {"snapshots.costs": "measured", "snapshots.retention": "keep"}
    path = write_config(tmp_path, changes)
    before = prepare(path)
    assert len(before.plan.unmeasured) == 1
    after = run(path)
    assert after.plan.unmeasured == ()
    commit = measurement(after)
    blocks = commit.result["figures"]["blocks"]
    assert list(blocks) == (["seg1", "seg2", "seg3", "seg4"] if kind == "images" else ["embed", "layer0"])
    assert all(set(block) == COSTS and min(block.values()) > 0 for block in blocks.values())
    # What was written to be timed is gone.
    sets = SnapshotStore(existing_storage(after.config.store)).list()
    assert {info.key.get("kind") for info in sets}.isdisjoint({"measurement"})
    # The same command, and another driver of the same store, find everything done.
    again = run(path)
    assert [node.id for node in again.plan.nodes] == [node.id for node in after.plan.nodes]
    assert measurement(again) == commit
    summary = summary_of(again)
    assert summary["nodes"]["reused"] == summary["nodes"]["total"]
    boundaries = summary["regimes"]["segprop"]["boundaries"]
    assert [each["basis"] for each in boundaries] == ["measured"] * len(boundaries)
    for each in boundaries:
        assert min(each["predicted"].values()) > 0
        known = {key for key, value in each["measured"].items() if value is not None}
        stored = {"bytes", "make_seconds", "read_seconds"}
        assert known == (stored if each["source"] == "snapshots" else {"recompute_seconds"})
    assert "Snapshots or recompute" in (again.run_dir / "report.html").read_text()


def test_a_forced_mode_is_measured_too_and_gives_the_weights_of_the_run_without(tmp_path: Path) -> None:
    changes = {"training.epochs": 1, "snapshots.mode": "always", "evaluation.stages": False, "data.train_limit": 32}
    plain = run(write_config(tmp_path / "plain", changes))
    forced = run(write_config(tmp_path / "forced", {**changes, "snapshots.costs": "measured"}))
    assert final_digests(plain) == final_digests(forced)
    never = run(write_config(tmp_path / "never", {**changes, "snapshots.costs": "measured", "snapshots.mode": "never"}))
    for prepared, key, basis in ((forced, "read_seconds", "measured"), (plain, "read_seconds", "nominal")):
        for each in summary_of(prepared)["regimes"]["segprop"]["boundaries"]:
            assert each["basis"] == basis
            assert each["measured"]["bytes"] == each["predicted"]["bytes"]
            assert each["measured"][key] > 0
    for each in summary_of(never)["regimes"]["segprop"]["boundaries"]:
        assert each["measured"]["recompute_seconds"] > 0
        assert each["measured"]["make_seconds"] is None
