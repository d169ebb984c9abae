"""Claim a run directory: it holds one configuration, which may grow and whose meaning never changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from cache_store.errors import ConfigError, StoreError
from cache_store.storage.durable import read_regular, write_atomically
from orchestrator.config import load as configuration
from orchestrator.config.yaml_loader import MAX_BYTES, parse_document
from orchestrator.runs.prepare import Prepared
from orchestrator.units import human_bytes

CONFIG_FILE = "config.yaml"


def check_run_dir(prepared: Prepared) -> None:
    """Look whether the run can use its directory; writes nothing.

    Raises ConfigError when there are no weights to start from, when the directory holds another configuration, or when
    the disk has no room for the snapshots."""
    check_start(prepared)
    _check_held(prepared, _held_text(prepared))


def check_start(prepared: Prepared) -> None:
    """ConfigError when there are no weights to start from or no room for snapshots, whatever the directory holds."""
    _check_weights(prepared)
    check_space(prepared)


def claim_run_dir(prepared: Prepared) -> None:
    """Make the run directory and write the resolved configuration into it.

    Only the driver that holds the run may do so: what a refused command wrote would shut out the one at work. Raises
    ConfigError, leaving everything as it was, when the directory holds another configuration or cannot be written."""
    existing = _held_text(prepared)
    _check_held(prepared, existing)
    text = f"# Resolved from {prepared.source}: every setting, defaults included.\n"
    text += yaml.safe_dump(prepared.config.resolved(), sort_keys=False, width=110)
    if text == existing:
        return
    try:
        write_atomically(prepared.run_dir / CONFIG_FILE, text.encode())
    except StoreError as error:
        raise ConfigError(f"run_dir: {error.message}") from error


def _held_text(prepared: Prepared) -> str | None:
    """Read the configuration that the directory holds; None where there is none."""
    target = prepared.run_dir / CONFIG_FILE
    try:
        return read_regular(target, MAX_BYTES).decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run_dir: {target} cannot be read: {error}") from error


def _check_held(prepared: Prepared, text: str | None) -> None:
    """ConfigError when `text` is a configuration that this one may not follow."""
    if text is None:
        return
    held = parse_document(text, str(prepared.run_dir / CONFIG_FILE))
    conflicts = configuration.compatible(held.data, prepared.config.resolved())
    if held.problems or conflicts:
        listing = "\n".join(f"  {key}" for key in conflicts or [str(problem) for problem in held.problems])
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
