"""What the live page shows of a run, at every moment it may be looked at."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from live_page import DIGEST, PageRun

from cache_store.errors import UserError
from cache_store.records.record_io import dump_record
from orchestrator.execution.beat import Beat, RunningTask
from orchestrator.ui.curves import CurveBook, colours_of, thinned
from orchestrator.ui.folder import Folder
from orchestrator.ui.records import Part, RunView
from orchestrator.ui.run_view import WatchedRun
from orchestrator.ui.tails import Tail
from workers.control import Update


@pytest.fixture
def run(tmp_path: Path) -> PageRun:
    return PageRun(tmp_path / "runs" / "first")


def watch(run: PageRun) -> WatchedRun:
    return WatchedRun(run.run_dir, "first")


def parts(view: RunView, regime: str = "segprop") -> dict[str, Part]:
    (found,) = [each for each in view.regimes if each.name == regime]
    return {part.label: part for part in found.parts}


def test_a_regimes_parts_stand_in_the_order_in_which_they_are_needed(run: PageRun) -> None:
    view = watch(run).look()
    assert list(parts(view)) == [
        *("stage1-base", "snapshots after seg1", "stage2-seg2", "snapshots after seg2"),
        *("stage3-seg3", "snapshots after seg3", "stage4-seg4", "scores"),
    ]
    assert {part.state for part in parts(view).values()} == {"waiting"}
    assert [part.label for part in view.preparation] == ["data", "model"]
    assert not view.stop.possible


def test_what_this_run_made_is_stored_what_it_found_is_reused_and_what_was_deleted_is_released(run: PageRun) -> None:
    sets = [node.label for node in run.plan.nodes if node.makes_set]
    run.commit("data", "model", logged=False)
    run.commit("segprop/stage1-base", *(label for label in sets if "seg1" in label))
    watched = watch(run)
    view = watched.look()
    assert {part.state for part in view.preparation} == {"reused"}
    assert parts(view)["stage1-base"].state == "stored"
    assert parts(view)["snapshots after seg1"].state == "stored"
    for label in sets:
        if "seg1" in label:
            run.storage.delete_tree(f"sets/{run.commits[run.id(label)].result['set']}")
    assert parts(watched.look())["snapshots after seg1"].state == "released"


def test_a_running_stage_tells_how_far_it_is_and_what_it_takes(run: PageRun) -> None:
    run.commit("data", "model")
    lease = run.lease()
    told = Update(epoch=3, epochs=8, step=5, steps=10, loss=0.5, rate=321.0, seconds_left=40.0, device_bytes=7_000_000)
    lease.report(Beat(running={run.id("segprop/stage1-base"): RunningTask(2, "node-a", time.time(), told)}))
    time.sleep(0.2)
    view = watch(run).look()
    stage = parts(view)["stage1-base"]
    assert view.state == "running"
    assert (stage.state, round(stage.share or 0, 4)) == ("running", 0.3125)
    assert "epoch 3/8" in stage.words
    assert dict(stage.facts) | {"rate": "321/s", "left": "40 s", "attempts": "2", "machine": "node-a"} == dict(
        stage.facts
    )
    (memory,) = [each for each in view.memory if (each.regime, each.stage) == ("segprop", "stage1-base")]
    assert memory.device_bytes == 7_000_000
    assert memory.predicted_bytes == run.plan.node(run.id("segprop/stage1-base")).estimate.peak_bytes
    assert view.stop.possible
    lease.release("stopped")
    assert watch(run).look().state == "stopped"


def test_looking_leaves_nothing_in_the_store(run: PageRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.commit_all()
    run.lease().release("done")

    def refuse(*arguments: object) -> None:
        raise AssertionError("the page wrote")

    for name in ("write", "create", "delete", "delete_tree", "move"):
        monkeypatch.setattr(type(run.storage), name, refuse)
    assert watch(run).look().state == "done"


def test_curves_grow_and_the_log_is_read_once(run: PageRun) -> None:
    watched = watch(run)
    run.point("segprop", "stage1-base", 1, train_loss=2.0)
    run.log(message="first")
    assert [curve.figure for curve in watched.look().curves] == ["train/loss"]
    run.point("segprop", "stage1-base", 2, train_loss=1.5, train_accuracy=0.3)
    run.point("segprop", "stage1-base", 3, train_loss=float("nan"))
    run.log(level="warning", message="second")
    view = watched.look()
    assert [(curve.figure, curve.lines[0].points) for curve in view.curves] == [
        ("train/loss", ((1, 2.0), (2, 1.5))),
        ("train/accuracy", ((2, 0.3),)),
    ]
    assert [line.text for line in view.log] == ["first", "second"]
    # Another file in its place is read from its start.
    (run.run_dir / "points.jsonl").unlink()
    run.point("e2e", "e2e", 1, train_loss=9.0)
    (curve,) = watched.look().curves
    assert curve.lines[0].points == ((1, 9.0),)


def test_records_of_another_shape_are_said_and_the_other_runs_are_shown(run: PageRun) -> None:
    other = PageRun(run.run_dir.parent / "other")
    lease = other.lease()
    running = {other.id("data"): {"attempt": 1, "progress": {"total": "many", "done": {}, "epoch": "x"}}}
    beat = {"state": "running", "running": running, "failed": {}, "attempts": {}}
    other.log(stage=["x"], event={"y": 1}, seconds="long", message=10**400)
    lease.report(Beat())
    lease.release("stopped")
    other.storage.write(f"runs/{DIGEST}/beat-000001.json", dump_record(beat, "a beat"))
    listed = {each.path: each for each in Folder(run.run_dir.parent).runs()}
    assert listed["first"].state == "waiting"
    assert listed["other"].state == "unknown"
    assert "its records cannot be read: TypeError" in listed["other"].reason


def test_a_directory_without_a_record_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: x\n")
    with pytest.raises(UserError, match="no record"):
        WatchedRun(tmp_path, "x").look()


def test_a_line_that_is_not_whole_waits_and_what_is_no_object_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    tail = Tail(file)
    assert tail.read() == []
    file.write_bytes(b'{"a": 1}\nnothing\n[2]\n{"b"')
    assert tail.read() == [{"a": 1}]
    with file.open("ab") as more:
        more.write(b": 2}\n")
    assert tail.read() == [{"b": 2}]
    assert Tail(file, most_bytes=12).read() == [{"b": 2}]


def test_thinned_lines_keep_their_ends_and_their_spikes() -> None:
    points = [(step, 1.0) for step in range(5000)]
    points[1234] = (1234, 50.0)
    thin = thinned(points, 100)
    assert len(thin) <= 104
    assert thin[0] == (0, 1.0)
    assert thin[-1] == (4999, 1.0)
    assert (1234, 50.0) in thin


def test_points_of_another_shape_are_passed_over() -> None:
    book = CurveBook()
    huge: dict[str, object] = {"step": 10**400, "figures": {"a": 1}}
    book.add([huge, {"step": 1, "figures": {"a": 10**400, "b": float("inf")}}, {"step": -1, "figures": {"a": 1}}])
    book.add([{}, {"step": 1}, {"step": "1", "figures": {}}, {"step": 1, "figures": {"a": "b"}}, {"token": "x"}])
    assert book.curves({}) == ()


def test_a_regime_has_its_kinds_colour_and_the_next_of_the_kind_a_free_one() -> None:
    assert colours_of({"a": "segprop", "b": "e2e", "c": "segprop"}) == {"a": 2, "b": 0, "c": 1}
    assert set(colours_of({str(index): "e2e" for index in range(9)}).values()) == set(range(6))
