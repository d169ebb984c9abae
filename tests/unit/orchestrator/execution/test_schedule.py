"""Which node runs next, which set may go: over random graphs, completion orders, failures and kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphs import graphs, make_node, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import small_plan

from orchestrator.costs.formulas import Estimate
from orchestrator.execution import schedule
from orchestrator.execution.ready_queue import ReadyQueue
from orchestrator.plan.graph import Node, Plan
from workers.specs.orders import FirstAsked


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


def overlapping_plan(kinds: dict[str, str], parents: dict[str, list[str]], targets: list[str]) -> Plan:
    nodes = [make_node(name, kind, parents.get(name, [])) for name, kind in kinds.items()]
    return make_plan(nodes, targets, production="overlap")


#: Two stages, each with a view, a validation set and another view; sets are rolled forward.
CHAIN = overlapping_plan(
    {
        "t1": "train",
        **dict.fromkeys(("a0", "av", "a1"), "materialize"),
        "t2": "train",
        **dict.fromkeys(("b0", "bv", "b1"), "materialize"),
        "t3": "train",
    },
    {
        "a0": ["t1"],
        "av": ["t1"],
        "a1": ["t1"],
        "t2": ["t1", "a0", "av", "a1"],
        "b0": ["t2", "a0"],
        "bv": ["t2", "av"],
        "b1": ["t2", "a1"],
        "t3": ["t2", "b0", "bv", "b1"],
    },
    ["t3"],
)


def spare(plan: Plan = CHAIN, **known: Any) -> list[str]:
    return schedule.spare(plan, **{"committed": set(), "running": set(), "producers": {}, "free": 1, **known})


def test_an_overlapping_stage_is_ready_without_its_sets_and_sets_are_never_in_the_way() -> None:
    assert schedule.wanted(CHAIN, committed=set()) == {"t1", "t2", "t3"}
    assert [node.id for node in schedule.ready(CHAIN, committed={"t1"})] == ["t2"]
    assert [node.id for node in schedule.ready(CHAIN, committed={"t1", "t2"}, failed={"b0"})] == ["t3"]


def test_spare_slots_make_what_running_stages_will_read_in_the_order_of_need() -> None:
    assert spare(committed={"t1"}, running={"t2"}, free=2) == ["a0", "av"]
    assert spare(committed={"t1"}, running={"t2", "a0"}, producers={"a0": 1}, free=1) == ["av"]
    assert spare(committed={"t1", "a0"}, running={"t2"}, free=4) == ["av", "a1"]
    assert spare(committed={"t1", "a0"}, released={"a0"}, running={"t2"}, free=1) == ["a0"], "made again"
    assert spare(committed={"t1"}, running={"t2"}, failed={"a0", "av"}, free=4) == ["a1"]
    assert spare(committed={"t1"}, running={"t2"}, free=0) == []


def test_what_a_stage_that_has_ended_did_not_read_is_not_made() -> None:
    assert spare(committed={"t1", "a0"}, running=set(), free=4) == []
    assert spare(committed={"t1", "t2", "a0", "av"}, running={"t3"}, free=4) == ["b0", "bv", "b1"]
    never = [node.id for node in CHAIN.nodes if schedule.superfluous(CHAIN, node, committed={"t1", "a0"})]
    assert never == []
    never = [node.id for node in CHAIN.nodes if schedule.superfluous(CHAIN, node, committed={"t1", "t2", "a0"})]
    assert never == ["av", "a1"]


def test_a_set_waits_for_the_one_it_is_rolled_forward_from() -> None:
    known = {"committed": {"t1", "t2", "a0"}, "running": {"t3", "av"}, "producers": {"av": 1}, "free": 4}
    assert spare(**known) == ["b0", "b1", "av", "av"]


def test_more_hands_go_where_the_fewest_are_and_not_where_nothing_is_left() -> None:
    plan = make_plan(CHAIN.nodes, ["t3"])  # type: ignore[arg-type]
    making = {"committed": {"t1"}, "running": {"a0", "av", "a1"}}
    assert spare(plan, **making, producers={"a0": 1, "av": 1, "a1": 1}, free=2) == ["a0", "av"]
    assert spare(plan, **making, producers={"a0": 2, "av": 1, "a1": 1}, free=3) == ["av", "a1", "a0"]
    assert spare(plan, **making, producers={"a0": 1, "av": 1, "a1": 1}, exhausted={"a0", "av"}, free=2) == ["a1"] * 2
    assert spare(plan, committed={"t1"}, running={"t2"}, free=4) == [], "nothing is made ahead before its turn"


def test_a_set_is_not_released_under_a_stage_that_reads_it_or_rolls_it_forward() -> None:
    everything = {"a0", "av", "a1"}
    known = {"committed": {"t1", *everything}, "running": {"t2"}}
    assert schedule.releasable(CHAIN, **known) == []
    # t3 makes b0 and bv from a0 and av, which must stay; b1 is whole.
    known = {"committed": {"t1", "t2", "b1", *everything}, "running": {"t3"}}
    assert schedule.releasable(CHAIN, **known) == ["a1"]
    assert schedule.releasable(CHAIN, committed={"t1", "t2", "t3", *everything}) == ["a0", "av", "a1"]


def test_what_a_stage_left_in_part_is_released_when_nobody_can_use_it_any_more() -> None:
    known = {"committed": {"t1", "t2", "a0", "av"}, "partial": {"a1"}}
    assert schedule.releasable(CHAIN, **known, running={"t3"}) == []
    known["committed"] = {"t1", "t2", "t3", "a0", "av", "b0"}
    assert schedule.releasable(CHAIN, **known) == ["a0", "av", "a1", "b0"]


@settings(max_examples=300, deadline=None)
@given(graphs(overlap=True), st.data())
def test_overlapping_stages_come_to_an_end_whatever_makes_their_sets(plan: Plan, data: st.DataObject) -> None:
    committed: set[str] = set()
    released: set[str] = set()
    running: set[str] = set()
    partial: set[str] = set()
    agenda = ReadyQueue(plan, committed=committed)
    releases = ReadyQueue(plan, committed=committed, overlapping=schedule.NONE)
    for _ in range(500):
        known = {"committed": committed, "released": released, "running": running}
        free = schedule.releasable(plan, **known, partial=partial)
        assert releases.releasable() == free
        assert set(agenda.ready()) == {node.id for node in schedule.ready(plan, **known)}
        for node_id in free:
            assert node_id not in plan.kept
            assert running.isdisjoint(plan.readers(node_id)), "released under a reader"
        ready = [node.id for node in schedule.ready(plan, **known)]
        makers = {node_id: 1 for node_id in running if plan.node(node_id).kind == "materialize"}
        ahead = [
            node_id
            for node_id in schedule.spare(plan, **known, producers=makers, free=data.draw(st.integers(0, 3)))
            if node_id not in running
        ]
        actions = [*(("start", n) for n in ready + ahead), *(("end", n) for n in running), *(("go", n) for n in free)]
        if not actions:
            break
        action, node_id = data.draw(st.sampled_from(sorted(actions)))
        node = plan.node(node_id)
        if action == "start":
            for parent in node.parents.values():
                if node_id not in plan.overlapping or plan.node(parent).kind != "materialize":
                    if node.kind == "materialize" and plan.node(parent).kind == "materialize":
                        continue  # rolled forward from whatever is there
                    assert parent in committed
            running.add(node_id)
            for each in (agenda, releases):
                each.start(node_id)
        elif action == "end":
            running.discard(node_id)
            done, left = [node_id], []
            for parent in node.parents.values() if node_id in plan.overlapping else ():
                if plan.node(parent).kind == "materialize" and parent not in committed and parent not in running:
                    (done if parent not in partial and data.draw(st.booleans()) else left).append(parent)
            committed.update(done)
            released.difference_update(done)
            partial.difference_update(done)
            partial.update(left)
            for each in (agenda, releases):
                each.stop(node_id)
                for name in done:
                    each.commit(name)
                for name in left:
                    each.leave(name)
        else:
            (released.add if node_id in committed else partial.discard)(node_id)
            for each in (agenda, releases):
                each.release(node_id)
    assert schedule.finished(plan, committed=committed)
    assert partial <= plan.kept


def test_a_set_is_made_in_the_order_of_the_stage_and_epoch_that_first_ask_for_it_where_shards_have_one() -> None:
    def plan_with(window: int | None) -> Plan:
        reads = {"a": "v1", "b": "val"}
        stages = [
            Node(name, "train", name, ("r",), {"window": window, "name": name}, reads, Estimate())
            for name in ("stage2-seg2", "final")
        ]
        view = Node("v1", "materialize", "v1", ("r",), {"view": 1}, {}, Estimate())
        validation = Node("val", "materialize", "val", ("r",), {"view": None}, {}, Estimate())
        return make_plan([view, validation, *stages], ["stage2-seg2", "final"])

    def asked(window: int | None) -> list[FirstAsked | None]:
        plan = plan_with(window)
        return [schedule.first_asked(plan, node) for node in plan.nodes]

    assert asked(4) == [FirstAsked("stage2-seg2", 1), None, None, None]
    assert asked(None) == [None] * 4
