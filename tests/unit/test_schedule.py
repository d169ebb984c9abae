"""Which node runs next, which set may go: over random graphs, completion orders, failures and kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from planning import small_plan

from orchestrator import schedule
from orchestrator.estimate import Estimate
from orchestrator.plan import Node, Plan, RegimePlan


def make_node(name: str, kind: Any, parents: list[str], regimes: tuple[str, ...] = ("r",)) -> Node:
    roles = {f"parent/{index}": parent for index, parent in enumerate(parents)}
    return Node(name, kind, name, regimes, {}, roles, Estimate())


def make_plan(nodes: list[Node], targets: list[str], retention: str = "release") -> Plan:
    regime = RegimePlan("r", "segprop", (), {}, {}, {}, {}, "", "", {}, {}, 0, retention)
    return Plan(tuple(nodes), tuple(targets), {"r": regime})


@st.composite
def graphs(draw: st.DrawFn) -> Plan:
    """Any DAG in which sets are read by later nodes; targets are never sets."""
    count = draw(st.integers(2, 14))
    nodes: list[Node] = []
    for index in range(count):
        kind = draw(st.sampled_from(["train", "materialize", "materialize", "evaluate"]))
        earlier = [node.id for node in nodes]
        parents = draw(st.lists(st.sampled_from(earlier), unique=True, max_size=4)) if earlier else []
        nodes.append(make_node(f"n{index}", kind, sorted(parents), ("r",)))
    possible = [node.id for node in nodes if node.kind != "materialize"]
    if not possible:
        nodes.append(make_node("last", "train", [node.id for node in nodes[-2:]]))
        possible = ["last"]
    targets = draw(st.lists(st.sampled_from(possible), unique=True, min_size=1))
    return make_plan(nodes, targets, draw(st.sampled_from(["release", "release", "keep"])))


class World:
    """What a store and a driver would do: sets exist or not, running nodes read their parents' sets."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.committed: set[str] = set()
        self.released: set[str] = set()
        self.running: set[str] = set()
        self.runs: list[str] = []

    def known(self) -> dict[str, Any]:
        return {"committed": self.committed, "released": self.released}

    def start(self, node: Node) -> None:
        assert node.id not in self.running
        useful = node.id in self.committed and node.id not in self.released
        assert not useful, f"{node.id} is finished and runs again"
        for parent in node.parents.values():
            assert parent in self.committed, f"{node.id} runs before {parent}"
            assert parent not in self.released, f"{node.id} reads the released {parent}"
        self.running.add(node.id)
        self.runs.append(node.id)

    def finish(self, node_id: str) -> None:
        for parent in self.plan.node(node_id).parents.values():
            assert parent not in self.released, f"{parent} was released under {node_id}"
        self.running.discard(node_id)
        self.committed.add(node_id)
        self.released.discard(node_id)

    def release(self, node_id: str) -> None:
        node = self.plan.node(node_id)
        assert node.kind == "materialize"
        assert node_id not in self.plan.kept
        for reader in self.plan.readers(node_id):
            assert reader not in self.running
        self.released.add(node_id)

    def kill(self) -> None:
        """The driver and its workers are gone; what was committed and released stays."""
        self.running.clear()


def drive(world: World, data: st.DataObject, kills: int = 0) -> None:
    """Any interleaving of starting, finishing, releasing and being killed, until nothing is left to do."""
    for _ in range(2000):
        ready = schedule.ready(world.plan, **world.known(), running=world.running)
        free = schedule.releasable(world.plan, **world.known(), running=world.running)
        actions = ["start"] * bool(ready) + ["finish"] * bool(world.running) + ["release"] * bool(free)
        if kills and world.running:
            actions.append("kill")
        if not actions:
            return
        match data.draw(st.sampled_from(actions)):
            case "start":
                world.start(data.draw(st.sampled_from(ready)))
            case "finish":
                world.finish(data.draw(st.sampled_from(sorted(world.running))))
            case "release":
                world.release(data.draw(st.sampled_from(free)))
            case "kill":
                kills -= 1
                world.kill()
    raise AssertionError("does not come to an end")


@settings(max_examples=200, deadline=None)
@given(graphs(), st.data())
def test_any_order_finishes_every_target_and_runs_each_node_once(plan: Plan, data: st.DataObject) -> None:
    world = World(plan)
    needed = schedule.wanted(plan, **world.known())
    drive(world, data)
    assert schedule.finished(plan, committed=world.committed)
    assert set(world.runs) == needed
    assert len(world.runs) == len(needed)  # a release never costs a second run
    assert schedule.releasable(plan, **world.known()) == []
    kept = {node.id for node in plan.sets if node.id in needed} - world.released
    assert kept == {node.id for node in plan.sets if node.id in needed and node.id in plan.kept}


@settings(max_examples=200, deadline=None)
@given(graphs(), st.data())
def test_killed_at_any_moment_it_goes_on_without_repeating_what_is_committed(plan: Plan, data: st.DataObject) -> None:
    world = World(plan)
    drive(world, data, kills=3)
    assert schedule.finished(plan, committed=world.committed)
    runs = len(world.runs)
    drive(world, data)
    assert len(world.runs) == runs


@settings(max_examples=200, deadline=None)
@given(graphs(), st.data())
def test_sets_lost_at_any_moment_are_made_again_where_still_needed(plan: Plan, data: st.DataObject) -> None:
    """A disk is cleared, or commits of readers are gone: everything a wanted node reads comes back first."""
    world = World(plan)
    drive(world, data)
    for node in plan.nodes:
        if data.draw(st.booleans()):
            world.committed.discard(node.id)
            world.released.discard(node.id)
    drive(world, data)
    assert schedule.finished(plan, committed=world.committed)


@settings(max_examples=200, deadline=None)
@given(graphs(), st.data())
def test_failures_block_exactly_what_depends_on_them(plan: Plan, data: st.DataObject) -> None:
    world = World(plan)
    failed = data.draw(st.sets(st.sampled_from([node.id for node in plan.nodes]), max_size=3))
    while ready := schedule.ready(plan, **world.known(), running=world.running, failed=failed):
        node = data.draw(st.sampled_from(ready))
        world.start(node)
        world.finish(node.id)
        for node_id in schedule.releasable(plan, **world.known()):
            world.release(node_id)
    left = schedule.wanted(plan, **world.known())
    blocked = schedule.blocked(plan, **world.known(), failed=failed)
    assert left == blocked | (left & failed)
    for node_id in left - blocked:
        assert node_id in failed
    # What a failed or blocked node reads is still there for the next attempt.
    for node_id in left:
        for parent in plan.node(node_id).parents.values():
            assert parent not in world.released or parent in left


def test_ready_follows_the_order_of_the_plan() -> None:
    nodes = [make_node(name, "train", []) for name in ("b", "a", "c")]
    plan = make_plan(nodes, ["c", "a", "b"])
    assert [node.id for node in schedule.ready(plan, committed=set())] == ["b", "a", "c"]
    assert [node.id for node in schedule.ready(plan, committed={"b"}, running={"a"})] == ["c"]


def test_only_what_a_target_needs_is_run() -> None:
    nodes = [make_node("a", "train", []), make_node("b", "train", ["a"]), make_node("c", "train", [])]
    plan = make_plan(nodes, ["b"])
    assert schedule.wanted(plan, committed=set()) == {"a", "b"}
    assert schedule.wanted(plan, committed={"b"}) == set()


def test_a_released_set_is_made_again_from_the_released_set_before_it() -> None:
    nodes = [
        make_node("one", "materialize", []),
        make_node("two", "materialize", ["one"]),
        make_node("stage", "train", ["two"]),
        make_node("other", "train", ["one"]),
    ]
    plan = make_plan(nodes, ["stage", "other"])
    sets = {"one", "two"}
    assert schedule.wanted(plan, committed=sets | {"other"}, released=sets) == {"one", "two", "stage"}
    assert schedule.wanted(plan, committed=sets | {"stage"}, released=sets) == {"one", "other"}
    assert schedule.wanted(plan, committed=sets | {"stage", "other"}, released=sets) == set()
    # While it waits for its new reader, the set that exists is not released under it.
    assert schedule.releasable(plan, committed=sets | {"other"}, released={"two"}) == []


def test_a_real_plan_releases_each_boundary_when_the_next_is_made_and_its_stage_is_done(
    tmp_path: Path,
) -> None:
    plan = small_plan(tmp_path, {"regimes": ["segprop"], "data.views": 1})
    committed: set[str] = set()
    released: set[str] = set()
    story: list[str] = []
    while ready := schedule.ready(plan, committed=committed, released=released):
        node = ready[0]
        committed.add(node.id)
        story.append(node.label.removeprefix("segprop/"))
        for node_id in schedule.releasable(plan, committed=committed, released=released):
            released.add(node_id)
            story.append("release " + plan.node(node_id).label.removeprefix("segprop/snapshot "))
    assert [step for step in story if not step.startswith(("assembled", "data", "model", "final"))] == [
        "stage1-base",
        "snapshot seg1 train view 0",
        "snapshot seg1 validation",
        "stage2-seg2",
        "snapshot seg2 train view 0",
        "release seg1 train view 0",
        "snapshot seg2 validation",
        "release seg1 validation",
        "stage3-seg3",
        "snapshot seg3 train view 0",
        "release seg2 train view 0",
        "snapshot seg3 validation",
        "release seg2 validation",
        "stage4-seg4",
        "release seg3 train view 0",
        "release seg3 validation",
    ]


def test_sets_of_a_regime_that_keeps_them_stay(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, {"snapshots.retention": "keep"})
    everything = {node.id for node in plan.nodes}
    assert schedule.releasable(plan, committed=everything) == []
    plan = small_plan(
        tmp_path, {"regimes": {"a": {"kind": "lw"}, "b": {"kind": "lw", "snapshots": {"retention": "keep"}}}}
    )
    assert schedule.releasable(plan, committed=everything | {node.id for node in plan.nodes}) == []
