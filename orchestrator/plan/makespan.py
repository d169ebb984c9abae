"""Predict how far the nodes of a plan can run side by side: pure arithmetic on their seconds, predicted or measured."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from orchestrator.plan.graph import Node


def work_s(nodes: Sequence[Node], seconds: Mapping[str, float]) -> float:
    """Seconds in one slot: all nodes, one after the other."""
    return sum(seconds[node.id] for node in nodes)


def critical_path_s(nodes: Sequence[Node], seconds: Mapping[str, float]) -> float:
    """Seconds with as many slots as one likes: the longest chain of nodes that wait for each other. `nodes` in
    topological order; parents that are not among them count as done."""
    ends: dict[str, float] = {}
    for node in nodes:
        start = max((ends[parent] for parent in node.parents.values() if parent in ends), default=0.0)
        ends[node.id] = start + seconds[node.id]
    return max(ends.values(), default=0.0)


def makespan_s(nodes: Sequence[Node], seconds: Mapping[str, float], slots: int) -> float:
    """Seconds with `slots` slots, if they are handed out as the driver does: whenever one is free, to the first node in
    the order of the plan that is ready, to evaluations last."""
    order = {node.id: (node.scores + node.late, position) for position, node in enumerate(nodes)}
    waiting = {node.id: sum(parent in order for parent in {*node.parents.values()}) for node in nodes}
    readers: dict[str, list[str]] = {}
    for node in nodes:
        for parent in {*node.parents.values()} & order.keys():
            readers.setdefault(parent, []).append(node.id)
    ready = [(order[node_id], node_id) for node_id, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < slots:
            _, node_id = heapq.heappop(ready)
            heapq.heappush(running, (now + seconds[node_id], node_id))
        now, done = heapq.heappop(running)
        for reader in readers.get(done, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, (order[reader], reader))
    return now
