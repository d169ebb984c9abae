"""Plan, run and load from Python: the program's own functions, with a configuration as a file or a mapping."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.errors import SegpropError, UserError
from cache_store.suggest import did_you_mean
from orchestrator.config.load import document_of, read_document
from orchestrator.config.yaml_loader import Document
from orchestrator.plan.graph import Plan
from orchestrator.reports.record_json import from_json, to_json
from orchestrator.reports.records import Summary
from orchestrator.runs.prepare import Prepared, prepare_document
from orchestrator.sweeps.prepare import is_sweep

if TYPE_CHECKING:
    import pandas
    from torch import nn

#: A configuration: a file, or what one would hold.
AnyConfig = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run came to. `dir`: its folder, with summary.json, report.html and the models."""

    dir: Path
    summary: Summary

    @property
    def accuracy(self) -> dict[str, float]:
        """Accuracy (0..1) on the test split, by regime; of those that are finished."""
        found = {name: regime.final.metrics.get("accuracy") for name, regime in self.summary.regimes.items()}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """All metrics of the test split by regime, of those that are finished: accuracy, or what networks of other
        targets are scored by (`f1_micro`, `r2`, …), and the loss."""
        found = {name: regime.final.metrics for name, regime in self.summary.regimes.items()}
        return {
            name: {key: value for key, value in metrics.items() if value is not None}
            for name, metrics in found.items()
            if metrics
        }

    @property
    def models(self) -> dict[str, Path]:
        """The folder of every finished regime's model."""
        exports = {name: regime.export for name, regime in self.summary.regimes.items()}
        return {name: self.dir / export for name, export in exports.items() if export is not None}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One row for every epoch of every stage: regime, stage, epoch, losses, accuracies, rate, seconds, memory."""
        return list(_rows(self.summary))

    def frame(self) -> pandas.DataFrame:
        """Return `metrics` as a data frame. UserError where pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise UserError("pandas is not installed: pip install pandas, or use Run.metrics") from error
        return pandas.DataFrame(self.metrics)


@dataclass(frozen=True)
class Planned:
    """What a run would do. `config`: every setting written out; `plan`: stages, nodes and predictions."""

    prepared: Prepared

    @property
    def config(self) -> dict[str, Any]:
        return self.prepared.config.resolved()

    @property
    def plan(self) -> Plan:
        return self.prepared.plan

    @property
    def stages(self) -> dict[str, list[str]]:
        """The stages of every regime in order, by name."""
        regimes = self.plan.regimes.items()
        return {name: [self.plan.node(node).task["name"] for node in regime.stages] for name, regime in regimes}

    def show(self) -> None:
        """Print the tables of `segprop plan`."""
        from orchestrator.runs.dry_run import print_plan

        print_plan(self.prepared)


def plan(config: AnyConfig, **overrides: Any) -> Planned:
    """Check a configuration and plan its run; nothing is trained. `overrides`: settings that replace its own, as a
    section (`training={"epochs": 3}`) or by dotted key (`**{"training.epochs": 3}`).

    ConfigError with every problem of the configuration, DataError for the data.
    """
    return Planned(prepare_document(_document(config, overrides)))


def run(config: AnyConfig, *, quiet: bool = False, take_over: bool = False, **overrides: Any) -> Run:
    """Run a configuration, or go on where it stopped, and return what it came to. Arguments and errors as of `plan`;
    SegpropError when a stage fails. `take_over`: also from another driver that works on this run.
    """
    from orchestrator.runs import session
    from orchestrator.runs.run_dir import check_run_dir, in_own_dir

    document = _document(config, overrides)
    prepared = in_own_dir(document, prepare_document(document))
    check_run_dir(prepared)
    code = session.execute(prepared, quiet=quiet, take_over=take_over)
    done = _read(prepared.run_dir)
    if code != session.EXIT_DONE:
        kind = UserError if code == session.EXIT_BAD_INPUT else SegpropError
        raise kind("; ".join(f"{failure.label}: {failure.message}" for failure in done.summary.failures))
    return done


def load(run: str | Path | Run, regime: str) -> nn.Module:
    """Return the trained network of a finished regime with its weights, in evaluation mode, on the CPU.

    run: the folder of a run, or what `run` returned. Code of yours is read from the run's own copy. UserError when
    there is no such model.
    """
    folder = run.dir if isinstance(run, Run) else Path(run)
    target = folder / "model" / regime
    if not target.is_dir():
        known = sorted(path.name for path in (folder / "model").glob("*") if path.is_dir())
        there = f"finished there: {', '.join(known)}" if known else "no regime is finished there"
        raise UserError(f"{folder} has no model of {regime!r}{did_you_mean(regime, known)}; {there}")
    if (target / "load_model.py").is_file():
        network: nn.Module = runpy.run_path(str(target / "load_model.py"))["load"]()
        return network
    from transformers import AutoModelForCausalLM

    decoder: Any = AutoModelForCausalLM.from_pretrained(target)
    return decoder.eval()  # type: ignore[no-any-return]


def _document(config: AnyConfig, overrides: Mapping[str, Any]) -> Document:
    texts = [f"{key}={json.dumps(value)}" for key, value in _flat(overrides, "")]
    document = document_of(config, texts) if isinstance(config, Mapping) else read_document(config, texts)
    if is_sweep(document):
        raise UserError(f"{document.source} is a sweep: run it with `segprop sweep`, or leave the section out")
    return document


def _flat(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", str(value) if isinstance(value, Path) else value


def _read(run_dir: Path) -> Run:
    path = run_dir / "summary.json"
    return Run(run_dir, from_json(Summary, json.loads(path.read_text()), str(path)))


def _rows(summary: Summary) -> Iterator[dict[str, Any]]:
    for name, regime in summary.regimes.items():
        for stage in regime.stages:
            for epoch in stage.curve:
                figures = {key: value for key, value in to_json(epoch).items() if not isinstance(value, dict)}
                yield {"regime": name, "stage": stage.name, **figures}
