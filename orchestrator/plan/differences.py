"""Compare what nodes' ids are made of: which keys differ, and in which ancestor they do so first. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from orchestrator.plan.identity import Identity

#: Node id -> what it is made of.
Known = Mapping[str, Identity]


@dataclass(frozen=True)
class Absent:
    """Stands for the value of a key that one of two nodes does not have."""


ABSENT: Final = Absent()


@dataclass(frozen=True)
class Difference:
    """One key in which two nodes differ."""

    #: Dotted path in the words of the configuration, `version of <package>`, or `parent <role>`.
    key: str
    #: JSON values, or `ABSENT`.
    here: Any
    there: Any
    #: Label of the ancestor in which they differ; None: in the node itself.
    ancestor: str | None = None


@dataclass(frozen=True)
class Nearest:
    """The finished node that a node differs from in the fewest keys."""

    id: str
    identity: Identity
    #: The first causes first: those in ancestors before those in the node.
    differences: tuple[Difference, ...]


def nearest(node: Identity, planned: Known, finished: Known) -> Nearest | None:
    """Find the finished node of this kind and name with the fewest differing keys, one with the same label before any
    other; None when there is none. Nodes of the plan itself are not what it was before."""
    known = {**finished, **planned}
    found = [
        Nearest(node_id, other, tuple(differences(node, other, known)))
        for node_id, other in finished.items()
        if _alike(node, other) and node_id not in planned
    ]
    return min(found, key=lambda one: (one.identity.label != node.label, len(one.differences), one.id), default=None)


def differences(here: Identity, there: Identity, known: Known) -> list[Difference]:
    """Return every key in which two nodes or their ancestors differ, each pair of values once, where it comes first:
    ancestors before what they lead to. `known`: the ancestors, as far as there is a record of them."""
    found: dict[tuple[str, str, str], Difference] = {}
    seen: set[tuple[str, str]] = set()
    # Each pair twice: first its parents are put before it, then it is compared itself.
    waiting: list[tuple[Identity, Identity, str | None, bool]] = [(here, there, None, False)]
    while waiting:
        ours, theirs, ancestor, parents_done = waiting.pop()
        if parents_done:
            for key, mine, other in _rows(ours, theirs, known):
                if mine != other:
                    found.setdefault((key, repr(mine), repr(other)), Difference(key, mine, other, ancestor))
            continue
        waiting.append((ours, theirs, ancestor, True))
        pairs = [pair for pair in _parents_that_differ(ours, theirs).values() if pair not in seen]
        for pair in reversed(dict.fromkeys(pairs)):
            seen.add(pair)
            parent, other_parent = known.get(pair[0]), known.get(pair[1])
            if parent is not None and other_parent is not None and _alike(parent, other_parent):
                waiting.append((parent, other_parent, parent.label, False))
    return list(found.values())


def _alike(here: Identity, there: Identity) -> bool:
    """Whether two nodes do the same work for their plans, so that their keys can be compared."""
    return (here.kind, here.name) == (there.kind, there.name)


def _parents_that_differ(here: Identity, there: Identity) -> dict[str, tuple[str, str]]:
    """Return role -> the parent here and there, where both have one and it is not the same."""
    return {
        role: (parent, there.parents[role])
        for role, parent in here.parents.items()
        if there.parents.get(role, parent) != parent
    }


def _rows(here: Identity, there: Identity, known: Known) -> Iterator[tuple[str, Any, Any]]:
    """Yield key and both values of everything two nodes are made of, but for parents that are compared themselves."""
    yield "format of tasks", here.format, there.format
    ours, theirs = here.fields(), there.fields()
    for key in dict.fromkeys((*ours, *theirs)):
        yield key, ours.get(key, ABSENT), theirs.get(key, ABSENT)
    shown: set[tuple[str, str]] = set()
    for role, pair in _parents_that_differ(here, there).items():
        parent, other = known.get(pair[0]), known.get(pair[1])
        if pair not in shown and (parent is None or other is None or not _alike(parent, other)):
            shown.add(pair)
            yield f"parent {role}", _label(pair[0], known), _label(pair[1], known)
    for role in dict.fromkeys((*here.parents, *there.parents)):
        if (role in here.parents) != (role in there.parents):
            mine, other_id = here.parents.get(role), there.parents.get(role)
            yield (
                f"parent {role}",
                ABSENT if mine is None else _label(mine, known),
                ABSENT if other_id is None else _label(other_id, known),
            )


def _label(node_id: str, known: Known) -> str:
    found = known.get(node_id)
    return f"node {node_id}, of which nothing is recorded" if found is None else found.label
