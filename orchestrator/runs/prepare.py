"""From a configuration file to something that can run: the edge where files are looked at.

Everything that can be wrong with the input is found here, before anything starts: the configuration, the data
set and the file of initial weights. `run_dir.py` looks at the run directory and the space for snapshots.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import psutil

from cache_store.errors import ConfigError, DataError, StoreError, UserError
from cache_store.records.nodes import NodeStore
from cache_store.storage.open import existing_storage
from orchestrator.config import load as configuration
from orchestrator.config.devices import Device, device_of_accelerator, usable
from orchestrator.config.precision import has_gpu, planned_device
from orchestrator.config.rates import Rates
from orchestrator.config.rules import judged, measured, ray_jobs
from orchestrator.config.rules.check import sound
from orchestrator.config.rules.models import chain, finding_of, trainable
from orchestrator.config.schema import MEMORY, Config, Regime
from orchestrator.config.yaml_loader import Document, KeyPath, Problem, apply_overrides, raise_problems
from orchestrator.environment import gpus
from orchestrator.plan import budget
from orchestrator.plan.builder import build_plan
from orchestrator.plan.experiment import outline_of, rows_of
from orchestrator.plan.graph import Plan
from orchestrator.plan.regime_state import FilesRead, Speeds
from orchestrator.plan.views import unequal_views
from workers.domains.planning import AnyData, AnyOutline
from workers.domains.registry import planning_of_data
from workers.models.base import Finding
from workers.models.outline import ChainOutline
from workers.specs.as_json import from_json
from workers.specs.data_results import DataFigures
from workers.specs.memory import AUTO
from workers.specs.results import MeasuredCosts, MeasureResult
from workers.specs.task_kinds import TASKS
from workers.specs.tasks import DataTask
from workers.versions import installed

#: Share of a machine's memory that stages may take for what `memory: auto` puts there.
OF_HOST = 0.9


@dataclass(frozen=True)
class Prepared:
    """All that a driver needs to know. `source`: the configuration file as it was named."""

    source: str
    config: Config
    data: AnyOutline
    #: What the model's family found when it looked at the model.
    found: object | None
    plan: Plan
    #: The plan again, with what measure nodes found (node id -> figures).
    replan: Callable[[Mapping[str, MeasuredCosts]], Plan] = field(repr=False, compare=False)
    #: The plan of a configuration that differs from this one in its training alone.
    plan_of: Callable[[Config], Plan] = field(repr=False, compare=False)
    #: What the data came to, where the store has them prepared.
    stored_data: DataFigures | None = None

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before anything is trained, in sentences."""
        device = planned_device(self.config.resources.model_dump())
        trained = {node.task["train"]["precision"]: None for node in self.plan.nodes if node.trains}
        emulated = (warning for precision in trained if (warning := device.warning(precision)) is not None)
        seen = {name: regime.views.values() for name, regime in self.plan.regimes.items()}
        return (*emulated, *unequal_views(seen))


def prepare(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    inspect: Callable[[AnyData, int], AnyOutline] | None = None,
) -> Prepared:
    """Check everything and make the plan. Raises ConfigError (or DataError, when the data set is the only
    problem) with all problems at once. `inspect` stands in for looking at the data set."""
    return prepare_document(configuration.read_document(path, overrides), inspect=inspect)


def prepare_document(
    source: Document,
    *,
    inspect: Callable[[AnyData, int], AnyOutline] | None = None,
    device: Device | None = None,
) -> Prepared:
    """As `prepare`, of a file that was read already. `device`: what to plan for instead of what `resources` say."""
    if device is not None:
        apply_overrides(source, ["resources.device=cuda"], "--device")
    checked = configuration.check(source)
    document, problems = checked.document, list(checked.problems)
    data: AnyOutline | None = None
    read = FilesRead()
    kind: type[UserError] = ConfigError
    if checked.data is not None:
        try:
            data = (inspect or look_at_data)(checked.data, checked.config.seed if checked.config is not None else 0)
        except UserError as error:
            found = _data_problems(error, document, problems)
            kind = ConfigError if problems else type(error)
            problems += found
    if checked.config is not None:
        findings: list[Finding] = []
        questions = judged.look(checked.config, findings)
        digest = _weights_digest(checked.config, checked.found, findings) if checked.inspected else None
        read = FilesRead(digest, questions)
        problems += document.located([*findings, *_further_problems(checked.config, data)])
    config = sound(document, problems, checked.config, kind)
    if data is None:
        raise ConfigError(f"{document.source}: its data cannot be looked at")
    raise_problems(document.source, document.located(_late_chains(config, data, checked.found)))
    return _planned(document, PlanBasis(config, data, checked.found, read, device))


@dataclass(frozen=True)
class PlanBasis:
    """A sound configuration and all that was found out about its model and data."""

    config: Config
    data: AnyOutline
    found: object | None
    read: FilesRead
    device: Device | None = None


def _weights_digest(config: Config, found: object | None, findings: list[Finding]) -> str | None:
    """Identity of the initial weights; what is wrong with their files is appended to `findings`."""
    try:
        return config.family.weights_digest(config.model, found)
    except ConfigError as error:
        findings.append(finding_of(error))
        return None


def _further_problems(config: Config, data: AnyOutline | None) -> Iterator[Finding]:
    """What is wrong with the splits, where the data could be looked at, and with paths of a submitted job."""
    if data is not None:
        rows = rows_of(config, data)
        yield from config.domain.row_problems(config.data, rows)
        yield from measured.row_problems(config, rows)
    yield from ray_jobs.problems(config, Path.cwd())


def _unfit(
    config: Config, regimes: Sequence[Regime], outlines: Mapping[str, ChainOutline], data: AnyOutline
) -> Iterator[Finding]:
    """What does not fit between chains and data, once for all regimes."""
    sample = config.domain.sample(config.data, data)
    outputs = dict.fromkeys(outlines[regime.name].head.outputs[-1][-1] for regime in regimes)
    wrong = [
        finding
        for count in outputs
        for finding in config.domain.output_problems(config.data, data, config.training, count)
    ]
    if wrong:
        yield from wrong
        return
    found = (regime.family.fit_problems(regime.model, outlines[regime.name], sample) for regime in regimes)
    yield from dict.fromkeys(itertools.chain.from_iterable(found))


def _late_chains(config: Config, data: AnyOutline, found: object | None) -> Iterator[Finding]:
    """Check the chains where only the data told the shape of a sample; see `models.chain`."""
    if config.domain.checked_sample(config.data) is None:
        for name in config.regimes:
            yield from chain(config, config.regime(name), found, config.domain.sample(config.data, data))


def _planned(document: Document, basis: PlanBasis) -> Prepared:
    """The plan of a sound configuration. ConfigError when a stage cannot be trained on these data, or
    when the configuration insists on snapshots that exceed the budget."""
    config, data, found = basis.config, basis.data, basis.found
    regimes = [config.regime(name) for name in config.regimes]
    outlines = {regime.name: outline_of(config, regime, data, found) for regime in regimes}
    rows = rows_of(config, data).train
    findings = [finding for regime in regimes for finding in trainable(config, regime, outlines[regime.name], rows)]
    findings += _unfit(config, regimes, outlines, data)
    memory = _device_bytes(config, basis.device)
    findings += _unsettled(regimes) if memory is None else ()
    raise_problems(document.source, document.located(findings))

    def plan_of(changed: Config, figures: Mapping[str, MeasuredCosts] = MappingProxyType({})) -> Plan:
        return build_plan(
            changed,
            outlines,
            data,
            found=found,
            read=basis.read,
            speeds=Speeds(
                _rates(config, basis.device),
                not _on_gpu(config),
                memory,
                _host_bytes(config, basis.device),
                _devices(config, basis.device),
            ),
            figures=figures,
            versions=versions_of(config),
        )

    def replan(figures: Mapping[str, MeasuredCosts]) -> Plan:
        return plan_of(config, figures).with_notes(settled.notes)

    with _what_cannot_be_kept(document):
        settled = budget.settle(config, plan_of, rows)
    raise_problems(document.source, document.located(settled.findings))
    config = settled.config
    with _what_cannot_be_kept(document):
        plan = replan({})
        if plan.unmeasured:
            # Measured once in the life of a store: every invocation, wherever it runs, decides by the same figures.
            plan = replan(measured_figures(config.store, plan))
    stored = stored_data(config.store, plan)
    if stored is None:
        _try_sample(document, basis, plan)
    else:
        raise_problems(document.source, document.located(config.domain.loss_problems(config.data, stored)), DataError)
    return Prepared(document.source, config, data, found, plan, replan, plan_of, stored)


@contextmanager
def _what_cannot_be_kept(document: Document) -> Iterator[None]:
    """Say where the limit stands that a plan cannot keep."""
    try:
        yield
    except ConfigError as error:
        where = str(error.details.get("where", "snapshots.budget"))
        raise_problems(document.source, [document.problem(tuple(where.split(".")), error.message)])
        raise


def _try_sample(document: Document, basis: PlanBasis, plan: Plan) -> None:
    """Try some samples of data that are to be prepared. DataError for what that would refuse."""
    for node in plan.nodes:
        if node.prepares:
            try:
                basis.config.domain.try_sample(basis.data, from_json(DataTask, node.task))
            except DataError as error:
                raise_problems(document.source, _data_problems(error, document, ()), DataError)


def versions_of(config: Config) -> dict[str, dict[str, str]]:
    """Kind of node -> versions of the packages that compute it: those installed here, but for what `reuse_versions`
    names. Data are prepared by the packages of their domain, everything else is computed by those of the family."""
    computing = installed(config.family.libraries) | config.reuse_versions
    preparing = installed(config.domain.libraries) | config.reuse_versions
    return {
        kind: {
            package: version
            for package, version in (computing if row.computes else preparing).items()
            if package in (config.family.libraries if row.computes else config.domain.libraries)
        }
        for kind, row in TASKS.items()
    }


def with_figures(prepared: Prepared) -> Prepared:
    """The plan for good, once its measure nodes are committed."""
    return replace(prepared, plan=prepared.replan(measured_figures(prepared.config.store, prepared.plan)))


def measured_figures(store: str, plan: Plan) -> dict[str, MeasuredCosts]:
    """Node id -> figures of those measure nodes of the plan that the store has a commit of."""
    try:
        nodes = NodeStore(existing_storage(store))
    except UserError:
        return {}  # no store yet
    commits = {node: nodes.commit_of(node) for node in plan.unmeasured}
    return {node: commit.read(MeasureResult).figures for node, commit in commits.items() if commit is not None}


def stored_data(store: str, plan: Plan) -> DataFigures | None:
    """What the data of a plan came to when they were prepared; None where they are not, or the store cannot tell, which
    whoever needs it says."""
    try:
        nodes = NodeStore(existing_storage(store))
        commits = [nodes.commit_of(node.id) for node in plan.nodes if node.prepares]
    except (UserError, StoreError):
        return None
    return next((commit.read(DataFigures) for commit in commits if commit is not None), None)


def look_at_data(data: AnyData, seed: int) -> AnyOutline:
    """What the data set is, from its files."""
    outline: AnyOutline = planning_of_data(data).inspect(data, seed)
    return outline


def foresee_data(data: AnyData, seed: int) -> AnyOutline:
    """As `look_at_data`, for a plan that nothing is run of: downloads nothing."""
    outline: AnyOutline = planning_of_data(data).foresee(data, seed)
    return outline


def _data_problems(error: UserError, document: Document, known: Sequence[Problem]) -> list[Problem]:
    """The messages of an inspection, located at the keys they begin with."""
    found = []
    paths = {problem.path for problem in known}
    for message in error.details.get("problems") or [error.message]:
        key, separator, text = str(message).partition(": ")
        path: KeyPath = tuple(key.split(".")) if separator and re.fullmatch(r"data(\.\w+)+", key) else ("data",)
        if path not in paths or path == ("data",):  # the configuration's own check has said it already
            found.append(document.problem(path, message if path == ("data",) else text))
    return found


def _rates(config: Config, device: Device | None) -> Rates:
    """As `Config.rates`, with a look at this machine where the configuration leaves the device open; of a device that
    is
    named its own."""
    nominal = config.rates("cuda" if config.resources.device == "auto" and has_gpu() else "cpu")
    if device is None or config.resources.gflops != "auto":
        return nominal
    return device.rates(nominal.threads)


def _unsettled(regimes: Sequence[Regime]) -> Iterator[Finding]:
    """Refuse settings that depend on what the device holds, where nobody knows how much that is."""
    asked = [micro for regime in regimes for micro in (regime.training.micro_batch, *_micros_of_stages(regime))]
    said = (
        "auto: the memory of the device is not known here; set resources.device_memory, or resources.accelerator "
        "to a known one"
    )
    if "auto" in asked:
        yield ("training", "micro_batch"), said
    if any(regime.memory.open or _leaves_memory_open(regime) for regime in regimes):
        yield ("memory",), said


def _leaves_memory_open(regime: Regime) -> bool:
    return any(AUTO in stage.get(MEMORY, {}).values() for stage in regime.stages.values())


def _micros_of_stages(regime: Regime) -> Iterator[object]:
    yield from (stage.get("micro_batch") for stage in regime.stages.values())


def _device_bytes(config: Config, device: Device | None) -> int | None:
    """What tensors may take on one device, by what is said of it first; None where nothing is known."""
    resources = config.resources
    named = device or device_of_accelerator(resources.accelerator)
    if resources.device_memory is not None and device is None:
        return usable(resources.device_memory)
    if named is not None:
        return named.usable_bytes
    if _on_gpu(config):
        return min((usable(gpu.memory_bytes) for gpu in gpus() if gpu.memory_bytes), default=None)
    slots = (os.cpu_count() or 1) if resources.slots == "auto" else resources.slots
    return usable(psutil.virtual_memory().total // slots)


def _host_bytes(config: Config, device: Device | None) -> int | None:
    """What a stage may take of its machine's memory beside the process; None where nothing is known."""
    resources = config.resources
    if resources.host_memory is not None:
        return resources.host_memory
    elsewhere = device is not None or resources.accelerator is not None or resources.address is not None
    if elsewhere or not (has_gpu() and _on_gpu(config)):
        return None
    tasks = max(1, len(gpus())) if resources.slots == "auto" else resources.slots
    return int(psutil.virtual_memory().total * OF_HOST) // tasks


def _devices(config: Config, device: Device | None) -> int | None:
    """Count this machine's GPUs where they are what a gang of size auto gets; None where nobody knows."""
    resources = config.resources
    elsewhere = device is not None or resources.accelerator is not None or resources.address is not None
    return None if elsewhere or not _on_gpu(config) else len(gpus()) or None


def _on_gpu(config: Config) -> bool:
    device = config.resources.device
    return device == "cuda" or (device == "auto" and has_gpu())
