"""What does not travel with `ray job submit --working-dir`, refused before anything starts.

A job's working directory is a copy of the submitting one, unpacked on every machine for itself and thrown away
later: without the files that .gitignore names, and no place for results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.config.schema import Config
from orchestrator.config.values import default_store
from orchestrator.config.yaml_loader import KeyPath
from workers.models.base import Finding
from workers.user_code import PACKAGE

WRITTEN: tuple[KeyPath, ...] = (("run_dir",), ("store",))
READ: tuple[KeyPath, ...] = (
    ("data", "path"),
    ("model", "path"),
    ("model", "weights"),
    ("training", "loss", "path"),
    ("evaluation", "judge", "data"),
)


def problems(config: Config, folder: Path, exists: Callable[[Path], bool] = Path.exists) -> Iterator[Finding]:
    """Paths of `config` that cannot work in `folder`, the current directory; none when it is not a job's copy."""
    if not any(part.startswith(PACKAGE) for part in folder.parts):
        return
    for path in WRITTEN:
        value = _local(config, path)
        # A store below a run directory that is refused needs no second refusal.
        if value is None or (path == ("store",) and value == default_store(config.run_dir)):
            continue
        if _inside(folder / value, folder):
            yield (
                path,
                f"{value}: would lie in this job's copy of the working directory, which no other machine sees and "
                "Ray deletes afterwards; allowed: an absolute path on storage that every machine has, or a URI",
            )
    for path in READ:
        value = _local(config, path)
        if value is not None and _inside(folder / value, folder) and not exists(folder / value):
            yield (
                path,
                f"{value}: did not travel with the job: `ray job submit --working-dir` leaves out what .gitignore "
                "names; put it on storage that every machine has and give its absolute path or URI",
            )


def _local(config: Config, path: KeyPath) -> str | None:
    value: object = config
    for key in path:
        value = getattr(value, str(key), None)
    return value if isinstance(value, str) and "://" not in value else None


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
