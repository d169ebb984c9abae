"""Whether a run directory may go on with another configuration: growing is allowed, changing is not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from orchestrator.config.yaml_loader import KeyPath, key_text
from workers.specs.memory import arithmetic

#: What may differ between two configurations of one run directory: nothing here changes a result.
_FREE = (
    ("run",),
    ("run_dir",),
    ("resources",),
    ("reuse_versions",),
    ("evaluation",),
    ("tracking",),
    ("data", "download"),
    ("data", "allow_loss"),
    ("training", "checkpoint_every_s"),
    ("snapshots", "shard_bytes"),
    ("snapshots", "production"),
)
#: What may differ, too, unless it decides how many views stages see (`data.views: auto`).
_FREE_OF_VIEWS = tuple(("snapshots", key) for key in ("mode", "costs", "budget", "retention"))
#: Settings that older run directories do not name, and what they meant there.
_LATER = {
    ("snapshots", "encoding"): "plain",
    ("variant",): "mapped",
    ("data", "targets"): "answers",
    ("data", "bad"): "refuse",
}
#: Compared regime by regime, where they are resolved.
_BY_REGIME = ("training", "split", "snapshots", "memory", "regimes")


def compatible(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys in which two resolved configurations conflict: a run directory may grow (more regimes) and move to
    other resources, but what it holds never changes meaning. Empty: go on."""
    data = old.get("data")
    by_views = isinstance(data, Mapping) and data.get("views") == "auto"
    free = _FREE if by_views else (*_FREE, *_FREE_OF_VIEWS)
    conflicts = [
        key_text(path)
        for name in sorted({*old, *new} - set(_BY_REGIME))
        for path in _differences(old.get(name), new.get(name), (name,), free)
    ]
    new_regimes, held = new.get("regimes", {}), old.get("regimes", {})
    if not isinstance(held, Mapping):
        return [*conflicts, "regimes"]
    for name, settings in held.items():
        if name not in new_regimes:
            conflicts.append(f"regimes.{name} (left out)")
            continue
        conflicts += [
            key_text(("regimes", name, *path))
            for path in _differences(_by_result(settings), _by_result(new_regimes[name]), (), free)
        ]
    return conflicts


def _by_result(settings: Any) -> Any:
    """A regime's settings with what `memory` means for results in place of what it says."""
    if not isinstance(settings, Mapping):
        return settings
    changed = dict(settings)
    if isinstance(changed.get("stages"), Mapping):
        changed["stages"] = {name: _by_result(stage) for name, stage in changed["stages"].items()}
    memory = changed.pop("memory", None)
    means = arithmetic(memory) if isinstance(memory, Mapping) else {}
    return {**changed, "memory": means} if means else changed


def _differences(old: Any, new: Any, path: KeyPath, free: Collection[KeyPath]) -> Iterator[KeyPath]:
    if path in free:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            if path[:1] == ("stages",) and len(path) == 2 and key == "checkpoint_every_s":
                continue
            here = (*path, key)
            yield from _differences(old.get(key, _LATER.get(here)), new.get(key, _LATER.get(here)), here, free)
    elif old != new:
        yield path
