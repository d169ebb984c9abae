"""The stage graph of a configuration, as data: nodes, what they are called, and where a regime finds its own.

A node's id is the digest of what determines its outcome, so the same work has the same id in every regime, run
and sweep trial, and a changed setting changes the ids of exactly what depends on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from cache_store.keys import digest_json
from orchestrator.costs.boundary_costs import Prediction
from orchestrator.costs.formulas import Estimate
from orchestrator.costs.snapshot_policy import Decision
from orchestrator.plan.views import ViewsSeen
from workers.specs.task_kinds import TASKS

#: Part of every id. Raise it when the meaning of a task changes: no old commit is then taken for a new one.
FORMAT = 2


@dataclass(frozen=True)
class Node:
    """One piece of work. `parents`: role -> node id, roles as the task's class documents them."""

    id: str
    #: A key of `workers.specs.task_kinds.TASKS`.
    kind: str
    label: str
    #: The regimes that asked for it, in the order of the configuration.
    regimes: tuple[str, ...]
    #: `workers.specs.as_json.to_json` of the task.
    task: dict[str, Any]
    parents: dict[str, str]
    estimate: Estimate
    #: Package -> version, of those that compute it.
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether it is a stage, or a round of one."""
        return TASKS[self.kind].trains

    @property
    def makes_set(self) -> bool:
        """Whether it makes a snapshot set."""
        return TASKS[self.kind].makes_set

    @property
    def scores(self) -> bool:
        """Whether it scores a network, so that only the results wait for it."""
        return TASKS[self.kind].scores

    @property
    def judges(self) -> bool:
        """Whether it asks a network questions."""
        return TASKS[self.kind].judges

    @property
    def late(self) -> bool:
        """Whether it starts when no other score is ready either."""
        return TASKS[self.kind].late

    @property
    def initializes(self) -> bool:
        """Whether it makes the weights that training starts from."""
        return TASKS[self.kind].initializes

    @property
    def prepares(self) -> bool:
        """Whether it puts the data set into the store."""
        return TASKS[self.kind].prepares

    @property
    def shared(self) -> bool:
        """Whether its outcome does not depend on the regime."""
        return TASKS[self.kind].shared

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "kind": self.kind,
            "label": self.label,
            "regimes": list(self.regimes),
            "task": self.task,
            "parents": self.parents,
            "estimate": self.estimate.to_json(),
            "versions": self.versions,
        }


@dataclass(frozen=True)
class RegimePlan:
    """Where one regime's outcome is found in the graph."""

    name: str
    kind: str
    #: Train nodes in order.
    stages: tuple[str, ...]
    #: The node whose commit holds the final weights of each part of the chain.
    weights: dict[str, str]
    #: Train node -> evaluate node of the whole chain after that stage, on validation ({} when switched off).
    assembled: dict[str, str]
    #: Train node -> evaluate node of the chain as far as it was trained, with the head, where the stage's own
    #: validation is not that.
    truncated: dict[str, str]
    #: Train node -> the last decoder layer it trains before the global head, or `head` (language models).
    layers: dict[str, int | Literal["head"]]
    #: Evaluate nodes of the final chain.
    validation: str
    test: str
    #: Train node -> where its input comes from and why.
    decisions: dict[str, Decision]
    #: Train node -> the materialize nodes it reads.
    reads: dict[str, tuple[str, ...]]
    #: Most snapshot bytes alive at one time.
    peak_snapshot_bytes: int
    retention: str
    #: Train node of a stage's last round -> its earlier rounds, in order (wavefront).
    rounds: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    #: Nodes that average the replicas of the head, in order (wavefront).
    averages: tuple[str, ...] = ()
    #: What ends the regime early, by the names of `run_exit`; empty: nothing.
    run_exit: dict[str, float] = dataclasses.field(default_factory=dict)
    #: Stages that train at one time, at most.
    width: int = 1
    #: What every boundary is predicted to cost, in chain order.
    boundaries: tuple[Prediction, ...] = ()
    #: Whether its stages wait for their snapshot sets (`before`) or make what they find missing (`overlap`).
    production: str = "before"
    #: Question of `after_stage.QUESTIONS` beyond `assembled` and `truncated` -> train node -> node that answers it.
    diagnoses: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    #: Which of its kind's variants it is; None where the kind, or the model's family, has none.
    variant: str | None = None
    #: What a user should know of its stages, in sentences.
    notes: tuple[str, ...] = ()
    #: Train node -> the views of every sample that the stage sees; none where samples have no views.
    views: dict[str, ViewsSeen] = dataclasses.field(default_factory=dict)
    #: Benchmark -> train node -> judge node of the whole network after that stage.
    judged: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def work_of(self, stage: str) -> tuple[str, ...]:
        """Return all train nodes of a stage, in order, given the one in `stages`."""
        return (*self.rounds.get(stage, ()), stage)

    def to_json(self) -> dict[str, Any]:
        written = dataclasses.asdict(self)
        for name in ("diagnoses", "variant", "notes", "judged"):
            if not written[name]:
                del written[name]
        return written


#: What a plan finds out once about its nodes and regimes, whatever its targets.
_OF_NODES = ("_by_id", "_position", "_readers", "sets", "kept", "overlapping")


@dataclass(frozen=True)
class Plan:
    """Nodes in topological order, which is also the order of preference."""

    nodes: tuple[Node, ...]
    #: Everything that has to be committed in the end.
    targets: tuple[str, ...]
    regimes: dict[str, RegimePlan]
    #: Split -> evaluate node of the model as it came ({} where it came without weights).
    original: dict[str, str] = dataclasses.field(default_factory=dict)
    #: Measure nodes whose figures were not there when the plan was made: what they decide is provisional.
    unmeasured: tuple[str, ...] = ()
    #: Benchmark -> judge node of the model as it came.
    judged: dict[str, str] = dataclasses.field(default_factory=dict)
    #: What may be asked for later (of a sweep's trials): the sets that it reads stay.
    coming: tuple[str, ...] = ()

    def measuring(self) -> Plan:
        """Return what has to be done before the plan can be made for good: the unmeasured nodes and what they need."""
        needed: set[str] = set()
        waiting = list(self.unmeasured)
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += self.node(node).parents.values()
        return Plan(tuple(self.in_order(needed)), self.unmeasured, {})

    def with_notes(self, notes: Mapping[str, str]) -> Plan:
        """Return the plan with a sentence more for regimes, by their names."""
        regimes = {
            name: dataclasses.replace(regime, notes=(*regime.notes, notes[name])) if name in notes else regime
            for name, regime in self.regimes.items()
        }
        return dataclasses.replace(self, regimes=regimes) if notes else self

    def asking(self, targets: tuple[str, ...], coming: tuple[str, ...]) -> Plan:
        """Return the plan with other targets, at no cost that grows with its nodes."""
        plan = dataclasses.replace(self, targets=targets, coming=coming)
        # What is looked up by nodes and regimes, which are the same ones.
        plan.__dict__.update({name: self.__dict__[name] for name in _OF_NODES if name in self.__dict__})
        return plan

    def node(self, node_id: str) -> Node:
        return self._by_id[node_id]

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._by_id

    def in_order(self, ids: Iterable[str]) -> list[Node]:
        """Return the nodes with these ids, parents before children."""
        return [self.nodes[position] for position in sorted(self._position[node_id] for node_id in ids)]

    def readers(self, node_id: str) -> tuple[str, ...]:
        """Return the nodes that have this node as a parent."""
        return self._readers.get(node_id, ())

    @cached_property
    def sets(self) -> tuple[Node, ...]:
        """All materialize nodes."""
        return tuple(node for node in self.nodes if node.makes_set)

    @cached_property
    def kept(self) -> frozenset[str]:
        """Materialize nodes that some regime wants to keep after their last use."""
        keeping = {name for name, regime in self.regimes.items() if regime.retention == "keep"}
        return frozenset(node.id for node in self.sets if not keeping.isdisjoint(node.regimes))

    @property
    def width(self) -> int:
        """Stages that can train at one time."""
        return sum(regime.width for regime in self.regimes.values())

    @cached_property
    def overlapping(self) -> frozenset[str]:
        """Train nodes that start without waiting for their snapshot sets."""
        overlap = {name for name, regime in self.regimes.items() if regime.production == "overlap"}
        return frozenset(node.id for node in self.nodes if node.trains and not overlap.isdisjoint(node.regimes))

    @cached_property
    def peak_snapshot_bytes(self) -> int:
        """Most snapshot bytes alive at one time when all regimes run side by side."""
        return sum(regime.peak_snapshot_bytes for regime in self.regimes.values())

    @cached_property
    def _by_id(self) -> dict[str, Node]:
        return {node.id: node for node in self.nodes}

    @cached_property
    def _position(self) -> dict[str, int]:
        return {node.id: index for index, node in enumerate(self.nodes)}

    @cached_property
    def _readers(self) -> dict[str, tuple[str, ...]]:
        readers: dict[str, list[str]] = {}
        for node in self.nodes:
            for parent in dict.fromkeys(node.parents.values()):
                readers.setdefault(parent, []).append(node.id)
        return {parent: tuple(children) for parent, children in readers.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "nodes": [node.to_json() for node in self.nodes],
            "targets": list(self.targets),
            "regimes": {name: regime.to_json() for name, regime in self.regimes.items()},
            "original": dict(self.original),
            "unmeasured": list(self.unmeasured),
            **({"judged": dict(self.judged)} if self.judged else {}),
        }


def node_id(
    kind: str, task: Mapping[str, Any], parents: Mapping[str, str], versions: Mapping[str, str] | None = None
) -> str:
    """Return the digest of what determines the outcome: the task without what only says where to look or how often to
    save, the parents, and the versions of the packages that compute."""
    return digest_json([FORMAT, kind, TASKS[kind].identity(task), sorted(parents.items()), dict(versions or {})])
