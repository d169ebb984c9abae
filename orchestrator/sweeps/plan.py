"""Join the plans of all trials into one, and count what they share. Pure.

A node's id is the digest of what determines its outcome, so what trials have in common needs no looking for: the same
node in two plans is the same work. One driver over the union of the plans runs it once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from orchestrator.plan.graph import Node, Plan, RegimePlan

#: Between a trial's name and a regime's, in the union's names.
SEPARATOR = "/"


def union(plans: Mapping[str, Plan]) -> Plan:
    """Join plans (trial -> plan) in the order of the trials: earlier ones are preferred. Targets are those of all."""
    nodes: dict[str, Node] = {}
    asked: dict[str, dict[str, None]] = {}
    regimes: dict[str, RegimePlan] = {}
    trials: dict[str, list[str]] = {}
    for trial, plan in plans.items():
        for node in plan.nodes:
            nodes.setdefault(node.id, node)
            trials.setdefault(node.id, []).append(trial)
            asked.setdefault(node.id, {}).update(dict.fromkeys(f"{trial}{SEPARATOR}{name}" for name in node.regimes))
        regimes |= {f"{trial}{SEPARATOR}{name}": regime for name, regime in plan.regimes.items()}
    joined = tuple(
        dataclasses.replace(node, label=_label(node, trials[node.id]), regimes=tuple(asked[node.id]))
        for node in nodes.values()
    )
    targets = dict.fromkeys(target for plan in plans.values() for target in plan.targets)
    return Plan(joined, tuple(targets), regimes)


def _label(node: Node, trials: list[str]) -> str:
    if node.shared:
        return node.label
    return f"{trials[0]}{f' (+{len(trials) - 1})' if len(trials) > 1 else ''} {node.label}"


def closure(plan: Plan, targets: Iterable[str]) -> frozenset[str]:
    """Return the targets and all that they need, whatever is done already."""
    found: set[str] = set()
    stack = list(targets)
    while stack:
        node_id = stack.pop()
        if node_id not in found:
            found.add(node_id)
            stack.extend(plan.node(node_id).parents.values())
    return frozenset(found)


def level_targets(plan: Plan, regime: str, stages: int) -> tuple[str, ...]:
    """Return what a trial runs until `stages` stages of `regime` can be judged; its other regimes run with the last."""
    chain = plan.regimes[regime]
    if stages >= len(chain.stages):
        return plan.targets
    done = chain.stages[:stages]
    scored = (figures[stage] for stage in done for figures in (chain.assembled, chain.truncated) if stage in figures)
    return (*done, *scored)


@dataclass(frozen=True)
class Shared:
    """Of one kind of node. `asked`: summed over the trials; `run`: each counted once. Seconds in the same two ways."""

    asked: int = 0
    run: int = 0
    seconds_asked: float = 0.0
    seconds_run: float = 0.0

    @property
    def saved(self) -> int:
        return self.asked - self.run


def sharing(asked: Mapping[str, Collection[Node]], seconds: Callable[[Node], float | None]) -> dict[str, Shared]:
    """Count by kind of node. `asked`: trial -> its nodes; `seconds`: what a node takes (None counts as nothing)."""
    found: dict[str, Shared] = {}
    seen: set[str] = set()
    for nodes in asked.values():
        for node in nodes:
            took = seconds(node) or 0.0
            new = node.id not in seen
            seen.add(node.id)
            old = found.get(node.kind, Shared())
            found[node.kind] = Shared(
                old.asked + 1,
                old.run + new,
                old.seconds_asked + took,
                old.seconds_run + (took if new else 0.0),
            )
    return found


def total(kinds: Iterable[Shared]) -> Shared:
    """Add all kinds together."""
    every = list(kinds)
    return Shared(
        sum(item.asked for item in every),
        sum(item.run for item in every),
        sum(item.seconds_asked for item in every),
        sum(item.seconds_run for item in every),
    )


def seconds_left(
    nodes: Iterable[Node], measured: Mapping[str, float], todo: AbstractSet[str], slots: int
) -> float | None:
    """Predict the time until `todo` is done, corrected by how predictions fared for what is done (`measured`: node ->
    seconds). None before anything is."""
    every = list(nodes)
    expected = sum(node.estimate.seconds for node in every if node.id in measured)
    if expected <= 0:
        return None
    rate = sum(measured[node.id] for node in every if node.id in measured) / expected
    return rate * sum(node.estimate.seconds for node in every if node.id in todo) / max(1, slots)
