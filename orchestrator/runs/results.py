"""Write a finished run's results: summary, report, TensorBoard events, exported models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from cache_store.errors import CorruptShard, UserError
from cache_store.records.nodes import Commit, NodeStore
from cache_store.storage.open import open_storage
from orchestrator.environment import describe_environment
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.driver import Outcome
from orchestrator.plan.experiment import experiment_of
from orchestrator.reports.page import write_report
from orchestrator.reports.records import Summary
from orchestrator.reports.result_table import print_places, print_table
from orchestrator.reports.summary import summarize, write_summary
from orchestrator.runs.prepare import Prepared
from orchestrator.trackers.table import track
from workers.export import Trained
from workers.export import export as write_export
from workers.specs.experiment import Experiment
from workers.specs.export_files import TRAINED_QUESTIONS


def report(prepared: Prepared) -> None:
    """Write summary.json and report.html again from what the store holds."""
    ledger = CommitLog.read(open_storage(prepared.config.store), prepared.plan)
    finished = all(target in ledger.commits for target in prepared.plan.targets)
    outcome = Outcome("done" if finished else "stopped", reused=set(ledger.commits))
    exports = {
        name: str(path.relative_to(prepared.run_dir))
        for name in prepared.plan.regimes
        if (path := _export_folder(prepared, name)).exists()
    }
    summary = _write_results(prepared, ledger, outcome, exports)
    print_table(summary)
    print_places(prepared.run_dir, summary)


def export(prepared: Prepared, regimes: Sequence[str]) -> None:
    """Write the final weights of these regimes again. UserError when one of them is not finished."""
    ledger = CommitLog.read(open_storage(prepared.config.store), prepared.plan)
    for name in regimes:
        if not _is_finished(prepared, name, ledger):
            raise UserError(f"{name}: not finished, there are no final weights to export yet; run it first")
    for path in _export_finished(prepared, ledger, regimes, anew=True).values():
        print(prepared.run_dir / path)


def _is_finished(prepared: Prepared, regime: str, ledger: CommitLog) -> bool:
    """Tell whether all that an export of the regime is made of is committed."""
    needed = (*prepared.plan.regimes[regime].weights.values(), *_beside(prepared))
    return all(node in ledger.commits for node in needed)


def _export_folder(prepared: Prepared, regime: str) -> Path:
    return prepared.run_dir / "model" / regime


def _export_finished(
    prepared: Prepared, ledger: CommitLog, regimes: Sequence[str], *, anew: bool = False
) -> dict[str, str]:
    """Regime -> folder of its checkpoint, relative to the run directory, for those that are finished. Folders that are
    whole are left alone unless `anew`."""
    nodes = NodeStore(ledger.storage)
    written: dict[str, str] = {}
    for name in regimes:
        if not _is_finished(prepared, name, ledger):
            continue
        folder = _export_folder(prepared, name)
        try:
            write_export(_trained(prepared, name, ledger), nodes, folder, anew=anew)
        except CorruptShard as error:
            raise CorruptShard(
                f"{error.message}, so {name} cannot be exported; `segprop cache verify {prepared.run_dir} --repair` "
                "moves what is damaged away, and `segprop run` then makes it again",
                **error.details,
            ) from error
        written[name] = str(folder.relative_to(prepared.run_dir))
    return written


def _trained(prepared: Prepared, name: str, ledger: CommitLog) -> Trained:
    config = prepared.config
    parts = {part: ledger.commits[node] for part, node in prepared.plan.regimes[name].weights.items()}
    return Trained(
        _experiment(prepared, name),
        parts,
        partial(_model_commit, prepared, ledger),
        data=config.domain.export_facts(config.data, prepared.data),
        data_commit=_questions_commit(prepared, ledger),
    )


def _beside(prepared: Prepared) -> list[str]:
    """Name the nodes whose commits hold what an export copies beside the weights. They are targets of the plan."""
    config = prepared.config
    reads_data = config.domain.export_reads_data(config.data)
    return [node.id for node in prepared.plan.nodes if not node.parents and (node.initializes or reads_data)]


def _questions_commit(prepared: Prepared, ledger: CommitLog) -> Commit | None:
    """Find the commit that says what questions were trained on, where the data are questions."""
    commits = (ledger.commits[node] for node in _beside(prepared))
    return next((commit for commit in commits if TRAINED_QUESTIONS in commit.files), None)


def _model_commit(prepared: Prepared, ledger: CommitLog) -> Commit:
    """The commit of the initial weights, which holds what goes beside them."""
    return ledger.commits[next(node.id for node in prepared.plan.nodes if node.initializes)]


def _experiment(prepared: Prepared, regime: str) -> Experiment:
    config, found = prepared.config, prepared.found
    return experiment_of(config, config.regime(regime), prepared.data, found)


def _write_results(prepared: Prepared, ledger: CommitLog, outcome: Outcome, exports: dict[str, str]) -> Summary:
    reused = {str(package): version for package, version in prepared.config.reuse_versions.items()} or None
    run_dir = prepared.run_dir
    summary = summarize(
        prepared.config.run,
        prepared.plan,
        ledger.commits,
        status=outcome.status,
        environment=replace(describe_environment(), reused_versions=reused),
        reused=outcome.reused,
        failures=outcome.failures,
        exports=exports,
    )
    write_summary(run_dir / "summary.json", summary)
    write_report(summary, run_dir / "report.html")
    track(run_dir, summary)
    return summary
