"""Carry out one invocation: open the store, pick the runner, drive the plan, write what a run leaves behind."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial

from cache_store.crashpoints import reach
from cache_store.errors import ConfigError, SegpropError, StorageDenied, UserError
from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage
from orchestrator.config.schema import Config
from orchestrator.config.yaml_loader import leaves
from orchestrator.costs.formulas import steps_an_epoch, steps_to_run
from orchestrator.execution import schedule
from orchestrator.execution.beat import Beat
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.driver import Driver, DriverSettings, Outcome
from orchestrator.execution.event_log import journal
from orchestrator.execution.plan_record import plan_digest, write_plan
from orchestrator.execution.retry import NodeRetries
from orchestrator.execution.run_lease import Claim, RunLease, check_neighbour
from orchestrator.execution.run_record import RunRecord, read_pointer, write_pointer, write_run
from orchestrator.plan.experiment import rows_of
from orchestrator.plan.graph import Plan
from orchestrator.progress import Progress
from orchestrator.reports.records import Summary
from orchestrator.reports.tables.result_table import print_places, print_table
from orchestrator.runners.base import RunnerRequest
from orchestrator.runners.factory import make_runner
from orchestrator.runners.gang_size import runs_together
from orchestrator.runs.prepare import Prepared, with_figures
from orchestrator.runs.recorded import Recorded
from orchestrator.runs.results import export_finished, write_results
from orchestrator.runs.run_dir import CONFIG_FILE, check_space, claim_run_dir
from orchestrator.runs.signals import stop_on_signals
from orchestrator.trackers.live import LiveTracking, Tracked, TrackedStage
from workers.control import Update
from workers.specs.as_json import from_json
from workers.specs.experiment import TrainSpec

_log = logging.getLogger("segprop.plan")

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2


#: Takes what running nodes told last.
Tell = Callable[[Mapping[str, Update]], None]


def _nobody(updates: Mapping[str, Update]) -> None:
    """Take what running nodes told, for nobody."""


def execute(prepared: Prepared, *, quiet: bool = False, take_over: bool = False) -> int:
    """Run the plan to its end and write the results; returns the exit code (0 done, 1 failed, 2 bad input).

    A run that has nothing left to do starts no worker and no Ray. RunTaken when another driver is at work on it;
    `take_over` stops that one instead.
    """
    storage = open_store(prepared.config.store)
    ledger = CommitLog.read(storage, prepared.plan)
    outcome = Outcome("done", reused=set(ledger.commits))
    planned = prepared.plan
    claim = partial(claim_run_dir, prepared)
    if all(target in ledger.commits for target in planned.targets):
        claim_idle(prepared, storage, planned, claim, take_over)
    if planned.unmeasured:
        # What is measured decides what the plan is; it is then made for good.
        outcome = carry_out(prepared, planned.measuring(), ledger, claim, quiet, take_over)
        if outcome.status == "done":
            prepared = with_figures(prepared)
            claim = partial(claim_run_dir, prepared)
            check_space(prepared)
            ledger = CommitLog.read(storage, prepared.plan)
    with closing(LiveTracking(_tracked(prepared))) as tracking:
        if outcome.status == "done" and any(target not in ledger.commits for target in prepared.plan.targets):
            earlier, measured = outcome.reused, prepared.plan is not planned
            outcome = carry_out(prepared, prepared.plan, ledger, claim, quiet, take_over, tracking.tell)
            if measured:
                outcome.reused &= earlier  # what was measured just now was not there before
        recorded = Recorded.of(prepared)
        exports = export_finished(recorded, ledger, list(prepared.plan.regimes))
        reach("driver.exported")
        summary = write_results(recorded, ledger, outcome, exports)
        tracking.finish(summary)
    print_table(summary)
    print_places(prepared.run_dir, summary)
    return _exit_code(outcome)


def judge(prepared: Prepared, *, quiet: bool = False) -> int:
    """Judge the networks of a run that are there, as its `evaluation.judge` says, and write the results. Trains
    nothing; returns the exit code, as `execute`. UserError when there is none to judge."""
    storage = open_store(prepared.config.store)
    ledger = CommitLog.read(storage, prepared.plan)
    targets = _judgeable(prepared.plan, ledger.commits.keys())
    if not targets:
        raise UserError(
            f"{prepared.run_dir}: has no network yet that evaluation.judge.of asks for; run it first: segprop run"
        )
    plan, claim = dataclasses.replace(prepared.plan, targets=targets), partial(claim_run_dir, prepared)
    outcome = Outcome("done", reused=set(ledger.commits))
    if all(target in ledger.commits for target in targets):
        claim_idle(prepared, storage, plan, claim, take_over=False)
    else:
        outcome = carry_out(prepared, plan, ledger, claim, quiet, take_over=False)
    code = _exit_code(outcome)
    whole = all(target in ledger.commits for target in prepared.plan.targets)
    recorded = Recorded.of(prepared)
    exports = export_finished(recorded, ledger, list(prepared.plan.regimes))
    shown = dataclasses.replace(outcome, status="stopped" if outcome.status == "done" and not whole else outcome.status)
    summary = write_results(recorded, ledger, shown, exports)
    print_table(summary)
    print_places(prepared.run_dir, summary)
    return code


def _judgeable(plan: Plan, committed: Collection[str]) -> tuple[str, ...]:
    """Return the judge nodes whose networks are there; questions, and the score of the stage before, need not be."""
    return tuple(
        node.id
        for node in plan.nodes
        if node.judges
        and all(parent in committed for role, parent in node.parents.items() if role not in ("questions", "before"))
    )


def _exit_code(outcome: Outcome) -> int:
    """Return the exit code of what was driven. SegpropError when it was stopped."""
    if outcome.status == "stopped":
        raise SegpropError("stopped; finished work and checkpoints are kept: run the same command to go on")
    if outcome.status == "done":
        return EXIT_DONE
    bad_input = any(isinstance(error, UserError) for error in outcome.errors.values())
    return EXIT_BAD_INPUT if bad_input else EXIT_FAILED


def open_store(uri: str) -> Storage:
    """Open the store of a run before anything of it starts. ConfigError when it may not be made or written."""
    try:
        return open_storage(uri)
    except StorageDenied as error:
        raise ConfigError(f"store: {error.message}") from error


def carry_out(
    prepared: Prepared,
    plan: Plan,
    ledger: CommitLog,
    claim_directory: Callable[[], None],
    quiet: bool,
    take_over: bool,
    tell: Tell = _nobody,
) -> Outcome:
    """Drive a plan of this run under its lease, as `leased`; `ledger` then knows what is done. `tell` is told now and
    then what running tasks report."""
    with leased(prepared, plan, ledger.storage, claim_directory, take_over) as lease:
        # What others have done while this waited for the lease is done.
        ledger.look_up(plan.nodes)
        outcome = _drive(prepared, plan, ledger, quiet, lease, tell)
        if lease.superseded:
            # What it leaves in the run directory is the other driver's business now.
            raise SegpropError("stopped: another driver has taken this run over and goes on with it")
    return outcome


@contextmanager
def leased(
    prepared: Prepared, plan: Plan, storage: Storage, claim_directory: Callable[[], None], take_over: bool
) -> Iterator[RunLease]:
    """Hold the run for this process; leave its plan in the store for those who look at it from outside.

    `claim_directory` writes what the run directory says of the run, once it is held and before anything starts."""
    config, run_dir = prepared.config, prepared.run_dir
    digest = write_plan(storage, config.run, plan)
    write_run(storage, digest, RunRecord.of(config.run, plan))
    with journal(run_dir, config.run):
        lease = RunLease.acquire(
            storage,
            _claim(prepared, digest, take_over),
            say=lambda message: print(f"segprop: {message}", file=sys.stderr),
        )
        state = "failed"
        try:
            claim_directory()
            for warning in prepared.warnings:
                _log.warning("%s", warning)
            write_pointer(run_dir, digest)
            yield lease
            if not lease.superseded and not (run_dir / CONFIG_FILE).exists():
                # Somebody removed the directory meanwhile: what is written now is still known by its configuration.
                claim_directory()
                write_pointer(run_dir, digest)
            state = lease.outcome
        finally:
            lease.release(state)


def claim_idle(
    prepared: Prepared, storage: Storage, plan: Plan, claim_directory: Callable[[], None], take_over: bool
) -> None:
    """Claim the run directory where nothing is left to do: needs no lease, so that a store that cannot be written will
    do. RunTaken when a driver works on the directory with other settings."""
    if not take_over:
        check_neighbour(storage, _claim(prepared, plan_digest(prepared.config.run, plan), take_over))
    claim_directory()


def _claim(prepared: Prepared, digest: str, take_over: bool) -> Claim:
    run_dir = prepared.run_dir
    return Claim(digest, prepared.config.run, str(run_dir.absolute()), take_over, before=read_pointer(run_dir))


def _tracked(prepared: Prepared) -> Tracked:
    """Describe a run as trackers see it."""
    config, plan = prepared.config, prepared.plan
    rows = rows_of(config, prepared.data).train
    stages: dict[str, TrackedStage] = {}
    for name, regime in plan.regimes.items():
        before = 0
        for stage_id in regime.stages:
            task = plan.node(stage_id).task
            train = from_json(TrainSpec, task["train"])
            stage = TrackedStage(name, task["name"], before, steps_an_epoch(train, rows))
            stages |= dict.fromkeys(regime.work_of(stage_id), stage)
            before += steps_to_run(train, rows)
    settings = config.tracking
    return Tracked(config.run, prepared.run_dir, settings.project, settings.trackers, stages, leaves(config.resolved()))


def _drive(prepared: Prepared, plan: Plan, ledger: CommitLog, quiet: bool, lease: RunLease, tell: Tell) -> Outcome:
    config = prepared.config
    runner = make_runner(RunnerRequest(config.resources, prepared.plan, config.store))
    done = sum(node.id in ledger.commits for node in plan.nodes)
    total = sum(not schedule.superfluous(plan, node, committed=ledger.commits.keys()) for node in plan.nodes)

    def report(beat: Beat) -> None:
        lease.report(beat)
        tell({node: task.progress for node, task in beat.running.items()})

    with Progress(total, done, quiet=quiet) as progress:
        try:
            runner.start()
            with stop_on_signals() as stop_requested:
                driver = Driver(
                    plan,
                    ledger,
                    runner,
                    progress,
                    driver_settings(config),
                    stop_requested=lambda: stop_requested() or lease.superseded,
                    report=report,
                )
                outcome = driver.run()
                lease.outcome = outcome.status
                return outcome
        finally:
            runner.close()


def driver_settings(config: Config) -> DriverSettings:
    """Return what a driver is told of a configuration."""
    resources = config.resources
    settings = DriverSettings(
        config.store,
        NodeRetries(resources.max_attempts),
        resources.snapshot_memory,
        resources.interruptions_every,
        resources.checkpoint_memory,
        store_deadline_s=resources.store_deadline_s,
    )
    if resources.gang.size is None:
        return settings
    together = partial(runs_together, gang=resources.gang)
    gang = resources.gang
    return dataclasses.replace(settings, together=together, strategy=gang.strategy, zero3=gang.zero3.spec())


def finish(prepared: Prepared, ledger: CommitLog, outcome: Outcome, *, export: bool) -> Summary:
    """Write what a run leaves behind, of a run that somebody else drove; `export`: its models too."""
    recorded = Recorded.of(prepared)
    exports = export_finished(recorded, ledger, list(prepared.plan.regimes) if export else [])
    summary = write_results(recorded, ledger, outcome, exports)
    if prepared.config.tracking.trackers:
        tracking = LiveTracking(_tracked(prepared))
        tracking.finish(summary)
        tracking.close()
    return summary
