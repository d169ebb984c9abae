"""What to do next, as pure functions of the plan and of what is known to be finished.

The graph is walked from its targets, so a node runs only when something unfinished needs it. A node whose
commit exists counts as finished for ever, with one exception: a snapshot set that was released after its last
reader counts as absent again as soon as an unfinished node reads it.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from orchestrator.plan import Node, Plan

Ids = AbstractSet[str]
NONE: frozenset[str] = frozenset()


def wanted(plan: Plan, *, committed: Ids, released: Ids = NONE) -> frozenset[str]:
    """Ids of nodes that have to run (again) before every target is finished, failed and running ones too.
    `released`: committed materialize nodes whose set is not in the store any more."""
    result: set[str] = set()
    stack = [target for target in plan.targets if target not in committed]
    while stack:
        node_id = stack.pop()
        if node_id in result:
            continue
        result.add(node_id)
        for parent in plan.node(node_id).parents.values():
            # Only readers lead to a materialize node, so reaching a released one means its rows are needed.
            if parent not in result and (parent not in committed or parent in released):
                stack.append(parent)
    return frozenset(result)


def ready(plan: Plan, *, committed: Ids, released: Ids = NONE, running: Ids = NONE, failed: Ids = NONE) -> list[Node]:
    """Wanted nodes whose parents are all there, neither running nor failed, in plan order."""
    todo = wanted(plan, committed=committed, released=released)
    return [
        node
        for node in plan.in_order(todo)
        if node.id not in running
        and node.id not in failed
        and not any(parent in todo for parent in node.parents.values())
    ]


def blocked(plan: Plan, *, committed: Ids, failed: Ids, released: Ids = NONE) -> frozenset[str]:
    """Ids of wanted nodes that cannot run because a node they depend on, directly or not, has failed."""
    todo = wanted(plan, committed=committed, released=released)
    result: set[str] = set()
    for node in plan.in_order(todo):  # parents come first
        if any(parent in result or (parent in todo and parent in failed) for parent in node.parents.values()):
            result.add(node.id)
    return frozenset(result)


def releasable(plan: Plan, *, committed: Ids, released: Ids = NONE, running: Ids = NONE) -> list[str]:
    """Ids of materialize nodes whose set nobody will read any more: every reader (a stage or the next
    roll-forward) is finished or no longer needed. Never one that a regime asked to keep."""
    todo = wanted(plan, committed=committed, released=released)
    busy = todo | running
    return [
        node.id
        for node in plan.sets
        if node.id in committed
        and node.id not in released
        and node.id not in plan.kept
        and node.id not in busy
        and busy.isdisjoint(plan.readers(node.id))
    ]


def finished(plan: Plan, *, committed: Ids) -> bool:
    """Whether every target has its commit."""
    return all(target in committed for target in plan.targets)
