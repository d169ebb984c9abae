"""The agenda means what `schedule` means, after every change there can be; and each change is cheap."""

from __future__ import annotations

import time

from graphs import graphs, make_node, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.execution import schedule
from orchestrator.execution.ready_queue import ReadyQueue
from orchestrator.plan.graph import Plan


class Both:
    """An agenda, and the sets from which `schedule` says the same anew."""

    def __init__(self, plan: Plan, committed: set[str], released: set[str]) -> None:
        self.plan = plan
        self.committed, self.released = set(committed), set(released)
        self.running: set[str] = set()
        self.failed: set[str] = set()
        self.agenda = ReadyQueue(plan, committed=committed, released=released)

    def ready(self) -> list[str]:
        known = {"committed": self.committed, "released": self.released}
        found = schedule.ready(self.plan, **known, running=self.running, failed=self.failed)
        return [node.id for node in sorted(found, key=lambda node: node.kind == "evaluate")]

    def check(self) -> None:
        expected = self.ready()
        assert self.agenda.ready() == expected
        assert self.agenda.waiting == len(expected)
        first = self.agenda.take(lambda node_id: True)
        assert (first.id if first else None) == (expected[0] if expected else None)
        # One made anew from what is known, as for another plan in mid-run, says the same.
        known = {"committed": self.committed, "released": self.released, "failed": self.failed}
        again = ReadyQueue(self.plan, running=self.running | {"of another plan"}, **known)
        assert again.ready() == expected
        again.commit("of another plan")
        assert again.releasable() == self.agenda.releasable()
        free = schedule.releasable(self.plan, committed=self.committed, released=self.released, running=self.running)
        assert self.agenda.releasable() == free
        assert self.agenda.releasable() == free, "asking changes nothing"


@settings(max_examples=400, deadline=None)
@given(graphs(), st.data())
def test_it_says_what_schedule_says_whatever_happens(plan: Plan, data: st.DataObject) -> None:
    """Also what no driver does: sets released under their readers, nodes committed by others, failures undone by a
    commit."""
    ids = [node.id for node in plan.nodes]
    sets = [node.id for node in plan.sets]
    committed = data.draw(st.sets(st.sampled_from(ids)))
    released = {node_id for node_id in sets if node_id in committed and data.draw(st.booleans())}
    both = Both(plan, committed, released)
    both.check()
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["start", "stop", "commit", "commit", "fail", "release", "ask"]))
        node_id = data.draw(st.sampled_from(ids))
        match action:
            case "start" if node_id not in both.running:
                both.running.add(node_id)
                both.agenda.start(node_id)
            case "stop" if node_id in both.running:
                both.running.discard(node_id)
                both.agenda.stop(node_id)
            case "commit":
                both.committed.add(node_id)
                both.released.discard(node_id)
                both.agenda.commit(node_id)
            case "fail":
                both.failed.add(node_id)
                both.agenda.fail(node_id)
            case "release" if node_id in sets and node_id in both.committed:
                both.released.add(node_id)
                both.agenda.release(node_id)
            case "ask":
                both.plan = both.plan.asking(tuple(data.draw(st.sets(st.sampled_from(ids)))), ())
                both.agenda.ask(set(both.plan.targets))
            case _:
                continue
        both.check()


@settings(max_examples=200, deadline=None)
@given(graphs(), st.data())
def test_a_run_from_the_agenda_finishes_every_target(plan: Plan, data: st.DataObject) -> None:
    both = Both(plan, set(), set())
    while not schedule.finished(plan, committed=both.committed):
        node = both.agenda.take(lambda node_id: True)
        if node is not None and (not both.running or data.draw(st.booleans())):
            both.running.add(node.id)
            both.agenda.start(node.id)
        else:
            node_id = data.draw(st.sampled_from(sorted(both.running)))
            both.running.discard(node_id)
            both.agenda.stop(node_id)
            both.committed.add(node_id)
            both.released.discard(node_id)
            both.agenda.commit(node_id)
        for node_id in both.agenda.releasable():
            both.released.add(node_id)
            both.agenda.release(node_id)
        both.check()


def test_what_may_not_start_yet_is_passed_over_and_keeps_its_place() -> None:
    plan = make_plan([make_node(name, "train", []) for name in ("b", "a", "c")], ["a", "b", "c"])
    agenda = ReadyQueue(plan, committed=set())
    waiting = {"b"}
    first = agenda.take(lambda node_id: node_id not in waiting)
    assert first is not None
    assert first.id == "a"
    agenda.start("a")
    waiting.clear()
    second = agenda.take(lambda node_id: node_id not in waiting)
    assert second is not None
    assert second.id == "b"


def test_a_step_costs_the_same_in_a_plan_a_hundred_times_as_large() -> None:
    """By counting looks at nodes, not by the clock: a whole run of `schedule.ready` would look at n² of them."""

    def looks(count: int) -> float:
        nodes = [make_node("data", "data", [])]
        for index in range(count):
            nodes.append(make_node(f"s{index}", "materialize", ["data"]))
            nodes.append(make_node(f"t{index}", "train", [f"s{index}"]))
        plan = make_plan(nodes, [f"t{index}" for index in range(count)])
        agenda = ReadyQueue(plan, committed=set())
        seen = 0
        original = agenda._requeue

        def counted(node_id: str) -> None:
            nonlocal seen
            seen += 1
            original(node_id)

        agenda._requeue = counted  # type: ignore[method-assign]
        steps = 0
        while node := agenda.take(lambda node_id: True):
            steps += 1
            agenda.start(node.id)
            agenda.stop(node.id)
            agenda.commit(node.id)
            for node_id in agenda.releasable():
                agenda.release(node_id)
        assert steps == 2 * count + 1
        return seen / steps

    assert looks(2000) < 1.5 * looks(20)


def test_ten_thousand_nodes_are_worked_off_in_seconds() -> None:
    nodes = [make_node(f"n{index}", "train", [f"n{index - 50}"] if index >= 50 else []) for index in range(10_000)]
    agenda = ReadyQueue(make_plan(nodes, [node.id for node in nodes]), committed=set())
    started = time.monotonic()
    done = 0
    while node := agenda.take(lambda node_id: True):
        agenda.start(node.id)
        agenda.stop(node.id)
        agenda.commit(node.id)
        done += 1
    assert done == 10_000
    assert time.monotonic() - started < 10  # a tenth of a second where nothing else runs
