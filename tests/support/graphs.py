"""Make plans of any graph, for schedules and queues."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from orchestrator.costs.formulas import Estimate
from orchestrator.plan.graph import Node, Plan, RegimePlan


def make_node(name: str, kind: Any, parents: list[str], regimes: tuple[str, ...] = ("r",)) -> Node:
    roles = {f"parent/{index}": parent for index, parent in enumerate(parents)}
    return Node(name, kind, name, regimes, {}, roles, Estimate())


def make_plan(nodes: list[Node], targets: list[str], retention: str = "release", production: str = "before") -> Plan:
    regime = RegimePlan("r", "segprop", (), {}, {}, {}, {}, "", "", {}, {}, 0, retention, production=production)
    return Plan(tuple(nodes), tuple(targets), {"r": regime})


@st.composite
def graphs(draw: st.DrawFn, overlap: bool = False) -> Plan:
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
    retention = draw(st.sampled_from(["release", "release", "keep"]))
    return make_plan(nodes, targets, retention, draw(st.sampled_from(["before", "overlap"])) if overlap else "before")
