"""What nodes are made of, compared key by key: the first cause is named, wherever among the ancestors it lies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from planning import CIFAR, plan_of, small_config, small_plan

from cache_store.keys import digest_json
from orchestrator.plan.differences import ABSENT, Difference, Nearest, differences, nearest
from orchestrator.plan.graph import Plan
from orchestrator.plan.identity import Identity, identity_of

SEGPROP = {"regimes": ["segprop"]}


def identities(plan: Plan) -> dict[str, Identity]:
    return {node.id: identity_of(node) for node in plan.nodes}


def by_label(plan: Plan, label: str) -> Identity:
    (found,) = [identity_of(node) for node in plan.nodes if node.label == label]
    return found


def compared(label: str, now: Plan, before: Plan) -> list[Difference]:
    known = identities(before) | identities(now)
    return differences(by_label(now, label), by_label(before, label), known)


def nearest_of(label: str, now: Plan, *before: Plan) -> Nearest:
    finished = {node: identity for plan in before for node, identity in identities(plan).items()}
    found = nearest(by_label(now, label), identities(now), finished)
    assert found is not None
    return found


def planned(tmp_path: Path, changes: Mapping[str, Any] | None = None, **options: Any) -> Plan:
    return plan_of(small_config(tmp_path, {**SEGPROP, **(changes or {})}), **options)


def test_an_identity_is_what_the_id_is_the_digest_of(tmp_path: Path) -> None:
    plan = planned(tmp_path, versions={"train": {"torch": "1.0"}})
    for node in plan.nodes:
        made = identity_of(node)
        parts = [made.format, made.kind, made.task, sorted(made.parents.items()), dict(made.versions)]
        assert digest_json(parts) == node.id
        assert Identity.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_what_is_no_identity_is_none() -> None:
    good = Identity("train", "r/s", {}, {}, {}, 2).to_json()
    assert Identity.from_json(good) is not None
    assert Identity.from_json({}) is None
    for key in good:
        assert Identity.from_json({**good, key: None}) is None


def test_a_changed_rate_is_named_once_with_both_values_in_the_words_of_the_configuration(tmp_path: Path) -> None:
    now, before = (
        planned(tmp_path, {"training.optimizer.lr": 0.001}),
        planned(tmp_path, {"training.optimizer.lr": 0.002}),
    )
    found = compared("segprop/stage3-seg3", now, before)
    assert found == [Difference("training.optimizer.lr", 0.001, 0.002, "segprop/stage1-base")]


def test_a_stage_that_alone_has_changed_has_the_cause_in_itself(tmp_path: Path) -> None:
    now = planned(tmp_path, {"regimes": {"segprop": {"stages": {"stage2-seg2": {"epochs": 3}}}}})
    before = planned(tmp_path)
    assert compared("segprop/stage2-seg2", now, before) == [Difference("training.epochs", 3, 4)]
    later = compared("segprop/stage4-seg4", now, before)
    assert later == [Difference("training.epochs", 3, 4, "segprop/stage2-seg2")]


def test_other_data_are_the_first_cause_of_everything(tmp_path: Path) -> None:
    now = planned(tmp_path, data=replace(CIFAR, fingerprint="e" * 64))
    assert compared("segprop/final test", now, planned(tmp_path)) == [
        Difference("fingerprint", "e" * 64, "f" * 64, "data")
    ]


def test_another_version_is_named_with_its_package(tmp_path: Path) -> None:
    now = planned(tmp_path, versions={"train": {"torch": "2.9"}})
    before = planned(tmp_path, versions={"train": {"torch": "2.8"}})
    assert compared("segprop/stage2-seg2", now, before) == [
        Difference("version of torch", "2.9", "2.8", "segprop/stage1-base")
    ]


def test_keys_and_parents_that_one_of_them_lacks_are_named(tmp_path: Path) -> None:
    now, before = planned(tmp_path, {"snapshots.mode": "always"}), planned(tmp_path, {"snapshots.mode": "never"})
    found = {each.key: each for each in compared("segprop/stage2-seg2", now, before)}
    assert found["source"].here == "snapshots"
    assert found["parent snapshot/train/0"] == Difference(
        "parent snapshot/train/0", "segprop/snapshot seg1 train view 0", ABSENT
    )
    assert found["parent snapshot/train/1"].there is ABSENT


def test_an_ancestor_of_which_nothing_is_recorded_is_named_as_that() -> None:
    here, there = (Identity("train", "r/stage", {}, {"data": parent}, {}, 2) for parent in ("a", "b"))
    data = Identity("data", "data", {"fingerprint": "1"}, {}, {}, 2)
    (found,) = differences(here, there, {"a": data})
    assert (found.key, found.here, found.there) == ("parent data", "data", "node b, of which nothing is recorded")


def test_ancestors_that_do_other_work_are_not_compared_key_by_key() -> None:
    here, there = (Identity("train", "r/stage", {}, {"weights/x": parent}, {}, 2) for parent in ("a", "b"))
    known = {
        "a": Identity("train", "r/first", {"x": 1}, {}, {}, 2),
        "b": Identity("model", "model", {"y": 1}, {}, {}, 2),
    }
    assert differences(here, there, known) == [Difference("parent weights/x", "r/first", "model")]


def test_a_chain_of_ancestors_may_be_long() -> None:
    def chain(rate: float) -> dict[str, Identity]:
        first = {f"{rate}-0": Identity("train", "r/0", {"lr": rate}, {}, {}, 2)}
        return first | {
            f"{rate}-{i}": Identity("train", f"r/{i}", {}, {"continue": f"{rate}-{i - 1}"}, {}, 2)
            for i in range(1, 3000)
        }

    ours, theirs = chain(1.0), chain(2.0)
    found = differences(ours["1.0-2999"], theirs["2.0-2999"], ours | theirs)
    assert found == [Difference("lr", 1.0, 2.0, "r/0")]


def test_the_nearest_is_the_one_of_the_same_name_with_the_fewest_differing_keys(tmp_path: Path) -> None:
    now = planned(tmp_path)
    close = planned(tmp_path, {"training.optimizer.lr": 0.5})
    far = planned(tmp_path, {"training.optimizer.lr": 0.5, "training.batch_size": 32, "seed": 3})
    found = nearest_of("segprop/stage2-seg2", now, far, close)
    assert found.identity.label == "segprop/stage2-seg2"
    assert [each.key for each in found.differences] == ["training.optimizer.lr"]
    assert found.id in identities(close)


def test_a_node_of_the_plan_itself_or_of_another_name_is_no_earlier_version(tmp_path: Path) -> None:
    now = small_plan(tmp_path, SEGPROP)
    known = identities(now)
    assert nearest(by_label(now, "segprop/stage2-seg2"), known, known) is None
    others = {"x": replace(by_label(now, "segprop/stage3-seg3"), versions={"torch": "0"})}
    assert nearest(by_label(now, "segprop/stage2-seg2"), known, others) is None
