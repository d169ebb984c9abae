"""Say what a node's id is made of and why it is not finished already: `segprop why`, and a line of the dry run.

Both compare the plan with what the store's commits record; nothing is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache_store.errors import StoreError, UserError
from cache_store.suggest import did_you_mean
from orchestrator.execution.finished import MOST_READ, Finished, read_finished
from orchestrator.plan.differences import ABSENT, Difference, Nearest, nearest
from orchestrator.plan.graph import Node, Plan
from orchestrator.plan.identity import Identity, identity_of, name_of
from orchestrator.runs.prepare import Prepared

#: Differences in a text, and in a line.
MOST_LINES, MOST_IN_LINE = 40, 3
#: Characters of a value that are shown.
_WIDTH = 72


@dataclass(frozen=True)
class Why:
    """What one node is made of, and what keeps it from being finished."""

    id: str
    identity: Identity
    finished: bool
    #: Role -> label of the parent, and whether it is finished.
    parents: Mapping[str, tuple[str, bool]]
    #: None: it is finished, or nothing in the store can be compared with it.
    nearest: Nearest | None
    store: Finished

    def to_json(self) -> dict[str, Any]:
        """Write it as JSON values. A key that one of two nodes lacks has no `here` or `there`."""
        found = self.nearest
        return {
            "id": self.id,
            **self.identity.to_json(),
            "fields": self.identity.fields(),
            "finished": self.finished,
            "nearest": None
            if found is None
            else {
                "id": found.id,
                "label": found.identity.label,
                "differences": [_difference_json(each) for each in found.differences],
            },
            "unrecorded": self.store.unrecorded,
            "unread": self.store.unread,
        }


def _difference_json(found: Difference) -> dict[str, Any]:
    values = {"here": found.here, "there": found.there}
    return {
        "key": found.key,
        **{side: value for side, value in values.items() if value is not ABSENT},
        "ancestor": found.ancestor,
    }


def look_at(prepared: Prepared, stage: str) -> Why:
    """Look at one node of a run. UserError, with the nearest name, when the plan has none of that name or several.
    StoreError when the store cannot be read."""
    plan = prepared.plan
    node = find_node(plan, stage)
    store = read_finished(prepared.config.store, plan)
    identity = identity_of(node)
    finished = node.id in store.committed
    planned = {each.id: identity_of(each) for each in plan.nodes}
    return Why(
        node.id,
        identity,
        finished,
        {role: (plan.node(parent).label, parent in store.committed) for role, parent in node.parents.items()},
        None if finished else nearest(identity, planned, store.identities),
        store,
    )


def find_node(plan: Plan, name: str) -> Node:
    """Find the node that a user means: by its label (`segprop/stage2-seg2`, with any of its regimes), or by its name
    alone where only one node has it. UserError otherwise."""
    labels = {label: node for node in plan.nodes for label in _labels(node)}
    if name in labels:
        return labels[name]
    named = [node for node in plan.nodes if name_of(node.label) == name]
    if len(named) == 1:
        return named[0]
    if named:
        raise UserError(f"{name}: {len(named)} nodes have this name: {', '.join(node.label for node in named)}")
    stages = ", ".join(node.label for node in plan.nodes if node.trains)
    known = {*labels, *(name_of(label) for label in labels)}
    raise UserError(f"{name}: not a node of this run{did_you_mean(name, known) or f'; its stages: {stages}'}")


def _labels(node: Node) -> Iterator[str]:
    yield node.label
    if "/" in node.label:
        yield from (f"{regime}/{name_of(node.label)}" for regime in node.regimes)


# -- text -----------------------------------------------------------------------------------------------------


def why_text(found: Why) -> str:
    """Write all of it as lines."""
    identity = found.identity
    lines = [f"{identity.label}  {found.id}  {_state(found)}", "made of:"]
    lines += [f"  format of tasks: {identity.format}", f"  kind: {identity.kind}"]
    lines += [f"  {key}: {value_words(value)}" for key, value in identity.fields().items()]
    for role, (label, finished) in found.parents.items():
        lines.append(f"  parent {role}: {label}, {identity.parents[role]}{'' if finished else ', not finished'}")
    lines += _comparison(found)
    return "\n".join(lines)


def _state(found: Why) -> str:
    if found.finished:
        return "is finished"
    return "would run again" if found.nearest is not None else "would run"


def _comparison(found: Why) -> Iterator[str]:
    if found.finished:
        return
    if found.nearest is None:
        yield f"Nothing in {found.store.store} can be compared with it: no finished node of this name is recorded."
    else:
        label = found.nearest.identity.label
        yield f"differs from the nearest finished one, {label}, {found.nearest.id}:"
        shown = found.nearest.differences[:MOST_LINES]
        yield from (f"  {difference_words(each)}" for each in shown)
        if len(found.nearest.differences) > len(shown):
            yield f"  and {len(found.nearest.differences) - len(shown)} more (--json has all)"
    if found.store.unrecorded:
        yield (
            f"{found.store.unrecorded} finished nodes were committed by a version that did not record what they are "
            "made of: they cannot be compared."
        )
    if found.store.unread:
        yield f"{found.store.unread} finished nodes beyond the first {MOST_READ} were not looked at."


def difference_words(found: Difference) -> str:
    """Write a difference: `training.optimizer.lr: 0.001 here, 0.002 in the finished one`."""
    where = "" if found.ancestor is None else f"parent {found.ancestor}: "
    if found.here is ABSENT:
        return f"{where}{found.key}: not here, {value_words(found.there)} in the finished one"
    there = "not" if found.there is ABSENT else value_words(found.there)
    return f"{where}{found.key}: {value_words(found.here)} here, {there} in the finished one"


def value_words(value: Any) -> str:
    """Write a JSON value on one line, not too long."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


# -- the dry run ----------------------------------------------------------------------------------------------


def reuse_line(prepared: Prepared) -> str:
    """Say in one line how much of a plan is finished, and why the first of what was finished before would run again."""
    try:
        store = read_finished(prepared.config.store, prepared.plan)
    except StoreError as error:
        return f"What is finished is not known: {error.message}."
    return reuse_words(prepared.plan, store)


def reuse_words(plan: Plan, store: Finished) -> str:
    """Write that line of what is known. Only a node that was finished under its label would run `again`."""
    done = f"{len(store.committed)} of {len(plan.nodes)} nodes are finished"
    before = {(identity.kind, identity.label) for identity in store.identities.values()}
    again = [node for node in plan.nodes if node.id not in store.committed and (node.kind, node.label) in before]
    if not again:
        return f"{done}."
    planned = {node.id: identity_of(node) for node in plan.nodes}
    first = nearest(planned[again[0].id], planned, store.identities)
    changes = () if first is None else first.differences
    more = f" and {len(again) - 1} more" if len(again) > 1 else ""
    return f"{done}; {again[0].label}{more} would run again: {_changes(changes)}."


def _changes(found: Sequence[Difference]) -> str:
    shown = "; ".join(f"{each.key} {_side(each.there)} → {_side(each.here)}" for each in found[:MOST_IN_LINE])
    return shown + (f"; {len(found) - MOST_IN_LINE} more" if len(found) > MOST_IN_LINE else "")


def _side(value: Any) -> str:
    return "none" if value is ABSENT else value_words(value)
