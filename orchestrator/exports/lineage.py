"""Find what trained a part since the initial weights: a pure function over a plan."""

from __future__ import annotations

from orchestrator.plan.graph import Plan


def trainings(plan: Plan, node: str, part: str) -> list[str]:
    """Return the train nodes that changed a part on its way from the initial weights to `node`, first ones first. Of
    replicas that were averaged, those of all of them."""
    wanted, found = {node}, []
    # A plan lists nodes behind their parents.
    for each in reversed(plan.nodes):
        if each.id not in wanted or each.initializes:
            continue
        if each.trains:
            found.append(each.id)
        roles = {f"weights/{part}"} if each.trains else {role for role in each.parents if role.startswith("replica/")}
        wanted |= {each.parents[role] for role in roles}
    return found[::-1]
