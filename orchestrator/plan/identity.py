"""What a node's id is made of, as a record that commits hold, so that two nodes can be compared key by key. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.plan.graph import FORMAT, Node
from workers.specs.task_kinds import TASKS

#: Sections of tasks -> what the configuration calls them; longest first.
_WORDS = (("experiment.", ""), ("train.", "training."))


@dataclass(frozen=True)
class Identity:
    """What determines the outcome of a node, and under which label it was planned (which is no part of the id)."""

    kind: str
    label: str
    #: The part of the task that counts, as JSON values.
    task: Mapping[str, Any]
    #: Role -> node id.
    parents: Mapping[str, str]
    #: Package -> version.
    versions: Mapping[str, str]
    #: Of tasks: `orchestrator.plan.graph.FORMAT` when it was planned.
    format: int

    @property
    def name(self) -> str:
        """The label without the regime, as `segprop status` shows it."""
        return name_of(self.label)

    def fields(self) -> dict[str, Any]:
        """Map every leaf of the task, by its dotted path in the words of the configuration where it has them, and
        `version of <package>` to its value. Lists are leaves."""
        found = {_words(key): value for key, value in _leaves(self.task)}
        return found | {f"version of {package}": version for package, version in self.versions.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "kind": self.kind,
            "label": self.label,
            "task": self.task,
            "parents": dict(self.parents),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Identity | None:
        """Inverse of `to_json`; None for what is none (commits from before identities were recorded, damaged ones)."""
        sections = [record.get(key) for key in ("task", "parents", "versions")]
        texts = [record.get(key) for key in ("kind", "label")]
        if (
            not all(isinstance(section, dict) for section in sections)
            or not all(isinstance(text, str) for text in texts)
            or not isinstance(record.get("format"), int)
        ):
            return None
        parents, versions = ({str(key): str(value) for key, value in record[key].items()} for key in _MAPS)
        return cls(record["kind"], record["label"], record["task"], parents, versions, record["format"])


_MAPS = ("parents", "versions")


def identity_of(node: Node) -> Identity:
    """Return what the id of a planned node is made of."""
    task = TASKS[node.kind].identity(node.task)
    return Identity(node.kind, node.label, task, node.parents, node.versions, FORMAT)


def name_of(label: str) -> str:
    """Return a node's label without the regime."""
    return label.rpartition("/")[2]


def _leaves(section: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        path = f"{above}{key}"
        found += _leaves(value, f"{path}.") if isinstance(value, Mapping) and value else [(path, value)]
    return found


def _words(key: str) -> str:
    for prefix, words in _WORDS:
        if key.startswith(prefix):
            return words + key.removeprefix(prefix)
    return key
