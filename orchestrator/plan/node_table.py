"""The nodes of a plan while it is built: a node that two regimes ask for is one node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from orchestrator.costs.formulas import Estimate
from orchestrator.plan.graph import Node, node_id


class NodeTable:
    """Collects nodes in the order in which they are first asked for, which is topological: parents come first."""

    def __init__(self, versions: Mapping[str, Mapping[str, str]] | None = None) -> None:
        """`versions`: kind of node -> versions of what computes it; kinds that are missing have none."""
        self._versions = versions or {}
        self._nodes: dict[str, Node] = {}
        #: Node id -> the regimes that asked for it, in order.
        self._asked: dict[str, dict[str, None]] = {}

    def add(
        self,
        kind: str,
        regime: str,
        label: str,
        task: dict[str, Any],
        parents: dict[str, str],
        predicted: Estimate,
    ) -> str:
        """Note that a regime needs this node; return the node's id. Label and estimate are those of the first."""
        versions = dict(self._versions.get(kind, {}))
        identifier = node_id(kind, task, parents, versions)
        if identifier not in self._nodes:
            self._nodes[identifier] = Node(identifier, kind, label, (regime,), task, parents, predicted, versions)
        self._asked.setdefault(identifier, {})[regime] = None
        return identifier

    def nodes(self) -> tuple[Node, ...]:
        """All nodes, each with every regime that asked for it."""
        return tuple(
            node
            if node.regimes == tuple(self._asked[node.id])
            else dataclasses.replace(node, regimes=tuple(self._asked[node.id]))
            for node in self._nodes.values()
        )
