"""`segprop why`, and the dry run's line: what the store's commits say of a plan's nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from planning import CIFAR, SMALL, merged

from cache_store.errors import UserError
from cache_store.records.nodes import NodeStore
from cache_store.storage.open import open_storage
from orchestrator.cli import main
from orchestrator.execution.finished import read_finished
from orchestrator.plan.graph import Plan
from orchestrator.plan.identity import identity_of
from orchestrator.runs.prepare import Prepared, prepare
from orchestrator.runs.why import find_node, look_at, reuse_line, why_text


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    changes = {"run_dir": str(tmp_path / "run"), "regimes": ["segprop"]}
    path.write_text(yaml.safe_dump(merged(SMALL, changes), sort_keys=False))
    return path


def prepared(path: Path, *overrides: str) -> Prepared:
    return prepare(path, overrides, inspect=lambda data, seed: CIFAR)


def finish(found: Prepared, *labels: str, recorded: bool = True) -> None:
    """Commit these nodes of a plan, or all."""
    nodes = NodeStore(open_storage(found.config.store))
    for node in found.plan.nodes:
        if not labels or node.label in labels:
            identity = identity_of(node).to_json() if recorded else None
            nodes.attempt(node.id, identity).commit({"seconds": 1.0})


def test_a_stage_that_would_run_again_names_the_key_and_both_values(config: Path) -> None:
    finish(prepared(config, "training.optimizer.lr=0.002"))
    found = look_at(prepared(config, "training.optimizer.lr=0.001"), "stage1-base")
    text = why_text(found)
    assert text.startswith(f"segprop/stage1-base  {found.id}  would run again\n")
    assert "\n  training.optimizer.lr: 0.001\n" in text
    assert "\n  training.optimizer.lr: 0.001 here, 0.002 in the finished one" in text
    assert text.count("in the finished one") == 1
    assert "\n  parent data: data, " in text


def test_a_later_stage_names_the_parent_in_which_the_cause_lies(config: Path) -> None:
    finish(prepared(config, "training.optimizer.lr=0.002"))
    text = why_text(look_at(prepared(config, "training.optimizer.lr=0.001"), "segprop/stage3-seg3"))
    assert "  parent segprop/stage1-base: training.optimizer.lr: 0.001 here, 0.002 in the finished one" in text


def test_a_finished_stage_is_shown_without_a_comparison(config: Path) -> None:
    finish(prepared(config))
    text = why_text(look_at(prepared(config), "stage1-base"))
    assert "  is finished\nmade of:\n" in text
    assert "differs" not in text
    assert "not finished" not in text


def test_what_older_commits_do_not_record_is_said(config: Path) -> None:
    finish(prepared(config, "seed=1"), recorded=False)
    found = look_at(prepared(config), "stage1-base")
    assert found.nearest is None
    text = why_text(found)
    assert "  would run\n" in text
    assert "no finished node of this name is recorded" in text
    count = len(prepared(config).plan.nodes) - 1  # decoded data have no seed
    assert f"{count} finished nodes were committed by a version that did not record" in text


def test_without_a_store_everything_would_run(config: Path) -> None:
    assert "  would run\n" in why_text(look_at(prepared(config), "stage1-base"))
    count = len(prepared(config).plan.nodes)
    assert reuse_line(prepared(config)) == f"0 of {count} nodes are finished."


def test_the_dry_run_says_how_much_is_finished_and_why_the_first_would_run_again(config: Path) -> None:
    before = prepared(config, "training.optimizer.lr=0.001")
    finish(before)
    count = len(before.plan.nodes)
    assert reuse_line(before) == f"{count} of {count} nodes are finished."
    line = reuse_line(prepared(config, "training.optimizer.lr=0.002"))
    assert line.startswith(
        f"2 of {count} nodes are finished; segprop/stage1-base and {count - 3} more would run again: "
    )
    assert line.endswith(": training.optimizer.lr 0.001 → 0.002.")


def test_nodes_that_were_never_finished_do_not_run_again(config: Path) -> None:
    finish(prepared(config), "data", "model", "segprop/stage1-base")
    assert reuse_line(prepared(config)).endswith(" nodes are finished.")


def test_a_look_at_a_large_store_is_bounded_and_says_so(config: Path) -> None:
    finish(prepared(config, "seed=1"))
    plan = prepared(config).plan
    found = read_finished(prepared(config).config.store, plan, most=5)
    assert len(found.identities) == 5
    assert found.unread == len(plan.nodes) - 1 - 5  # decoded data have no seed


def test_a_damaged_commit_is_passed_over(config: Path) -> None:
    finish(prepared(config, "seed=1"))
    for commit in Path(prepared(config).config.store).glob("nodes/*/commit.json"):
        commit.write_text("{")
    found = read_finished(prepared(config).config.store, prepared(config).plan)
    assert (found.identities, found.unrecorded, found.committed) == ({}, 0, frozenset())


def named(plan: Plan, name: str) -> str:
    return find_node(plan, name).label


def test_names_are_labels_or_unique_names_and_others_get_the_nearest(config: Path) -> None:
    plan = prepared(config, "regimes=[lw, segprop]").plan
    assert named(plan, "data") == "data"
    assert named(plan, "segprop/stage2-seg2") == "segprop/stage2-seg2"
    assert named(plan, "stage1-base") == "segprop/stage1-base"
    with pytest.raises(UserError, match=r"2 nodes have this name: lw/stage2-seg2, segprop/stage2-seg2"):
        find_node(plan, "stage2-seg2")
    with pytest.raises(UserError, match="did you mean 'segprop/stage2-seg2'"):
        find_node(plan, "segprop/stage2-sge2")
    with pytest.raises(UserError, match="its stages: lw/stage1-seg1, "):
        find_node(plan, "nonsense, entirely")


def test_the_program_prints_json_and_refuses_what_is_no_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "digits.yaml"
    path.write_text(yaml.safe_dump(merged(SMALL, {"run_dir": str(tmp_path / "run"), "regimes": ["segprop"]})))
    finish(prepare(path, ["training.epochs=5"]))
    assert main(["why", str(path), "stage2-seg2", "training.epochs=6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finished"] is False
    assert found["fields"]["training.epochs"] == 6
    assert found["nearest"]["differences"] == [
        {"key": "training.epochs", "here": 6, "there": 5, "ancestor": "segprop/stage1-base"}
    ]
    assert main(["why", str(path), "stage2-sge2"]) == 2
    assert "did you mean 'stage2-seg2'?" in capsys.readouterr().err
    assert main(["why", str(tmp_path / "nothing"), "data"]) == 2
    assert "not a run directory" in capsys.readouterr().err
