"""What commands are given: arguments and options that several of them share, and the runs and files these name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_store.errors import UserError

if TYPE_CHECKING:
    from orchestrator.config.yaml_loader import Document
    from orchestrator.runs.prepare import Prepared
    from orchestrator.runs.recorded import Recorded


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/quickstart.yaml.")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that replace those of the file: training.epochs=3 'regimes=[e2e, segprop]'.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="The same as KEY=VALUE behind CONFIG; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def overrides_of(overrides: Sequence[str] | None, settings: Sequence[str] | None) -> list[str]:
    """Return the settings of the command line: those behind CONFIG, then those of --set."""
    return [*(overrides or ()), *(settings or ())]


def names_in(text: str) -> tuple[str, ...]:
    """Split names at commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def document_of(run_dir: Path, overrides: Sequence[str] = ()) -> Document:
    """Read the resolved configuration that a run directory holds."""
    from orchestrator.config.load import read_document
    from orchestrator.runs.run_dir import CONFIG_FILE

    source = run_dir / CONFIG_FILE
    if not source.is_file():
        raise UserError(f"{run_dir}: not a run directory, it has no {CONFIG_FILE}")
    return read_document(source, [f"run_dir={json.dumps(str(run_dir))}", *overrides])


def recorded_of(run_dir: Path) -> Recorded:
    """Read what the results of a run are written from; of a directory without a record of it, plan again."""
    from orchestrator.runs.recorded import Recorded, read_recorded
    from orchestrator.sweeps.prepare import is_sweep

    document = document_of(run_dir)
    found = None if is_sweep(document) else read_recorded(run_dir, str(document.data["store"]))
    return found or Recorded.of(prepared_of(document, run_dir))


def prepared_of(document: Document, place: Path) -> Prepared:
    """Prepare a run that is no sweep. `place`: where its trials are."""
    from orchestrator.runs.prepare import prepare_document
    from orchestrator.sweeps.prepare import is_sweep

    if is_sweep(document):
        raise UserError(f"{place}: a sweep; name one of its trials, such as {place / 'trials' / '...'}")
    return prepare_document(document)
