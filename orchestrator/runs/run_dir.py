"""Claim a run directory: it holds one configuration, which may grow and whose meaning never changes."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
from pathlib import Path

import yaml

from cache_store.errors import ConfigError, StoreError
from cache_store.storage.durable import read_regular, write_atomically
from orchestrator.config import load as configuration
from orchestrator.config.values import default_store
from orchestrator.config.yaml_loader import MAX_BYTES, Document, parse_document
from orchestrator.plan.differences import differences
from orchestrator.plan.graph import Plan
from orchestrator.plan.identity import identity_of
from orchestrator.runs.prepare import Prepared, prepare_document
from orchestrator.runs.recorded import FILE as RECORD_FILE
from orchestrator.runs.recorded import Recorded, read_recorded
from orchestrator.units import human_bytes

CONFIG_FILE = "config.yaml"
#: What a run comes to, in its directory, and the folder where that is kept when something else takes its place.
RESULTS = ("summary.json", "report.html", "model", "stages", "tb", "tb_live", "points.jsonl")
EARLIER = "earlier"
#: Keys of a difference that are named.
MOST_KEYS = 3


def in_own_dir(document: Document, prepared: Prepared) -> Prepared:
    """Return the run in a directory of its own, where its configuration names none and the usual one, `runs/NAME`,
    holds another configuration: the first of `runs/NAME-2`, … that holds this one, or nothing. Says so; writes nothing.

    `document`: what `prepared` was made from. ConfigError as `check_run_dir`, for a directory that cannot be read."""
    usual = prepared.run_dir
    chosen = ("run_dir",) in document.origins or ("run_dir",) in document.lines
    keys, problems = ([], []) if chosen else _conflicts(usual, prepared)
    if problems or not keys:  # a configuration that is damaged may be this run's
        return prepared
    numbered = (usual.with_name(f"{usual.name}-{number}") for number in itertools.count(2))
    own = next(folder for folder in numbered if not any(_conflicts(folder, prepared)))
    named = f"{', '.join(keys[:MOST_KEYS])}{' and more' if len(keys) > MOST_KEYS else ''}"
    print(f"segprop: {usual} holds another configuration (differs in {named}): this run is in {own}", file=sys.stderr)
    values = {"run_dir": str(own)}
    if document.data["store"] == default_store(str(usual)):
        values["store"] = default_store(str(own))
    return prepare_document(configuration.with_values(document, values, "run_dir"))


def _conflicts(run_dir: Path, prepared: Prepared) -> tuple[list[str], list[str]]:
    """Return the keys in which a directory's configuration differs from that of a run that would go on there, and what
    is wrong with it."""
    text = _held_text(run_dir)
    if text is None:
        return [], []
    held = parse_document(text, str(run_dir / CONFIG_FILE))
    conflicts = configuration.compatible(held.data, prepared.config.resolved())
    return conflicts, [str(problem) for problem in held.problems]


def check_run_dir(prepared: Prepared) -> None:
    """Look whether the run can use its directory; writes nothing.

    Raises ConfigError when there are no weights to start from, when the directory holds another configuration, or when
    the disk has no room for the snapshots."""
    check_start(prepared)
    _check_held(prepared)


def check_start(prepared: Prepared) -> None:
    """ConfigError when there are no weights to start from or no room for snapshots, whatever the directory holds."""
    _check_weights(prepared)
    check_space(prepared)


def claim_run_dir(prepared: Prepared) -> None:
    """Make the run directory and write the resolved configuration into it.

    Only the driver that holds the run may do so: what a refused command wrote would shut out the one at work. Raises
    ConfigError, leaving everything as it was, when the directory holds another configuration or cannot be written."""
    existing = _held_text(prepared.run_dir)
    _check_held(prepared)
    _keep_earlier(prepared)
    text = f"# Resolved from {prepared.source}: every setting, defaults included.\n"
    text += yaml.safe_dump(prepared.config.resolved(), sort_keys=False, width=110)
    try:
        if text != existing:
            write_atomically(prepared.run_dir / CONFIG_FILE, text.encode())
        _record(prepared)
    except StoreError as error:
        raise ConfigError(f"run_dir: {error.message}") from error


def _record(prepared: Prepared) -> None:
    """Leave what results are written from. A plan too long for a record goes without: whoever needs it plans again."""
    path = prepared.run_dir / RECORD_FILE
    try:
        data = Recorded.of(prepared).to_bytes()
    except StoreError:
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(OSError):
        if read_regular(path, len(data) + 1) == data:
            return
    write_atomically(path, data)


def _keep_earlier(prepared: Prepared) -> None:
    """Move results aside that came of other data, weights or versions than those that the same configuration means now,
    and say so: what is trained now would take their place."""
    run_dir = prepared.run_dir
    before = read_recorded(run_dir, prepared.config.store)
    if before is None or prepared.plan.unmeasured or not (run_dir / "summary.json").exists():
        return
    now, then = prepared.plan.regimes, before.plan.regimes
    if all(now[name].weights == then[name].weights for name in now.keys() & then.keys()):
        return
    target = run_dir / EARLIER / before.digest[:12]
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            if (run_dir / name).exists() and not (target / name).exists():
                shutil.move(run_dir / name, target / name)
    except OSError as error:
        raise ConfigError(f"run_dir: earlier results cannot be moved to {target}: {error}") from error
    again = sum(node.id not in before.plan for node in prepared.plan.nodes)
    print(
        f"segprop: {_changed(before.plan, prepared.plan)} changed since the results in {run_dir} were written: {again} "
        f"of {len(prepared.plan.nodes)} tasks are others now; the earlier results are kept in {target}",
        file=sys.stderr,
    )


def _changed(before: Plan, now: Plan) -> str:
    """Name what the first task is made of that is not the one it was."""
    earlier = {node.label: node for node in before.nodes}
    for node in now.nodes:
        other = earlier.get(node.label)
        if other is not None and other.id != node.id:
            keys = [found.key for found in differences(identity_of(node), identity_of(other), {})]
            return f"{', '.join(keys[:MOST_KEYS])}{' and more' if len(keys) > MOST_KEYS else ''} of {node.label}"
    return "the plan"


def _held_text(run_dir: Path) -> str | None:
    """Read the configuration that a directory holds; None where there is none."""
    target = run_dir / CONFIG_FILE
    try:
        return read_regular(target, MAX_BYTES).decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run_dir: {target} cannot be read: {error}") from error


def _check_held(prepared: Prepared) -> None:
    """ConfigError when the directory holds a configuration that this one may not follow."""
    conflicts, problems = _conflicts(prepared.run_dir, prepared)
    if conflicts or problems:
        listing = "\n".join(f"  {key}" for key in conflicts or problems)
        raise ConfigError(
            f"run_dir: {prepared.run_dir} holds another configuration; nothing was started. "
            f"It differs in:\n{listing}\n"
            f"Choose another directory with run_dir=...; with store={prepared.config.store} "
            "it still reuses what is unchanged.",
            conflicts=conflicts,
        )


def _check_weights(prepared: Prepared) -> None:
    """A checkpoint's configuration is enough to plan with, not to train."""
    config = prepared.config
    problem = config.family.missing_weights(config.model, prepared.found)
    if problem is not None:
        raise ConfigError(problem)


def check_space(prepared: Prepared) -> None:
    """ConfigError when the disk has no room for the snapshots of the plan."""
    needed = prepared.plan.peak_snapshot_bytes
    store = prepared.config.store.removeprefix("file://")
    if not needed or "://" in store:
        return
    folder = Path(store).absolute()
    # What is there already is part of what is needed.
    held = sum(file.stat().st_size for file in folder.glob("sets/*/shards/*") if file.is_file())
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free + held:
        raise ConfigError(
            f"snapshots need about {human_bytes(needed)} at one time, {folder} has {human_bytes(free)} free; "
            "set snapshots.budget, lower data.views, or choose another store",
            needed=needed,
            free=free,
        )
