"""Commands that plan and train: `run`, `sweep`, `plan`, `profile`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.commands.given import (
    ConfigArgument,
    JsonOption,
    OverridesArgument,
    SetOption,
    overrides_of,
    prepared_of,
)

if TYPE_CHECKING:
    from orchestrator.config.devices import Device
    from orchestrator.config.yaml_loader import Document
    from orchestrator.runs.prepare import Prepared


def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; train nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Also from another driver that works on this run; it stops.")
    ] = False,
) -> None:
    """Run everything a configuration asks for, or go on where it stopped.

    Finished work is never done again: run the same command after an interruption, or with more regimes.
    Paths in the configuration are relative to the current directory."""
    from orchestrator.config.load import read_document
    from orchestrator.runs.prepare import foresee_data, prepare_document
    from orchestrator.runs.run_dir import check_run_dir, in_own_dir
    from orchestrator.sweeps.prepare import is_sweep

    document = read_document(config, overrides_of(overrides, settings))
    if is_sweep(document):
        _run_sweep(document, dry_run=dry_run, quiet=quiet, take_over=take_over)
    prepared = prepare_document(document, inspect=foresee_data if dry_run else None)
    if dry_run:
        from orchestrator.runs.dry_run import print_plan

        print_plan(prepared)
        return
    prepared = in_own_dir(document, prepared)
    check_run_dir(prepared)
    from orchestrator.runs import session

    raise typer.Exit(session.execute(prepared, quiet=quiet, take_over=take_over))


def sweep(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the trials and what they share; run nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Also from another driver that works on this sweep; it stops.")
    ] = False,
) -> None:
    """Run a configuration many times with other settings, as its `sweep` section says, or go on where it stopped.

    The trials share one store: what several of them need runs once. `segprop run` does the same with such a file."""
    from orchestrator.config.load import read_document

    _run_sweep(
        read_document(config, overrides_of(overrides, settings)), dry_run=dry_run, quiet=quiet, take_over=take_over
    )


def _run_sweep(document: Document, *, dry_run: bool, quiet: bool, take_over: bool) -> None:
    """Run or print a sweep, and end the command."""
    from orchestrator.sweeps.prepare import check_sweep_dir, prepare_sweep_document

    prepared = prepare_sweep_document(document)
    if dry_run:
        from orchestrator.sweeps.dry_run import print_sweep

        print_sweep(prepared)
        raise typer.Exit
    check_sweep_dir(prepared)
    from orchestrator.sweeps import session

    raise typer.Exit(session.execute(prepared, quiet=quiet, take_over=take_over))


def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="Also say what fits this accelerator and what to change: l4, a10g, rtx4090, a100-80, h100, …"
        ),
    ] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Also trace real steps, of tensors without bytes."),
    ] = False,
) -> None:
    """Print the stages with parameters, memory, snapshot bytes and time; train nothing."""
    from orchestrator.config.load import read_document
    from orchestrator.runs.prepare import foresee_data, prepare_document
    from orchestrator.sweeps.prepare import is_sweep

    document = read_document(config, overrides_of(overrides, settings))
    if is_sweep(document):
        _plan_sweep(document, as_json=as_json)
        return
    from orchestrator.config.devices import device_called

    known = None if device is None else device_called(device)
    prepared = prepare_document(document, inspect=foresee_data, device=known)
    answer(
        prepared,
        known,
        ["segprop", "run", str(config), *overrides_of(overrides, settings)],
        as_json=as_json,
        trace=trace,
    )


def answer(prepared: Prepared, device: Device | None, command: list[str], *, as_json: bool, trace: bool) -> None:
    """Print a plan, and what was asked about it."""
    from orchestrator.runs import fit
    from orchestrator.runs import trace as tracing
    from orchestrator.runs.dry_run import print_plan, print_wide

    fits = None if device is None else fit.fit_of(prepared, device)
    stages = tracing.traced(prepared) if trace else None
    if as_json:
        found: dict[str, object] = {"config": prepared.config.resolved(), "plan": prepared.plan.to_json()}
        if fits is not None:
            found["device"] = fits.to_json()
        if stages is not None:
            found["trace"] = [stage.to_json() for stage in stages]
        print(json.dumps(found, indent=1))
        return
    print_plan(prepared)
    if fits is not None:
        print()
        print_wide(fit.render(fits, shlex.join(command)))
    if stages is not None:
        print()
        print_wide(tracing.render(stages))


def _plan_sweep(document: Document, *, as_json: bool) -> None:
    from orchestrator.sweeps.dry_run import print_sweep
    from orchestrator.sweeps.prepare import prepare_sweep_document

    prepared = prepare_sweep_document(document)
    if not as_json:
        print_sweep(prepared)
        return
    trials = [
        {"name": trial.name, "parameters": trial.parameters, "config": trial.prepared.config.resolved()}
        for trial in prepared.trials
    ]
    print(json.dumps({"trials": trials, "plan": prepared.plan.to_json()}, indent=1))


def profile(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Its name or number, such as stage2-seg2 or 2; the first one by default.", metavar="STAGE"),
    ] = None,
    regime: Annotated[
        str | None, typer.Option(help="The regime it is of; by default the first one that has it.", metavar="REGIME")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to count, behind a few to warm up.", min=1, max=100_000)] = 20,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the trace and the tables; default: profiles/RUN-REGIME-STAGE.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show where the time of a stage's steps goes: on the clock and in processor seconds, by phase and by operator.

    Runs the first steps of one stage in this process, without Ray. Writes trace.json, which https://ui.perfetto.dev
    and chrome://tracing open, profile.txt (the tables) and profile.json. The run directory stays as it is: what its
    store has is used, and initial weights stand in for stages that are not trained yet."""
    from orchestrator import profiling
    from orchestrator.config.load import read_document

    prepared = prepared_of(read_document(config, overrides_of(overrides, settings)), config)
    found = profiling.find_stage(prepared.plan, stage, regime)
    taken, folder = profiling.profile(prepared, found, steps, out)
    if as_json:
        print(json.dumps({"regime": found.regime, **taken.to_json()}, indent=1))
        return
    profiling.show(taken, found.regime)
    print(f"\nwritten to {folder}: {profiling.TRACE} (ui.perfetto.dev), {profiling.TABLES}, {profiling.FIGURES}")
