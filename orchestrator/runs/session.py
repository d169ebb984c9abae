"""One invocation: opens the store, picks the runner, drives the plan, and writes what a run leaves behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from cache_store.crashpoints import reach
from cache_store.errors import SegpropError, UserError
from cache_store.storage.base import Storage
from orchestrator.config.resources import GangConfig
from orchestrator.execution import schedule
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.driver import Driver, Outcome
from orchestrator.execution.event_log import journal
from orchestrator.execution.plan_record import write_plan
from orchestrator.execution.run_lease import RunLease
from orchestrator.execution.run_record import RunRecord, read_pointer, write_pointer, write_run
from orchestrator.execution.signals import stop_on_signals
from orchestrator.plan.graph import Plan
from orchestrator.progress import Progress
from orchestrator.reports.records import Summary
from orchestrator.reports.result_table import print_table
from orchestrator.runners.factory import make_runner
from orchestrator.runners.gang_size import runs_together
from orchestrator.runs.prepare import Prepared, check_space, with_figures
from orchestrator.runs.results import _export_finished, _write_results

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2


def execute(prepared: Prepared, *, quiet: bool = False, take_over: bool = False) -> int:
    """Run the plan to its end and write the results; returns the exit code (0 done, 1 failed, 2 bad input).

    A run that has nothing left to do starts no worker and no Ray. RunTaken when another driver is at work on it;
    `take_over` stops that one instead.
    """
    storage = Storage.open(prepared.config.store)
    ledger = CommitLog.read(storage, prepared.plan)
    outcome = Outcome("done", reused=set(ledger.commits))
    planned = prepared.plan
    if planned.unmeasured:
        # What is measured decides what the plan is; it is then made for good.
        outcome = carry_out(prepared, planned.measuring(), ledger, quiet, take_over)
        if outcome.status == "done":
            prepared = with_figures(prepared)
            check_space(prepared)
            ledger = CommitLog.read(storage, prepared.plan)
    if outcome.status == "done" and any(target not in ledger.commits for target in prepared.plan.targets):
        earlier, measured = outcome.reused, prepared.plan is not planned
        outcome = carry_out(prepared, prepared.plan, ledger, quiet, take_over)
        if measured:
            outcome.reused &= earlier  # what was measured just now was not there before
    exports = _export_finished(prepared, ledger, list(prepared.plan.regimes))
    reach("driver.exported")
    summary = _write_results(prepared, ledger, outcome, exports)
    print_table(summary)
    if outcome.status == "stopped":
        raise SegpropError("stopped; finished work and checkpoints are kept: run the same command to go on")
    if outcome.status == "done":
        return EXIT_DONE
    bad_input = any(isinstance(error, UserError) for error in outcome.errors.values())
    return EXIT_BAD_INPUT if bad_input else EXIT_FAILED


def carry_out(prepared: Prepared, plan: Plan, ledger: CommitLog, quiet: bool, take_over: bool) -> Outcome:
    """Drive a plan of this run under its lease; `ledger` then knows what is done."""
    with leased(prepared, plan, ledger.storage, take_over) as lease:
        # What others have done while this waited for the lease is done.
        ledger.look_up(plan.nodes)
        outcome = _drive(prepared, plan, ledger, quiet, lease)
        if lease.superseded:
            # What it leaves in the run directory is the other driver's business now.
            raise SegpropError("stopped: another driver has taken this run over and goes on with it")
    return outcome


@contextmanager
def leased(prepared: Prepared, plan: Plan, storage: Storage, take_over: bool) -> Iterator[RunLease]:
    """The run, held by this process; its plan left in the store for those who look at it from outside."""
    config, run_dir = prepared.config, prepared.run_dir
    digest = write_plan(storage, config.run, plan)
    write_run(storage, digest, RunRecord.of(config.run, plan))
    with journal(run_dir, config.run):
        lease = RunLease.acquire(
            storage,
            digest,
            config.run,
            str(run_dir.absolute()),
            take_over=take_over,
            before=read_pointer(run_dir),
            say=lambda message: print(f"segprop: {message}", file=sys.stderr),
        )
        state = "failed"
        try:
            write_pointer(run_dir, digest)
            yield lease
            state = lease.outcome
        finally:
            lease.release(state)


def _drive(prepared: Prepared, plan: Plan, ledger: CommitLog, quiet: bool, lease: RunLease) -> Outcome:
    config = prepared.config
    runner = make_runner(prepared)
    done = sum(node.id in ledger.commits for node in plan.nodes)
    total = sum(not schedule.superfluous(plan, node, committed=ledger.commits.keys()) for node in plan.nodes)
    with Progress(total, done, quiet=quiet) as progress:
        try:
            runner.start()
            with stop_on_signals() as stop_requested:
                driver = Driver(
                    plan,
                    ledger,
                    runner,
                    progress,
                    store=config.store,
                    max_attempts=config.resources.max_attempts,
                    snapshot_memory=config.resources.snapshot_memory,
                    stop_requested=lambda: stop_requested() or lease.superseded,
                    **gang_of(config.resources.gang),
                    report=lease.report,
                )
                outcome = driver.run()
                lease.outcome = outcome.status
                return outcome
        finally:
            runner.close()


def gang_of(gang: GangConfig) -> dict[str, Any]:
    """What a `Driver` has to know of a gang."""
    if gang.size is None:
        return {}
    return {"together": partial(runs_together, gang=gang), "strategy": gang.strategy}


def finish(prepared: Prepared, ledger: CommitLog, outcome: Outcome, *, export: bool) -> Summary:
    """Write what a run leaves behind, of a run that somebody else drove; `export`: its models too."""
    exports = _export_finished(prepared, ledger, list(prepared.plan.regimes) if export else [])
    return _write_results(prepared, ledger, outcome, exports)
