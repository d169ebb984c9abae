"""Free the disk of what finished runs no longer need: `segprop clean`.

By default what no result depends on: work of an earlier state of data or settings, snapshots, attempts that lost,
checkpoints of finished stages. Asked for, the whole store of a run: its results and models stay, and nothing can be
trained further from it. Only stores inside run directories are touched: others may be shared.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache_store.errors import SegpropError, StoreError, UserError
from cache_store.storage.open import existing_storage
from orchestrator.cache.contents import nodes_of_run, store_facts
from orchestrator.cache.garbage import collect, delete
from orchestrator.config.yaml_loader import load_document
from orchestrator.status.listing import CONFIG_FILE, folder_bytes, run_dirs
from orchestrator.status.observe import DONE, RUNNING, observe_recorded
from workers.specs.export_files import EXPORTED


@dataclass(frozen=True)
class Cleaned:
    """What was (or would be) freed of one run. `left`: why nothing was; None where something could be."""

    path: str
    bytes: int = 0
    items: int = 0
    left: str | None = None


def clean(places: Sequence[Path], *, store: bool, dry_run: bool) -> Iterator[Cleaned]:
    """Clean the runs at these places, or in folders that hold runs, and yield what came of each. `store`: remove their
    whole stores. UserError when a place holds no run."""
    for place in places:
        found = list(run_dirs(place)) if place.is_dir() else []
        if not found:
            raise UserError(
                f"{place}: neither a run directory nor a folder with some; allowed: what `segprop status` lists"
            )
        for run_dir in found:
            yield _clean(run_dir, store=store, dry_run=dry_run)


def _clean(run_dir: Path, *, store: bool, dry_run: bool) -> Cleaned:
    try:
        left = _kept_because(run_dir, store=store)
        if left is not None:
            return Cleaned(str(run_dir), left=left)
        return _remove_store(run_dir, dry_run) if store else _remove_waste(run_dir, dry_run)
    except SegpropError as error:
        return Cleaned(str(run_dir), left=error.message)


def _kept_because(run_dir: Path, *, store: bool) -> str | None:
    """Say why a run is left alone; None where it may be cleaned."""
    settings = load_document(run_dir / CONFIG_FILE).data
    if "sweep" in settings:
        return "a sweep, whose trials share its store; see `segprop cache gc`"
    if "store" in settings:
        return f"its store, {settings['store']}, may be other runs' too; see `segprop cache gc STORE --keep RUN`"
    if not (run_dir / "store").is_dir():
        return "it has no store any more"
    observer = observe_recorded(run_dir)
    state = None if observer is None else observer.look().state
    if state == RUNNING:
        return "a driver works on it"
    if state != DONE:
        return "it is not finished: run it to its end, or delete its folder"
    regimes = () if observer is None else observer.record.regimes
    missing = [name for name in regimes if not (run_dir / "model" / name / EXPORTED).is_file()]
    if store and missing:
        return f"{', '.join(missing)}: no model was exported; `segprop export {run_dir}` first"
    return None


def _remove_store(run_dir: Path, dry_run: bool) -> Cleaned:
    place = run_dir / "store"
    size = folder_bytes(place)
    if not dry_run:
        try:
            shutil.rmtree(place)
        except OSError as error:
            raise StoreError(f"{place} cannot be removed: {error}") from error
    return Cleaned(str(run_dir), size, 1)


def _remove_waste(run_dir: Path, dry_run: bool) -> Cleaned:
    storage = existing_storage(str(run_dir / "store"))
    waste = collect(store_facts(storage), 0.0, nodes_of_run(storage, run_dir))
    if not dry_run:
        for item in waste:
            delete(storage, item)
    return Cleaned(str(run_dir), sum(item.bytes for item in waste), len(waste))
