"""Sort what lies in a store by the names, lengths and ages of its files. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from cache_store.storage.base import FileInfo

_SHARD = re.compile(r"(\d{6,})\.[^/]+\.arrow")


@dataclass
class Pile:
    """Some files together: their bytes, number, and when the newest was written, by the storage's clock."""

    bytes: int = 0
    files: int = 0
    newest: float = 0.0

    def add(self, info: FileInfo) -> None:
        self.bytes += info.bytes
        self.files += 1
        self.newest = max(self.newest, info.modified)

    def merge(self, other: Pile) -> None:
        self.bytes += other.bytes
        self.files += other.files
        self.newest = max(self.newest, other.newest)


@dataclass
class SetFiles:
    """The files of one set. `records`: shard indices that have one; `shards`: shard file -> its pile."""

    all: Pile = field(default_factory=Pile)
    quarantine: Pile = field(default_factory=Pile)
    records: set[int] = field(default_factory=set)
    shards: dict[str, Pile] = field(default_factory=dict)


@dataclass
class NodeFiles:
    """The files of one plan node; attempts and checkpoints by attempt id."""

    all: Pile = field(default_factory=Pile)
    committed: bool = False
    attempts: dict[str, Pile] = field(default_factory=dict)
    checkpoints: dict[str, Pile] = field(default_factory=dict)
    quarantine: Pile = field(default_factory=Pile)


@dataclass
class Survey:
    """Everything in a store, by what it belongs to. `probes`: what looking whether a store works left behind."""

    sets: dict[str, SetFiles] = field(default_factory=dict)
    nodes: dict[str, NodeFiles] = field(default_factory=dict)
    plans: dict[str, Pile] = field(default_factory=dict)
    probes: dict[str, Pile] = field(default_factory=dict)
    other: Pile = field(default_factory=Pile)


def survey(files: Iterable[FileInfo]) -> Survey:
    """Sort a store's files by what they belong to."""
    found = Survey()
    for info in files:
        match info.path.split("/"):
            case ["sets", owner, *rest] if rest:
                _set_file(found.sets.setdefault(owner, SetFiles()), rest, info)
            case ["nodes", owner, *rest] if rest:
                _node_file(found.nodes.setdefault(owner, NodeFiles()), rest, info)
            case ["plans", _]:
                found.plans.setdefault(info.path, Pile()).add(info)
            case [first, *_] if first.startswith(".probe-"):
                found.probes.setdefault(first, Pile()).add(info)
            case _:
                found.other.add(info)
    return found


def _set_file(files: SetFiles, rest: list[str], info: FileInfo) -> None:
    files.all.add(info)
    match rest:
        case ["commits", name] if name.endswith(".json") and name[:-5].isdecimal():
            files.records.add(int(name[:-5]))
        case ["shards", name] if _SHARD.fullmatch(name):
            files.shards.setdefault(info.path, Pile()).add(info)
        case ["quarantine", *_]:
            files.quarantine.add(info)


def _node_file(files: NodeFiles, rest: list[str], info: FileInfo) -> None:
    files.all.add(info)
    match rest:
        case ["commit.json"]:
            files.committed = True
        case ["attempts", attempt, *_]:
            files.attempts.setdefault(attempt, Pile()).add(info)
        case ["checkpoints", attempt, *_]:
            files.checkpoints.setdefault(attempt, Pile()).add(info)
        case ["quarantine", *_]:
            files.quarantine.add(info)
