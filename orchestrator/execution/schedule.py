"""Decide what to do next: pure functions of the plan and of what is known to be finished.

The graph is walked from its targets, so a node runs only when something unfinished needs it. A node whose
commit exists counts as finished for ever, with one exception: a snapshot set that was released after its last
reader counts as absent again as soon as an unfinished node reads it.

Stages of `plan.overlapping` do not wait for their snapshot sets: they make what they find missing, so a set is no
reason to wait, and making it beforehand is work for slots that have nothing else to do (`spare`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

from orchestrator.plan.graph import Node, Plan
from workers.specs.orders import FirstAsked

Ids = AbstractSet[str]
NONE: frozenset[str] = frozenset()


def awaited(plan: Plan, node: Node, overlapping: Ids) -> tuple[str, ...]:
    """Return the parents that must be there before a node may run: all but the sets of a stage that makes its own."""
    parents = tuple(dict.fromkeys(node.parents.values()))
    if node.id not in overlapping:
        return parents
    return tuple(parent for parent in parents if not plan.node(parent).makes_set)


def wanted(
    plan: Plan,
    *,
    committed: Ids,
    released: Ids = NONE,
    overlapping: Ids | None = None,
    targets: Iterable[str] | None = None,
) -> frozenset[str]:
    """Return ids of nodes that have to run (again) before every target is finished, failed and running ones too.
    `released`: committed materialize nodes whose set is not in the store any more; `overlapping`: stages that do not
    wait for their sets; `targets`: what is to be finished. Both are those of the plan unless given."""
    overlapping = plan.overlapping if overlapping is None else overlapping
    result: set[str] = set()
    stack = [target for target in (plan.targets if targets is None else targets) if target not in committed]
    while stack:
        node_id = stack.pop()
        if node_id in result:
            continue
        result.add(node_id)
        for parent in awaited(plan, plan.node(node_id), overlapping):
            # Only readers lead to a materialize node, so reaching a released one means its rows are needed.
            if parent not in result and (parent not in committed or parent in released):
                stack.append(parent)
    return frozenset(result)


def ready(plan: Plan, *, committed: Ids, released: Ids = NONE, running: Ids = NONE, failed: Ids = NONE) -> list[Node]:
    """Return wanted nodes whose parents are all there, neither running nor failed, in plan order."""
    todo = wanted(plan, committed=committed, released=released)
    return [
        node
        for node in plan.in_order(todo)
        if node.id not in running
        and node.id not in failed
        and not any(parent in todo for parent in awaited(plan, node, plan.overlapping))
    ]


def blocked(plan: Plan, *, committed: Ids, failed: Ids, released: Ids = NONE) -> frozenset[str]:
    """Return ids of wanted nodes that cannot run because a node they depend on, directly or not, has failed."""
    todo = wanted(plan, committed=committed, released=released)
    result: set[str] = set()
    for node in plan.in_order(todo):  # parents come first
        parents = awaited(plan, node, plan.overlapping)
        if any(parent in result or (parent in todo and parent in failed) for parent in parents):
            result.add(node.id)
    return frozenset(result)


def spare(
    plan: Plan,
    *,
    committed: Ids,
    released: Ids = NONE,
    running: Ids = NONE,
    failed: Ids = NONE,
    producers: Mapping[str, int],
    free: int,
    exhausted: Ids = NONE,
) -> list[str]:
    """Choose what `free` idle slots should make: ids of materialize nodes, one for each slot used.

    First the unfinished sets of running overlapping stages that nobody makes yet, in the order in which the stages
    will ask (their `parents` are in that order); one whose predecessor is being made waits for it. Then more hands for
    sets that are being made: `producers` says how many are at each, `exhausted` where nothing is left to take."""
    chosen: list[str] = []
    if not free:
        return chosen
    for _, node_id in sorted(
        (place, parent)
        for stage in plan.in_order(running & plan.overlapping)
        for place, parent in enumerate(_sets_of(plan, stage))
        if (parent not in committed or parent in released) and parent not in running and parent not in failed
    ):
        node = plan.node(node_id)
        sets = _sets_of(plan, node)
        possible = running.isdisjoint(sets) and all(p in committed or p in sets for p in node.parents.values())
        if possible and node_id not in chosen:
            chosen.append(node_id)
    chosen = chosen[:free]
    hands = {node_id: count for node_id, count in producers.items() if node_id not in exhausted}
    while len(chosen) < free and hands:
        least = min(plan.in_order(hands), key=lambda node: hands[node.id]).id
        hands[least] += 1
        chosen.append(least)
    return chosen


def first_asked(plan: Plan, node: Node) -> FirstAsked | None:
    """Of a set: the stage, and its epoch, that first asks for its shards in an order of that epoch; None where all are
    asked for at once, or in the order of the data set. Of several stages, the first of the plan."""
    view = node.task.get("view")
    if not node.makes_set or view is None:
        return None
    for reader in plan.in_order(plan.readers(node.id)):
        if reader.task.get("window") is not None:
            return FirstAsked(reader.task["name"], int(view))
    return None


def superfluous(plan: Plan, node: Node, *, committed: Ids) -> bool:
    """Tell whether this is a set without a commit that no stage will ask for any more, since all that would have are
    finished."""
    return (
        node.makes_set
        and node.id not in committed
        and all(reader in committed for reader in plan.readers(node.id) if plan.node(reader).trains)
    )


def _sets_of(plan: Plan, node: Node) -> list[str]:
    return [parent for parent in node.parents.values() if plan.node(parent).makes_set]


def releasable(
    plan: Plan, *, committed: Ids, released: Ids = NONE, running: Ids = NONE, partial: Ids = NONE
) -> list[str]:
    """Return ids of materialize nodes whose set nobody will read any more: every reader (a stage or the next
    roll-forward) is finished or no longer needed, and will not be asked for later (`plan.coming`). Never one that a
    regime asked to keep.

    `partial`: materialize nodes without a commit whose sets are in part in the store."""
    # As if every stage waited for its sets: what an unfinished one reads, or rolls forward, is needed.
    targets = (*plan.targets, *plan.coming)
    todo = wanted(plan, committed=committed, released=released, overlapping=NONE, targets=targets)
    busy = todo | running
    return [
        node.id
        for node in plan.sets
        if (node.id in committed or node.id in partial)
        and node.id not in released
        and node.id not in plan.kept
        and node.id not in busy
        and busy.isdisjoint(plan.readers(node.id))
    ]


def finished(plan: Plan, *, committed: Ids) -> bool:
    """Tell whether every target has its commit."""
    return all(target in committed for target in plan.targets)
