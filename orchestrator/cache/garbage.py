"""Find which files of a store nobody needs any more, from a survey of the store, its commits and plans; delete them.

A set of snapshots is needed while a plan that is under way has an unfinished reader of it, or when a run asked to
keep it; decoded data as long as a commit names it, since nothing would decode it again. A plan is under way while it
is unfinished and something of it was written within the limit. Whatever is younger than the limit stays: it may
belong to work whose record is not there yet.

Finished work is waste only where it is said which nodes to keep: then what neither these nor a plan under way have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.base import Storage
from orchestrator.cache.inventory import Pile, Survey
from orchestrator.execution.plan_record import PlanRecord

BOUNDARY = "boundary"


@dataclass(frozen=True)
class CommitFacts:
    """Of a node's commit: the attempt that made it, and the sets its result names. `attempt` is None when the
    record is damaged: then nothing of the node is touched."""

    attempt: str | None
    sets: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Waste:
    """Something to collect: a file or a folder. `kind` is one of `WASTE_KINDS`."""

    kind: str
    path: str
    bytes: int
    age_s: float
    reason: str


def _delete_set(storage: Storage, path: str) -> None:
    SnapshotStore(storage).drop(path.split("/")[1])


def _delete_file(storage: Storage, path: str) -> None:
    storage.delete(path)


def _delete_folder(storage: Storage, path: str) -> None:
    storage.delete_tree(path)


def _delete_node(storage: Storage, path: str) -> None:
    """Delete a node, its commit first: what is left of a deletion that was killed is no commit."""
    storage.delete(f"{path}/commit.json")
    storage.delete_tree(path)


def _delete_probe(storage: Storage, path: str) -> None:
    """Delete what looking whether a store works left behind: a file or a folder."""
    storage.delete_tree(path)
    storage.delete(path)


@dataclass(frozen=True)
class WasteKind:
    """How waste of one kind is deleted. `holds`: other waste lies in its folder, and goes with it."""

    delete: Callable[[Storage, str], None]
    holds: bool = False


WASTE_KINDS: Mapping[str, WasteKind] = {
    "set": WasteKind(_delete_set, holds=True),
    "node": WasteKind(_delete_node, holds=True),
    "attempt": WasteKind(_delete_folder),
    "checkpoint": WasteKind(_delete_folder),
    "quarantine": WasteKind(_delete_folder),
    "shard": WasteKind(_delete_file),
    "probe": WasteKind(_delete_probe),
    "plan": WasteKind(_delete_file),
}


def delete(storage: Storage, waste: Waste) -> None:
    """Delete one piece of waste."""
    WASTE_KINDS[waste.kind].delete(storage, waste.path)


@dataclass(frozen=True)
class StoreFacts:
    """What the decision needs. `kinds`: set -> the kind its key names (empty: unknown); `listed`: shard files that
    records list; ages are by the storage's clock."""

    survey: Survey
    commits: Mapping[str, CommitFacts]
    plans: Mapping[str, PlanRecord]
    kinds: Mapping[str, str]
    listed: frozenset[str]
    now: float


def collect(facts: StoreFacts, older_than_s: float, keep: frozenset[str] | None = None) -> list[Waste]:
    """Return what to delete, in an order in which it can be deleted. `keep`: the nodes that are wanted; None: all."""
    dropped = frozenset[str]() if keep is None else _unwanted(facts, older_than_s, keep)
    nodes = [
        _waste(facts, "node", f"nodes/{node}", facts.survey.nodes[node].all, "no kept run has it")
        for node in sorted(dropped)
    ]
    facts = replace(facts, commits={node: commit for node, commit in facts.commits.items() if node not in dropped})
    found = [
        *nodes,
        *_sets(facts, older_than_s),
        *_shards(facts),
        *_nodes(facts, older_than_s),
        *_rest(facts, older_than_s),
    ]
    old = [waste for waste in found if waste.age_s >= older_than_s]
    whole = {waste.path for waste in old if WASTE_KINDS[waste.kind].holds}
    return [waste for waste in old if waste.path in whole or "/".join(waste.path.split("/")[:2]) not in whole]


def _unwanted(facts: StoreFacts, older_than_s: float, keep: frozenset[str]) -> frozenset[str]:
    """Return the nodes that are neither to be kept nor of a plan under way, and older than the limit. A node whose
    commit is damaged stays: `segprop cache verify` decides about it."""
    busy = {node for path, plan in facts.plans.items() if under_way(facts, path, older_than_s) for node in plan.nodes}
    damaged = {node for node, commit in facts.commits.items() if commit.attempt is None}
    old = {node for node, files in facts.survey.nodes.items() if facts.now - files.all.newest >= older_than_s}
    return frozenset(old - keep - busy - damaged)


def is_finished(plan: PlanRecord, commits: Mapping[str, CommitFacts]) -> bool:
    """Tell whether every target of a plan is committed."""
    return all(target in commits for target in plan.targets)


def under_way(facts: StoreFacts, path: str, older_than_s: float) -> bool:
    """Tell whether a plan is unfinished and was started, or worked on, within the limit."""
    plan = facts.plans[path]
    if is_finished(plan, facts.commits):
        return False
    newest = max(
        [
            facts.survey.plans[path].newest if path in facts.survey.plans else facts.now,
            *(facts.survey.nodes[node].all.newest for node in plan.nodes if node in facts.survey.nodes),
        ]
    )
    return facts.now - newest < older_than_s


def needed_sets(facts: StoreFacts, older_than_s: float) -> frozenset[str]:
    """Return the sets that must stay, whatever their age."""
    needed: set[str] = set()
    for commit in facts.commits.values():
        needed.update(set_id for set_id in commit.sets if facts.kinds.get(set_id) != BOUNDARY)
    for path, plan in facts.plans.items():
        wanted = set(plan.kept)
        if under_way(facts, path, older_than_s):
            for node_id, node in plan.nodes.items():
                if node_id not in facts.commits:
                    wanted.update(node.parents)
        for node_id in wanted & facts.commits.keys():
            needed.update(facts.commits[node_id].sets)
    return frozenset(needed)


def _waste(facts: StoreFacts, kind: str, path: str, pile: Pile, reason: str) -> Waste:
    return Waste(kind, path, pile.bytes, facts.now - pile.newest, reason)


def _sets(facts: StoreFacts, older_than_s: float) -> Iterator[Waste]:
    needed = needed_sets(facts, older_than_s)
    for set_id, files in facts.survey.sets.items():
        if set_id not in needed:
            yield _waste(facts, "set", f"sets/{set_id}", files.all, "no run needs it")


def _shards(facts: StoreFacts) -> Iterator[Waste]:
    for files in facts.survey.sets.values():
        for path, pile in files.shards.items():
            if path not in facts.listed:
                yield _waste(facts, "shard", path, pile, "no record lists it")


def _nodes(facts: StoreFacts, older_than_s: float) -> Iterator[Waste]:
    busy = {
        node
        for path, plan in facts.plans.items()
        if under_way(facts, path, older_than_s)
        for node in plan.nodes
        if node not in facts.commits
    }
    for node_id, files in facts.survey.nodes.items():
        commit = facts.commits.get(node_id)
        if commit is not None and commit.attempt is None:
            continue
        for attempt, pile in files.attempts.items():
            active = Pile()
            active.merge(pile)
            active.newest = max(active.newest, files.checkpoints.get(attempt, Pile()).newest)
            path = f"nodes/{node_id}/attempts/{attempt}"
            if commit is None:
                yield _waste(facts, "attempt", path, active, "it never committed")
            elif attempt != commit.attempt:
                yield _waste(facts, "attempt", path, active, "another attempt committed")
        for attempt, pile in files.checkpoints.items():
            path = f"nodes/{node_id}/checkpoints/{attempt}"
            if commit is not None:
                yield _waste(facts, "checkpoint", path, pile, "its node is committed")
            elif node_id not in busy:
                yield _waste(facts, "checkpoint", path, pile, "no run goes on with it")


def _rest(facts: StoreFacts, older_than_s: float) -> Iterator[Waste]:
    for folder, owners in (("sets", facts.survey.sets), ("nodes", facts.survey.nodes)):
        for owner, files in owners.items():
            if files.quarantine.files:
                yield _waste(facts, "quarantine", f"{folder}/{owner}/quarantine", files.quarantine, "damaged")
    for name, pile in facts.survey.probes.items():
        yield _waste(facts, "probe", name, pile, "left by a process that was killed")
    for path, plan in facts.plans.items():
        if not plan.kept and not under_way(facts, path, older_than_s) and path in facts.survey.plans:
            yield _waste(facts, "plan", path, facts.survey.plans[path], "the run is finished or abandoned")
