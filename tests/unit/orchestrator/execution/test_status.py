"""`segprop status`: what the store alone says of a run, at every moment it may be looked at."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_run import TEXT_DATA, TEXT_DATA_LINE, make_commits, make_plan

from cache_store.errors import StorageUnavailable
from cache_store.records.nodes import NodeStore
from cache_store.storage.open import open_storage
from orchestrator.cli import main
from orchestrator.execution.beat import Beat, RunningTask
from orchestrator.execution.run_lease import Claim, Identity, LeaseTiming, RunLease
from orchestrator.execution.run_record import RunRecord, read_pointer, read_run, write_pointer, write_run
from orchestrator.plan.graph import Plan
from orchestrator.status import view
from orchestrator.status.observe import Observer, RunStatus, StageStatus, observe
from workers.control import Update

DIGEST = "d" * 32


class World:
    """A store in which as much of a made-up run is committed as a test wants."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.plan: Plan = make_plan(folder, regimes="[e2e, segprop]", **options)
        self.commits = make_commits(self.plan)
        self.storage = open_storage(str(folder / "store"))
        self.nodes = NodeStore(self.storage)
        record = RunRecord.of("fake", self.plan)
        write_run(self.storage, DIGEST, record)
        self.observer = Observer(self.storage, record, DIGEST)

    def id(self, label: str) -> str:
        (found,) = [node.id for node in self.plan.nodes if node.label == label]
        return found

    def commit(self, *labels: str) -> None:
        for label in labels:
            node_id = self.id(label)
            result = self.commits[node_id].result
            self.nodes.attempt(node_id).commit(result)
            if self.plan.node(node_id).kind == "materialize":
                self.storage.write(f"sets/{result['set']}/set.json", b"{}")

    def lease(self) -> RunLease:
        return RunLease.acquire(self.storage, Claim(DIGEST, "fake", "/runs/fake"), LeaseTiming(beat_s=60))

    def look(self) -> RunStatus:
        return self.observer.look()

    def stage(self, name: str, regime: str = "segprop") -> StageStatus:
        (found,) = [stage for stage in self.look().regimes[regime].stages if stage.name == name]
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_run_that_nobody_started_waits(world: World) -> None:
    status = world.look()
    assert status.state == "waiting"
    assert status.nodes["waiting"] == status.nodes["total"] == len(world.plan.nodes)
    assert {stage.state for regime in status.regimes.values() for stage in regime.stages} == {"waiting"}
    assert status.last_activity_s is None
    assert status.driver is None


def test_what_the_data_came_to_is_shown_once_they_are_prepared(world: World) -> None:
    assert world.look().data is None
    world.commits[world.id("data")].result.update(TEXT_DATA)
    world.commit("data")
    text = io.StringIO()
    view.show(world.look(), text)
    assert f"data: {TEXT_DATA_LINE}\ndata: {TEXT_DATA['warnings'][0]}\n" in text.getvalue()


def test_a_running_stage_shows_its_epochs_rate_time_left_machine_and_attempt(world: World) -> None:
    world.commit("data", "model", "segprop/stage1-base", "segprop/snapshot seg1 train view 0")
    lease = world.lease()
    stage, other = world.id("segprop/stage2-seg2"), world.id("segprop/snapshot seg1 validation")
    update = Update(phase="train", epoch=4, epochs=8, rate=120.0, seconds_left=75.0, loss=0.5)
    lease.report(
        Beat(
            running={
                stage: RunningTask(2, "node-b", time.time() - 30, update),
                other: RunningTask(1, "node-c", time.time(), Update(done=50, total=100)),
            }
        )
    )
    lease._beat("running")
    found = world.stage("stage2-seg2")
    assert (found.state, found.epochs, found.epochs_planned) == ("running", 3, 8)
    assert (found.rate, found.seconds_left, found.loss) == (120.0, 75.0, 0.5)
    assert (found.machine, found.attempts) == ("node-b", 2)
    assert found.seconds == pytest.approx(30, abs=5)
    status = world.look()
    assert status.state == "running"
    assert status.nodes["done"] == 4
    assert status.nodes["running"] == 2
    assert [task.label for task in status.tasks] == ["segprop/snapshot seg1 validation"]
    estimate = {node.label: node.estimate.snapshot_bytes for node in world.plan.nodes}
    finished, half = estimate["segprop/snapshot seg1 train view 0"], estimate["segprop/snapshot seg1 validation"] // 2
    assert status.snapshot_bytes == pytest.approx(finished + half, abs=1)
    assert status.last_activity_s is not None
    assert status.last_activity_s < 30
    lease.release("done")


def test_a_checkpoint_tells_of_a_stage_whose_driver_is_gone(world: World) -> None:
    world.commit("data", "model")
    node_id = world.id("segprop/stage1-base")
    history = [{"epoch": 0, "train_loss": 1.5, "validation_loss": 1.25, "validation_accuracy": 0.5}]
    progress = {"epoch": 1, "step": 3, "history": history, "resumed": 1}
    world.nodes.save_checkpoint(node_id, "a1", files={"f": b"x"}, position=(1, 3), data={"progress": progress})
    lease = world.lease()
    lease.report(Beat(running={node_id: RunningTask(1)}))
    lease._beat("running")
    assert world.stage("stage1-base").state == "running"
    assert world.stage("stage1-base").metrics == {"loss": 1.25, "accuracy": 0.5}
    lease.release("stopped")
    found = world.stage("stage1-base")
    assert (found.state, found.epochs, found.attempts) == ("stopped", 1, 2)
    assert found.metrics == {"loss": 1.25, "accuracy": 0.5}
    assert world.look().state == "stopped"


def test_a_killed_driver_is_told_from_one_at_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Identity.own()
    assert own.born is not None
    monkeypatch.setattr(Identity, "own", classmethod(lambda cls: replace(own, born=own.born + 1)))
    world.lease()
    assert world.look().state == "killed"
    # Of another machine nobody can tell, until it has been silent for long enough.
    monkeypatch.setattr(Identity, "own", classmethod(lambda cls: replace(own, host="node-b")))
    world.lease()
    assert world.look().state == "running"
    assert replace(world.observer, stale_s=-1.0).look().state == "killed"


def test_a_finished_run_has_its_metrics_and_nothing_left_to_do(world: World) -> None:
    world.commit(*(node.label for node in world.plan.nodes))
    status = world.look()
    assert status.state == "done"
    assert status.nodes["waiting"] == 0
    regime = status.regimes["segprop"]
    assert regime.state == "done"
    assert regime.test["accuracy"] > 0.9
    found = world.stage("stage2-seg2")
    result = world.commits[world.id("segprop/stage2-seg2")].result
    best = result["epochs"][result["committed_epoch"]]
    assert found.metrics == {"loss": best["validation_loss"], "accuracy": best["validation_accuracy"]}
    assert found.assembled["accuracy"] > 0.9
    assert found.seconds == result["seconds"]
    assert found.machine == "node-a"
    assert status.last_activity_s is not None


def test_a_released_set_takes_no_bytes(world: World) -> None:
    label = "segprop/snapshot seg1 train view 0"
    world.commit(label)
    assert world.look().snapshot_bytes > 0
    world.storage.delete_tree(f"sets/{world.commits[world.id(label)].result['set']}")
    assert world.look().snapshot_bytes == 0


def test_failures_are_named_with_their_reason_and_attempts(world: World) -> None:
    lease = world.lease()
    node_id = world.id("segprop/stage1-base")
    lease.report(Beat(failed={node_id: "the loss is not finite"}, attempts={node_id: 3}))
    lease.release("failed")
    status = world.look()
    assert status.state == "failed"
    assert status.failures == {"segprop/stage1-base": "the loss is not finite"}
    found = world.stage("stage1-base")
    assert (found.state, found.attempts, found.reason) == ("failed", 3, "the loss is not finite")
    assert status.regimes["segprop"].state == "failed"
    assert status.regimes["e2e"].state == "waiting"
    text = io.StringIO()
    view.show(status, text)
    assert "segprop/stage1-base: failed: the loss is not finite" in text.getvalue()


def test_a_look_reads_each_commit_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.commit("data", "model")
    world.look()
    read: list[str] = []
    original = NodeStore.commit_of
    monkeypatch.setattr(NodeStore, "commit_of", lambda self, node: (read.append(node), original(self, node))[1])
    world.look()
    assert read == []
    world.commit("e2e/e2e")
    world.look()
    assert set(read) == {world.id("e2e/e2e")}


def test_the_table_has_a_row_a_stage_and_no_empty_columns(world: World) -> None:
    world.commit("data", "model", "segprop/stage1-base")
    text = io.StringIO()
    view.show(world.look(), text)
    lines = text.getvalue().splitlines()
    (done,) = [line for line in lines if "stage1-base" in line]
    assert done.split()[1:3] == ["done", "8/8"]
    assert "node-a" in done
    assert not any("left" in line.split() for line in lines)
    assert "…" not in text.getvalue()


def test_watching_says_what_changes_and_ends_with_the_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = world.lease()
    steps = iter([lambda: None, lambda: world.commit("data"), lambda: lease.release("stopped")])
    monkeypatch.setattr(time, "sleep", lambda seconds: next(steps)())
    text = io.StringIO()
    assert view.watch(world.observer, 1.0, text).state == "stopped"
    assert text.getvalue().count("fake: running") == 1
    assert text.getvalue().count("fake: stopped") == 1


def test_while_the_store_is_away_the_last_look_stands_with_the_reason(world: World, tmp_path: Path) -> None:
    observer = world.observer
    before = observer.look()
    store = Path(world.storage.uri)
    store.rename(tmp_path / "elsewhere")
    away = observer.look()
    assert (away.state, away.nodes) == (before.state, before.nodes)
    assert away.away is not None
    assert "resources.store_deadline_s" in away.away
    stream = io.StringIO()
    view.show(away, stream)
    assert "store away: " in stream.getvalue()
    with pytest.raises(StorageUnavailable, match="the store is not there"):
        Observer(world.storage, observer.record, DIGEST).look()
    (tmp_path / "elsewhere").rename(store)
    assert observer.look().away is None


def test_the_record_of_a_run_reads_back_as_it_was(world: World) -> None:
    assert read_run(world.storage, DIGEST) == world.observer.record
    assert read_run(world.storage, "e" * 32) is None
    for damage in (b"{", b'{"format": 2}', b'{"format": 1, "run": "x", "nodes": 3}'):
        world.storage.write(f"runs/{DIGEST}/plan.json", damage)
        assert read_run(world.storage, DIGEST) is None


def run_dir(world: World, folder: Path) -> Path:
    place = folder / "run"
    place.mkdir()
    (place / "config.yaml").write_text(f"run: fake\nstore: {world.storage.uri}\n")
    write_pointer(place, DIGEST)
    return place


def test_a_run_directory_needs_neither_data_nor_model(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = run_dir(world, tmp_path)
    assert read_pointer(place) == DIGEST
    world.commit("data")
    assert main(["status", str(place), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nodes"]["done"] == 1
    assert found["regimes"]["segprop"]["stages"][0]["name"] == "stage1-base"


def test_what_is_no_run_is_bad_input_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["status", str(tmp_path)]) == 2
    assert "it has no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(f"run: fake\nstore: {tmp_path / 'gone'}\n")
    write_pointer(tmp_path, DIGEST)
    assert main(["status", str(tmp_path)]) == 2
    assert "there is no store here" in capsys.readouterr().err


def test_a_look_writes_nothing_into_a_store_that_may_only_be_read(world: World, tmp_path: Path) -> None:
    world.commit("data")
    before = sorted(str(path) for path in (tmp_path / "store").rglob("*"))
    observe(str(run_dir(world, tmp_path))).look()
    assert sorted(str(path) for path in (tmp_path / "store").rglob("*")) == before
