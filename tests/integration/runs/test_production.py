"""Snapshot sets made before a stage, along with it, and by several workers at once: the same bits, each frozen block
run once a sample and view, and nobody depends on anybody."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from running import DEVICE, Lab, RayHome, StopAfter, checksums, final_digests, summary_of, write_config
from several import LostError, ThreadRunner, drive

from cache_store.errors import Interrupted, StorageFull
from cache_store.records import leases
from cache_store.records.leases import Leases
from cache_store.snapshots.store import SnapshotSet
from orchestrator.plan.identity import identity_of
from orchestrator.runs.prepare import prepare
from workers.control import ThreadControl, Update
from workers.specs.data_results import ImageDataResult
from workers.specs.orders import FirstAsked, Production, WorkOrder
from workers.tasks.execute import execute

CHANGES: dict[str, Any] = {
    "data.views": 2,
    "training.precision": "bf16",
    "training.channels_last": True,
    "split.base": 2,
    "evaluation.stages": False,
    # Six shards a view, then three.
    "snapshots": {"group_rows": 16, "shard_bytes": 100_000, "retention": "keep", "shuffle": "window", "window": 2},
}
READER = "segprop/stage2-seg3"
VIEW0 = "segprop/snapshot seg2 train view 0"


def lab_of(folder: Path, production: str, **more: Any) -> Lab:
    return Lab.make(folder, {**CHANGES, **more, "snapshots.production": production})


def forwards(lab: Lab) -> Counter[str]:
    total: Counter[str] = Counter()
    for node in lab.prepared.plan.nodes:
        commit = lab.nodes.commit_of(node.id)
        total += Counter(commit.result.get("forwards", {}) if commit else {})
    return total


def leftovers(lab: Lab) -> list[str]:
    return [path.name for path in Path(lab.store).glob("sets/*/leases/*")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Every set made before its stage, one after the other."""
    lab = lab_of(tmp_path_factory.mktemp("reference"), "before")
    outcome, _ = drive(lab, ThreadRunner(1))
    assert outcome.status == "done"
    return lab


def assert_same(lab: Lab, reference: Lab) -> None:
    assert final_digests(lab.prepared) == final_digests(reference.prepared)
    for node in reference.prepared.plan.sets:
        assert checksums(lab.snapshots(node.label)) == checksums(reference.snapshots(node.label)), node.label
    assert leftovers(lab) == []


@pytest.mark.parametrize(("production", "slots"), [("before", 3), ("overlap", 1), ("overlap", 3)])
def test_production_changes_no_bit_and_runs_each_frozen_block_once_a_sample_and_view(
    reference: Lab, tmp_path: Path, production: str, slots: int
) -> None:
    lab = lab_of(tmp_path, production)
    runner = ThreadRunner(slots)
    outcome, _ = drive(lab, runner)
    assert (outcome.status, outcome.failures) == ("done", {})
    assert_same(lab, reference)
    assert forwards(lab) == forwards(reference) == dict.fromkeys(("seg1", "seg2", "seg3"), 2 * 96 + 48)
    made = [order for order in runner.submitted if order.kind == "materialize"]
    if (production, slots) == ("overlap", 1):
        assert made == [], "one slot: the stages make their own sets"
    elif production == "overlap":
        asked = {order.production.first_asked for order in made}
        first = {FirstAsked(stage, epoch) for stage in ("stage2-seg3", "stage3-seg4") for epoch in (0, 1)}
        assert asked == {*first, None}, "the order of need"
        stages = [order.key for order in runner.submitted if order.kind in ("train", "materialize")]
        assert stages.index(lab.node(READER).id) < stages.index(lab.node(VIEW0).id), "the stage starts first"
    else:
        assert any(order.production.helper for order in made), "free slots help"
    # Whoever commits a node records what it is made of.
    recorded = {node.id: lab.nodes.identity_of(node.id) for node in lab.prepared.plan.nodes}
    assert recorded == {node.id: identity_of(node).to_json() for node in lab.prepared.plan.nodes}
    # The same command again finds nothing to do.
    assert drive(lab, again := ThreadRunner(slots))[0].status == "done"
    assert again.submitted == []


@pytest.mark.parametrize(("slots", "leave"), [(1, {"steps": 7}), (2, {"target": 0.01})])
def test_views_that_a_stage_does_not_reach_are_not_made_nor_left(
    tmp_path: Path, slots: int, leave: dict[str, Any]
) -> None:
    """Seven steps are an epoch of six and one of the next; the target is reached with the first epoch."""
    changes = {
        "data.views": 4,
        "training": {"epochs": 4, "batch_size": 16, "exit": leave},
        "split.base": 3,
        "snapshots": {"group_rows": 8, "shard_bytes": 1},
    }
    plain, lab = lab_of(tmp_path / "before", "before", **changes), lab_of(tmp_path / "overlap", "overlap", **changes)
    drive(plain, ThreadRunner(1))
    outcome, ledger = drive(lab, ThreadRunner(slots))
    assert outcome.status == "done"
    assert final_digests(lab.prepared) == final_digests(plain.prepared)
    assert ledger.partial == {}
    if slots == 1:
        assert forwards(lab)["seg3"] < forwards(plain)["seg3"]
        assert len(lab.commit("segprop/stage2-seg4").result["partial"]) == 1
    for each in (plain, lab):
        data = each.commit("data").read(ImageDataResult)
        sets = {path.name for path in (Path(each.store) / "sets").iterdir()}
        assert sets == {data.train, data.test}, "what was made is released, whole or in part"


def test_a_producer_that_is_lost_again_and_again_is_done_without(reference: Lab, tmp_path: Path) -> None:
    lab = lab_of(tmp_path, "overlap")

    def control(order: WorkOrder) -> ThreadControl:
        return StopAfter(1, LostError) if order.kind == "materialize" else ThreadControl()

    runner = ThreadRunner(2, control)
    outcome, _ = drive(lab, runner, max_attempts=1)
    assert (outcome.status, outcome.failures) == ("done", {})
    assert any(order.kind == "materialize" for order in runner.submitted)
    assert_same(lab, reference)
    assert forwards(lab) == forwards(reference), "what the lost ones made is counted"


def test_a_full_disk_is_a_typed_error_and_a_rerun_completes(
    reference: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = lab_of(tmp_path, "overlap")
    put, written = SnapshotSet.put, [0]

    def full(self: SnapshotSet, i: int, arrays: Any) -> int:
        written[0] += self.spec.key["kind"] == "boundary"
        if written[0] > 5:
            raise StorageFull("no space left")
        return put(self, i, arrays)

    with monkeypatch.context() as patch:
        patch.setattr(SnapshotSet, "put", full)
        outcome, _ = drive(lab, ThreadRunner(2))
    assert outcome.status == "failed"
    assert [type(error) for error in outcome.errors.values()] == [StorageFull]
    assert list(outcome.failures) == [lab.node(READER).id], "the stage says it, its producers only note it"
    assert drive(lab, ThreadRunner(2))[0].status == "done"
    assert_same(lab, reference)


def order_for(lab: Lab, label: str, **production: Any) -> WorkOrder:
    node = lab.node(label)
    nodes = lab.nodes
    commits = {role: nodes.commit_of(parent) for role, parent in node.parents.items()}
    return WorkOrder(
        node_id=node.id,
        kind=node.kind,
        task=node.task,
        parents={role: commit for role, commit in commits.items() if commit is not None},
        store=lab.store,
        device=str(DEVICE),
        threads=1,
        production=Production(**production),
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Only the first stage is done."""
    lab = lab_of(tmp_path_factory.mktemp("base"), "overlap", **{"training.epochs": 1})
    lab.run("segprop/stage1-base")
    return lab


@pytest.mark.parametrize("count", [2, 8, 32])
def test_producers_racing_on_one_set_make_every_shard_once(
    base: Lab, reference: Lab, tmp_path: Path, count: int
) -> None:
    lab = base.linked_copy(tmp_path)
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def work(number: int) -> None:
        try:
            order = order_for(lab, VIEW0, shared=True, helper=number)
            barrier.wait()
            execute(order, ThreadControl())
        except BaseException as error:  # noqa: BLE001  looked at below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    result = lab.commit(VIEW0).result
    assert result["forwards"] == {"seg1": 96, "seg2": 96}
    snapshots = lab.snapshots(VIEW0)
    assert snapshots.missing() == []
    assert len(list((Path(lab.store) / "sets" / result["set"] / "shards").iterdir())) == snapshots.spec.shards
    assert leftovers(lab) == []
    alone = base.linked_copy(tmp_path / "alone")
    execute(order_for(alone, VIEW0), ThreadControl())
    assert checksums(alone.snapshots(VIEW0)) == checksums(snapshots)
    assert alone.commit(VIEW0).result["forwards"] == result["forwards"]


class Listening(ThreadControl):
    """Calls back when the work says what it is doing."""

    def __init__(self, heard: Any) -> None:
        super().__init__()
        self.heard = heard

    def progress(self, update: Update) -> None:
        super().progress(update)
        self.heard(update)


def hold_everything(lab: Lab) -> Leases:
    """Somebody has every shard of view 0 in hand, and does nothing."""
    alone = lab.linked_copy(Path(lab.store).parent / "other")
    execute(order_for(alone, VIEW0), ThreadControl())
    snapshots = alone.snapshots(VIEW0)
    holder = Leases(lab.storage, snapshots.leases)
    for index in range(snapshots.spec.shards):
        assert holder.take(f"{index:06d}")
    return holder


def reading(lab: Lab) -> WorkOrder:
    roles = {role: parent for role, parent in lab.node(READER).parents.items() if role.startswith("snapshot/")}
    return order_for(lab, READER, shared=True, unfinished=roles)


def test_a_stage_waits_for_a_shard_that_somebody_makes_and_makes_it_when_they_are_gone(
    base: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = base.linked_copy(tmp_path)
    hold_everything(lab)
    monkeypatch.setattr(leases.Leases.__init__, "__kwdefaults__", {"lease_s": 2.0, "clock": leases.time.monotonic})
    phases: Counter[str] = Counter()
    control = Listening(lambda update: phases.update([update.phase]))
    result = execute(reading(lab), control).result
    assert phases["waiting for snapshots"] > 0
    assert result["waited_s"] > 1.5
    assert result["partial"] == {}
    assert result["forwards"] == {"seg1": 96 + 48, "seg2": 96 + 48}
    calm = base.linked_copy(tmp_path / "calm")
    expected = execute(reading(calm), ThreadControl()).result
    assert result["parts"] == expected["parts"]
    assert expected["waited_s"] == 0


def test_a_stop_while_waiting_ends_the_wait_and_the_stage_goes_on_later(base: Lab, tmp_path: Path) -> None:
    lab = base.linked_copy(tmp_path)
    holder = hold_everything(lab)
    control = Listening(lambda update: control.stop() if update.phase == "waiting for snapshots" else None)
    with pytest.raises(Interrupted, match="waiting for snapshots"):
        execute(reading(lab), control)
    for name in holder.names():
        holder.release(name)
    result = execute(reading(lab), ThreadControl()).result
    calm = base.linked_copy(tmp_path / "calm")
    assert result["parts"] == execute(reading(calm), ThreadControl()).result["parts"]


@pytest.mark.timeout(600)
def test_on_ray_a_killed_producer_and_a_killed_consumer_change_nothing(
    reference: Lab, tmp_path: Path, ray_home: RayHome
) -> None:
    config = write_config(
        tmp_path,
        {
            **CHANGES,
            "snapshots.production": "overlap",
            "resources": {"runner": "ray", "device": "cpu", "slots": 2, "threads": 1},
        },
    )
    # Whoever writes a third shard is killed by SIGKILL with its lease in hand, and so is whoever trains.
    kills = {point: tmp_path / f"killed-{point.replace(':', '-')}" for point in ("shard.written:3", "stage.step:16")}
    armed = ",".join(f"{point}:{marker}" for point, marker in kills.items())
    output = tmp_path / "output.txt"
    run = ray_home.start(str(config), output=output, SEGPROP_CRASH=armed)
    assert run.wait(timeout=500) == 0, output.read_text()
    assert [point for point, marker in kills.items() if not marker.exists()] == []
    assert final_digests(prepare(config)) == final_digests(reference.prepared)
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "done"
    pids = {work["where"]["pid"] for work in summary["work"] if work["where"]}
    assert len(pids) >= 2
