"""One invocation: opens the store, picks the runner, drives the plan, and writes what a run leaves behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cache_store.crashpoints import reach
from cache_store.errors import SegpropError, UserError
from cache_store.records.nodes import NodeStore
from cache_store.storage.base import Storage
from orchestrator import schedule
from orchestrator.driver import Driver, Outcome, stop_on_signals
from orchestrator.environment import describe_environment
from orchestrator.experiment import experiment_of
from orchestrator.gangs import gang_nodes, runs_together, settle_gang
from orchestrator.graph import Plan, RegimePlan
from orchestrator.journal import journal
from orchestrator.lease import Lease
from orchestrator.ledger import Ledger
from orchestrator.machines import Machine, settle
from orchestrator.plan_record import write_plan
from orchestrator.prepare import Prepared, check_space, with_figures
from orchestrator.progress import Progress, print_table
from orchestrator.report import write_report
from orchestrator.run_record import RunRecord, read_pointer, write_pointer, write_run
from orchestrator.runner import Runner
from orchestrator.sections import GangConfig, ImageConfig, ResourceConfig
from orchestrator.summary import summarize, write_summary
from orchestrator.tensorboard_log import write_tensorboard
from workers.specs.experiment import Experiment

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2


def execute(prepared: Prepared, *, quiet: bool = False, take_over: bool = False) -> int:
    """Run the plan to its end and write the results; returns the exit code (0 done, 1 failed, 2 bad input).

    A run that has nothing left to do starts no worker and no Ray. RunTaken when another driver is at work on it;
    `take_over` stops that one instead.
    """
    storage = Storage.open(prepared.config.store)
    ledger = Ledger.read(storage, prepared.plan)
    outcome = Outcome("done", reused=set(ledger.commits))
    planned = prepared.plan
    if planned.unmeasured:
        # What is measured decides what the plan is; it is then made for good.
        outcome = carry_out(prepared, planned.measuring(), ledger, quiet, take_over)
        if outcome.status == "done":
            prepared = with_figures(prepared)
            check_space(prepared)
            ledger = Ledger.read(storage, prepared.plan)
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


def carry_out(prepared: Prepared, plan: Plan, ledger: Ledger, quiet: bool, take_over: bool) -> Outcome:
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
def leased(prepared: Prepared, plan: Plan, storage: Storage, take_over: bool) -> Iterator[Lease]:
    """The run, held by this process; its plan left in the store for those who look at it from outside."""
    config, run_dir = prepared.config, prepared.run_dir
    digest = write_plan(storage, config.run, plan)
    write_run(storage, digest, RunRecord.of(config.run, plan))
    with journal(run_dir, config.run):
        lease = Lease.acquire(
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


def _drive(prepared: Prepared, plan: Plan, ledger: Ledger, quiet: bool, lease: Lease) -> Outcome:
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


def make_runner(prepared: Prepared) -> Runner:
    """The runner the configuration asks for, with slots and threads settled."""
    resources = prepared.config.resources
    address = resources.address or os.environ.get("RAY_ADDRESS")
    if gang_nodes(prepared.plan, resources.gang):
        return _gang_runner(resources, address, prepared.config.store)
    if resources.runner == "ray" and address:
        from orchestrator.ray_runner import RayRunner

        # What is here says nothing of a cluster: the runner looks at its machines once it is connected.
        return RayRunner(
            slots=resources.slots,
            threads=resources.threads,
            device=resources.device,
            address=address,
            chains=prepared.plan.width,
            store=prepared.config.store,
            labels=resources.labels,
            accelerator=resources.accelerator,
            deadline_s=resources.worker_deadline_s,
        )
    device = _device(resources.device)
    slots, threads = settle_slots(
        resources.slots,
        resources.threads,
        device=device,
        devices=_device_count(device),
        chains=prepared.plan.width,
    )
    if resources.runner == "local":
        from orchestrator.local_runner import LocalRunner

        # One task at a time: on a CPU it has the cores of all slots.
        alone = resources.threads == "auto" and device == "cpu"
        return LocalRunner(threads=slots * threads if alone else threads, device=device)
    from orchestrator.ray_runner import RayRunner

    return RayRunner(
        slots=slots,
        threads=threads,
        device=device,
        labels=resources.labels,
        accelerator=resources.accelerator,
        deadline_s=resources.worker_deadline_s,
    )


def _gang_runner(resources: ResourceConfig, address: str | None, store: str) -> Runner:
    from orchestrator.gang_runner import GangRunner

    gang = resources.gang
    assert gang.size is not None
    slots: int | str = resources.slots
    size: int | str = gang.size
    threads: int | str = resources.threads
    device = resources.device
    if not address:  # else the runner looks at the cluster's machines once it is connected
        device = _device(device)
        count = _device_count(device)
        here = Machine(cpus=os.cpu_count() or 1, gpus=count) if device == "cuda" else Machine(cpus=count)
        settled, size = settle_gang([here], size=size, slots=slots, threads=threads, device=device)
        slots, threads = settled.count, settled.threads
    return GangRunner(
        size=size,
        strategy=gang.strategy,
        timeout_s=gang.timeout_s,
        slots=slots,
        threads=threads,
        device=device,
        address=address,
        store=store,
        labels=resources.labels,
        accelerator=resources.accelerator,
        deadline_s=resources.worker_deadline_s,
    )


def settle_slots(slots: int | str, threads: int | str, *, device: str, devices: int, chains: int) -> tuple[int, int]:
    """(slots, threads of each). `devices`: GPUs or CPU cores there are; `chains`: stages that can run at one time, one
    of every regime where they run one after the other.

    One slot a GPU. On a CPU-only machine a slot is a share of the cores: as many slots as regimes can use, since
    two one-thread workers do more than one two-thread worker.
    """
    if device == "cuda":
        here = Machine(cpus=_device_count("cpu"), gpus=devices)
        settled = settle([here], slots=slots, threads=threads, device=device, chains=chains)
        return settled.count, settled.threads
    if slots == "auto" and threads == "auto":
        count = max(1, min(devices, chains))
        return count, max(1, devices // count)
    if slots == "auto":
        return max(1, devices // int(threads)), int(threads)
    return int(slots), max(1, devices // int(slots)) if threads == "auto" else int(threads)


def _device(wanted: str) -> Literal["cpu", "cuda"]:
    if wanted == "cpu":
        return "cpu"
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("resources.device: cuda, but torch finds no CUDA device here; allowed here: cpu, auto")
    return "cuda" if available else "cpu"


def _device_count(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def finish(prepared: Prepared, ledger: Ledger, outcome: Outcome, *, export: bool) -> dict[str, Any]:
    """Write what a run leaves behind, of a run that somebody else drove; `export`: its models too."""
    exports = _export_finished(prepared, ledger, list(prepared.plan.regimes) if export else [])
    return _write_results(prepared, ledger, outcome, exports)


def report(prepared: Prepared) -> None:
    """Write summary.json and report.html again from what the store holds."""
    ledger = Ledger.read(Storage.open(prepared.config.store), prepared.plan)
    finished = all(target in ledger.commits for target in prepared.plan.targets)
    outcome = Outcome("done" if finished else "stopped", reused=set(ledger.commits))
    exports = {
        name: str(path.relative_to(prepared.run_dir))
        for name in prepared.plan.regimes
        if (path := _export_folder(prepared, name)).exists()
    }
    print_table(_write_results(prepared, ledger, outcome, exports))


def export(prepared: Prepared, regimes: Sequence[str]) -> None:
    """Write the final weights of these regimes again. UserError when one of them is not finished."""
    ledger = Ledger.read(Storage.open(prepared.config.store), prepared.plan)
    for name in regimes:
        if not _is_finished(prepared.plan.regimes[name], ledger):
            raise UserError(f"{name}: not finished, there are no final weights to export yet; run it first")
    for path in _export_finished(prepared, ledger, regimes).values():
        print(prepared.run_dir / path)


def _is_finished(regime: RegimePlan, ledger: Ledger) -> bool:
    return all(node in ledger.commits for node in regime.weights.values())


def _export_folder(prepared: Prepared, regime: str) -> Path:
    return prepared.run_dir / "model" / regime


def _export_finished(prepared: Prepared, ledger: Ledger, regimes: Sequence[str]) -> dict[str, str]:
    """Regime -> folder of its checkpoint, relative to the run directory, for those that are finished."""
    nodes = NodeStore(ledger.storage)
    written: dict[str, str] = {}
    for name in regimes:
        regime = prepared.plan.regimes[name]
        if not _is_finished(regime, ledger):
            continue
        folder = _export_folder(prepared, name)
        parts = {part: ledger.commits[node] for part, node in regime.weights.items()}
        _export(prepared, name, parts, nodes, folder)
        written[name] = str(folder.relative_to(prepared.run_dir))
    return written


def _export(prepared: Prepared, name: str, parts: dict[str, Any], nodes: NodeStore, folder: Path) -> None:
    config, data = prepared.config, prepared.data
    if prepared.language is not None:
        from workers.export import export_language_model

        export_language_model(_experiment(prepared, name), parts, _model_commit(prepared, nodes), nodes, folder)
        return
    from workers.data.images.inspect import resize_of
    from workers.data.images.outline import DataOutline
    from workers.export import export as write_export

    assert isinstance(config, ImageConfig)
    assert isinstance(data, DataOutline)
    write_export(
        _experiment(prepared, name),
        parts,
        nodes,
        folder,
        class_names=tuple(data.class_names),
        preprocessing={
            "resize": resize_of(config.data),
            "center_crop": config.data.image_size,
            "mean": list(data.mean),
            "std": list(data.std),
        },
    )


def _model_commit(prepared: Prepared, nodes: NodeStore) -> dict[str, Any]:
    """The commit of the imported checkpoint, which holds what goes beside the weights."""
    node = next(node for node in prepared.plan.nodes if node.kind == "model")
    commit = nodes.commit_of(node.id)
    assert commit is not None
    return commit


def _experiment(prepared: Prepared, regime: str) -> Experiment:
    config, language = prepared.config, prepared.language
    classes: int = language.vocabulary if language is not None else prepared.data.classes  # type: ignore[union-attr]
    return experiment_of(config, config.regime(regime), classes, language)


def _write_results(prepared: Prepared, ledger: Ledger, outcome: Outcome, exports: dict[str, str]) -> dict[str, Any]:
    run_dir = prepared.run_dir
    summary = summarize(
        prepared.config.run,
        prepared.plan,
        ledger.commits,
        status=outcome.status,
        environment=describe_environment(),
        reused=outcome.reused,
        failures=outcome.failures,
        exports=exports,
    )
    write_summary(run_dir / "summary.json", summary)
    write_report(summary, run_dir / "report.html")
    write_tensorboard(run_dir / "tb", summary)
    return summary
