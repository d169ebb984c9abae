"""Commands that look at runs and tidy up after them: `status`, `ui`, `compare`, `clean`, `why`, `report`."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated

import typer

from cache_store.errors import UserError
from orchestrator.commands.given import (
    JsonOption,
    OverridesArgument,
    SetOption,
    document_of,
    overrides_of,
    prepared_of,
    recorded_of,
)


def status(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Folder of a run, a configuration file, or a folder that holds runs."),
    ] = Path("runs"),
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again until the run has ended.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2)] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """How far a run is, from its store alone: whether a driver is at work or not, from any machine that sees it.

    Of a folder that holds runs, such as runs (the default): each with its state, size and scores.
    With --watch --json one object a line."""
    from orchestrator.status import listing, view
    from orchestrator.status.observe import observe

    if listing.is_listed(run):
        if watch:
            raise UserError(f"--watch: {run} is no run; name one of those in it")
        found_runs = listing.list_runs(run)
        if as_json:
            print(json.dumps([found.to_json() for found in found_runs], indent=1))
        else:
            listing.show_runs(found_runs, run)
        return
    observer = observe(str(run))
    if not as_json:
        if watch:
            view.watch(observer, every)
        else:
            view.show(observer.look())
        return
    while True:
        found = observer.look()
        print(json.dumps(dataclasses.asdict(found), indent=None if watch else 1), flush=True)
        if not watch or found.ended:
            return
        time.sleep(every)


def ui(
    place: Annotated[
        Path, typer.Argument(metavar="[RUN_OR_FOLDER]", help="Folder of a run, or a folder that holds runs.")
    ] = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Address to listen at; any but this machine's own asks visitors for a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 8420,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File that only you may read, with the token in its first line; else one is made."),
    ] = None,
) -> None:
    """Show runs in the browser, live: stages, curves, memory, log; compare runs, filter sweeps, plan, stop.

    Reads what runs leave behind, and loads nothing from the network."""
    from orchestrator.ui.server import Listening, serve

    serve(place, Listening(host, port, token_file))


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of runs, two or more.")],
    same: Annotated[bool, typer.Option("--all", help="Also settings that are the same; * marks the others.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put runs side by side: the settings in which they differ, defaults included, and what each came to."""
    from orchestrator.status import compare as comparing

    found = comparing.compare(runs)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        comparing.show(found, same=same)


def clean(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or folders that hold runs, such as runs.")
    ],
    store: Annotated[
        bool,
        typer.Option("--store", help="Remove the whole store of finished runs; results and models stay."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be freed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before --store.")] = False,
) -> None:
    """Free the disk of what finished runs no longer need.

    That is work of an earlier state of their data, snapshots, attempts that lost, and checkpoints. Runs under way or
    unfinished, and stores outside run directories, are left alone. With --store nothing can be trained further from a
    run, and no report or export be written again; summary.json, report.html and model/ stay."""
    from orchestrator.status.clean import clean as clean_runs
    from orchestrator.units import human_bytes

    if store and not dry_run and not yes:
        typer.confirm(f"Remove the stores of the finished runs in {', '.join(map(str, runs))}?", abort=True)
    total = 0
    for cleaned in clean_runs(runs, store=store, dry_run=dry_run):
        total += cleaned.bytes
        print(
            f"{human_bytes(cleaned.bytes):>9}  {cleaned.path}{f': left alone: {cleaned.left}' if cleaned.left else ''}"
        )
    print(f"{'would free' if dry_run else 'freed'} {human_bytes(total)}")


def why(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or a configuration file.")],
    stage: Annotated[
        str,
        typer.Argument(metavar="STAGE", help="As `segprop status` shows it, such as segprop/stage2-seg2; or data."),
    ],
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What the identity of a stage (or another node) is made of, and for one that will run again, what differs from the
    nearest finished one in the store."""
    from orchestrator.config.load import read_document
    from orchestrator.runs.why import look_at, why_text

    if run.is_file():
        document = read_document(run, overrides_of(overrides, settings))
        place = Path(str(document.data.get("run_dir") or "RUN_DIR"))
    else:
        document, place = document_of(run, overrides_of(overrides, settings)), run
    found = look_at(prepared_of(document, place), stage)
    print(json.dumps(found.to_json(), indent=1) if as_json else why_text(found))


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run, such as runs/quickstart.")],
) -> None:
    """Write summary.json (of a sweep sweep.json) and report.html again, from what the store holds.

    Also while the run is under way. Of a run, neither the data set nor the original model is needed."""
    document = document_of(run_dir)
    from orchestrator.sweeps.prepare import is_sweep

    if is_sweep(document):
        from orchestrator.sweeps import session
        from orchestrator.sweeps.prepare import prepare_sweep_document

        session.report(prepare_sweep_document(document))
        return
    from orchestrator.runs import results

    results.report(recorded_of(run_dir))
