"""Make trials that can run of a file with a `sweep` section: every trial's configuration is checked and planned before
anything starts, and all that is wrong with any of them is said at once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cache_store.errors import ConfigError, StoreError, UserError
from cache_store.storage.durable import write_atomically
from orchestrator.config import load as configuration
from orchestrator.config.messages import validated
from orchestrator.config.schema import Config, plain
from orchestrator.config.sweep_schema import SweepConfig
from orchestrator.config.values import default_store
from orchestrator.config.yaml_loader import Document, KeyPath, Problem, raise_problems
from orchestrator.plan.graph import Plan
from orchestrator.runs.prepare import Prepared, look_at_data, prepare_document
from orchestrator.runs.recorded import FILE as RECORD_FILE
from orchestrator.runs.run_dir import CONFIG_FILE, check_run_dir, check_start, claim_run_dir
from orchestrator.sweeps import metric as sweep_metric
from orchestrator.sweeps import plan as sweep_plan
from orchestrator.sweeps import space
from orchestrator.sweeps.metric import Metric
from workers.models.base import Finding

if TYPE_CHECKING:
    from workers.domains.planning import AnyData, AnyOutline

#: Word before a parameter's value in messages.
WORD = "sweep parameter"
#: Keys that say where a run lies or runs, not what it is: all trials share them.
SHARED = ("run", "run_dir", "store", "sweep", "resources")
#: What may change from one stage to the next.
CHANGEABLE = ("training.optimizer.", "training.schedule.", "training.clip")


@dataclass(frozen=True)
class Trial:
    """One run of the sweep. `name` is its number, as tables show it; `folder` is named by its parameters."""

    name: str
    folder: str
    parameters: dict[str, Any]
    prepared: Prepared


@dataclass(frozen=True)
class PreparedSweep:
    """All that a sweep needs to know. `document`: the file, overrides applied."""

    source: str
    document: Document
    section: SweepConfig
    metric: Metric
    trials: tuple[Trial, ...]
    plan: Plan

    @property
    def config(self) -> Config:
        """The first trial's: what all share (resources, store) is in it."""
        return self.trials[0].prepared.config

    @property
    def run(self) -> str:
        return str(self.document.data["run"])

    @property
    def run_dir(self) -> Path:
        return Path(str(self.document.data["run_dir"]))

    def remade(self, change: Callable[[Prepared], Prepared]) -> PreparedSweep:
        """Return the sweep with every trial's plan made again."""
        trials = tuple(dataclasses.replace(trial, prepared=change(trial.prepared)) for trial in self.trials)
        plan = sweep_plan.union({trial.name: trial.prepared.plan for trial in trials})
        return dataclasses.replace(self, trials=trials, plan=plan)

    def changed(self, trial: Trial, parameters: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Prepared:
        """Prepare a trial that goes on with other `parameters` after the stages of `history`, whose settings stay: an
        ordinary configuration that overrides its first stages."""
        return prepare_document(_changed(self, trial, parameters, history), inspect=_remembering(look_at_data))


def is_sweep(document: Document) -> bool:
    """Tell whether a file has a `sweep` section, or asks for several seeds."""
    return document.data.get("sweep") is not None or document.data.get("seeds") is not None


def prepare_sweep(
    path: str | Path, overrides: Sequence[str] = (), *, inspect: Callable[[AnyData, int], AnyOutline] | None = None
) -> PreparedSweep:
    """Check every trial and make its plan. Raises ConfigError (DataError, when the data are the only problem) with all
    problems of the file and of every trial."""
    return prepare_sweep_document(configuration.read_document(path, overrides), inspect=inspect)


def prepare_sweep_document(
    document: Document, *, inspect: Callable[[AnyData, int], AnyOutline] | None = None
) -> PreparedSweep:
    """Do as `prepare_sweep`, with a file that was read already."""
    if not is_sweep(document):
        raise ConfigError(
            f"{document.source}: has no sweep section; `segprop run` runs it, docs/sweeps.md says how to add one"
        )
    raise_problems(document.source, _seed_problems(document))
    problems: list[Problem] = []
    raw = _with_seeds(document)
    findings: list[Finding] = []
    section = validated(SweepConfig, raw, ("sweep",), findings)
    problems += document.located(findings)
    if section is None or problems:
        # Nothing is known of trials: the rest of the file is checked as it stands.
        problems += configuration.check(configuration.with_values(document, {}, WORD)).problems
        raise_problems(document.source, problems)
    if section is None:
        raise ConfigError(f"{document.source}: its sweep section cannot be read")
    problems += _parameter_problems(section, document)
    raise_problems(document.source, problems)
    trials = _trials(section, document, _remembering(inspect or look_at_data))
    metric = _metric(section, document, trials[0].prepared.config)
    problems = [*_metric_problems(section, document, metric, trials), *_scheduler_problems(section, document, trials)]
    raise_problems(document.source, problems)
    plan = sweep_plan.union({trial.name: trial.prepared.plan for trial in trials})
    return PreparedSweep(document.source, document, section, metric, trials, plan)


def _with_seeds(document: Document) -> Any:
    """The `sweep` section, in which `seeds` are a grid."""
    raw = json.loads(json.dumps(document.data.get("sweep") or {}))
    seeds = document.data.get("seeds")
    if seeds is not None and isinstance(raw, dict):
        raw["parameters"] = {**(raw.get("parameters") or {}), "seed": {"grid": seeds}}
    return raw


def _seed_problems(document: Document) -> list[Problem]:
    seeds, sweep = document.data.get("seeds"), document.data.get("sweep")
    if seeds is None:
        return []
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 1 << 63 for seed in seeds)
    if not whole or len(set(seeds)) != len(seeds) or len(seeds) < 2:
        return [
            document.problem(("seeds",), "must be a list of two or more different whole numbers, such as [0, 1, 2]")
        ]
    parameters = sweep.get("parameters") if isinstance(sweep, dict) else None
    if isinstance(parameters, dict) and "seed" in parameters:
        return [document.problem(("seeds",), "sweep.parameters.seed says it too; leave one of the two out")]
    return []


def _parameter_problems(section: SweepConfig, document: Document) -> list[Problem]:
    found = []
    for key in section.parameters:
        path: KeyPath = ("sweep", "parameters", key)
        if key.split(".")[0] in SHARED:
            found.append(document.problem(path, f"is shared by all trials; set {key.split('.')[0]} itself"))
        if section.scheduler.name == "pbt" and not key.startswith(CHANGEABLE):
            found.append(
                document.problem(
                    path,
                    "pbt changes it between two stages, and a stage takes over what others trained; allowed: keys that "
                    f"begin with {', '.join(CHANGEABLE)}",
                )
            )
    number = space.count(section)
    if number > space.MOST_TRIALS:
        message = f"{number} trials; at most {space.MOST_TRIALS}: fewer values, or random draws instead of grids"
        found.append(document.problem(("sweep", "parameters"), message))
    return found


def _trials(
    section: SweepConfig, document: Document, inspect: Callable[[AnyData, int], AnyOutline]
) -> tuple[Trial, ...]:
    trials: list[Trial] = []
    problems: list[Problem] = []
    kinds: set[type[UserError]] = set()
    points = space.points(section)
    width = len(str(len(points) - 1))
    for index, point in enumerate(points):
        name, folder = f"t{index:0{width}d}", space.folder_name(point)
        try:
            prepared = prepare_document(_document(document, name, folder, point), inspect=inspect)
        except UserError as error:
            if "problems" not in error.details:
                raise
            kinds.add(type(error))
            problems += [_problem(found) for found in error.details["problems"]]
            continue
        trials.append(Trial(name, folder, point, prepared))
    raise_problems(document.source, problems, kinds.pop() if len(kinds) == 1 else ConfigError)
    return tuple(trials)


def _problem(found: Mapping[str, Any] | str) -> Problem:
    if isinstance(found, str):
        return Problem((), found)
    return Problem((found["key"],) if found["key"] else (), found["message"], found["line"], found["origin"])


def _document(document: Document, name: str, folder: str, point: Mapping[str, Any]) -> Document:
    """Make a trial's own file: a run below the sweep's, on the sweep's store."""
    changed = configuration.with_values(document, point, WORD)
    data = changed.data
    changed.source = f"{document.source} ({name}: {space.point_text(point)})"
    data["run"] = f"{document.data['run']}-{name}"
    data["run_dir"] = f"{document.data['run_dir']}/trials/{folder}"
    data["store"] = document.data["store"]
    return changed


def _changed(
    sweep: PreparedSweep, trial: Trial, parameters: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> Document:
    changed = _document(sweep.document, trial.name, trial.folder, {**trial.parameters, **parameters})
    regime = sweep.metric.regime
    stages = [trial.prepared.plan.node(node).task["name"] for node in trial.prepared.plan.regimes[regime].stages]
    values = {
        f"regimes.{regime}.stages.{stage}.{key.removeprefix('training.')}": value
        for stage, settings in zip(stages, history, strict=False)
        for key, value in settings.items()
    }
    return configuration.with_values(changed, values, WORD)


def _remembering(inspect: Callable[[AnyData, int], AnyOutline]) -> Callable[[AnyData, int], AnyOutline]:
    """Look at the data once for trials that differ in other things."""
    known: dict[tuple[str, int], AnyOutline] = {}

    def look(data: AnyData, seed: int) -> AnyOutline:
        key = (repr(data), seed)
        if key not in known:
            known[key] = inspect(data, seed)
        return known[key]

    return look


def _metric(section: SweepConfig, document: Document, config: Config) -> Metric:
    kinds = {name: regime.kind for name, regime in config.regimes.items()}
    try:
        return sweep_metric.parse(section.metric, section.mode, kinds, names=config.domain.metrics(config.data))
    except ValueError as error:
        raise_problems(document.source, [document.problem(("sweep", "metric"), str(error))])
        raise


def _metric_problems(
    section: SweepConfig, document: Document, metric: Metric, trials: Sequence[Trial]
) -> list[Problem]:
    missing = [trial for trial in trials if metric.regime not in trial.prepared.plan.regimes]
    if missing:
        names = ", ".join(trial.name for trial in missing)
        return [document.problem(("sweep", "metric"), f"{metric.key}: {names} have no regime {metric.regime}")]
    if section.scheduler.name == "all" or metric.split == "validation":
        return []
    config = trials[0].prepared.config
    allowed = ", ".join(f"{metric.regime}.validation.{name}" for name in config.domain.metrics(config.data))
    message = (
        f"{metric.key}: {section.scheduler.name} decides after every stage, and stages are judged on validation alone "
        f"(deciding on test would spoil it); allowed: {allowed}"
    )
    return [document.problem(("sweep", "metric"), message)]


def _scheduler_problems(section: SweepConfig, document: Document, trials: Sequence[Trial]) -> list[Problem]:
    name = section.scheduler.name
    path: KeyPath = ("sweep", "scheduler", "name")
    config = trials[0].prepared.config
    if name == "all":
        return []
    found = []
    if not config.resources.on_ray:
        runner = config.resources.runner
        found.append(document.problem(path, f"{name}: is Ray Tune's; with resources.runner {runner} only all is there"))
    if name == "pbt" and len(config.regimes) > 1:
        found.append(document.problem(path, f"pbt: needs one regime alone, there are {', '.join(config.regimes)}"))
    if name == "pbt" and len(trials) < 2:
        found.append(document.problem(path, "pbt: needs at least two trials; raise sweep.samples"))
    return found


def renew(prepared: Prepared) -> None:
    """Claim a trial's folder whatever configuration it holds: pbt changes it on the way."""
    for name in (CONFIG_FILE, RECORD_FILE):
        (prepared.run_dir / name).unlink(missing_ok=True)
    claim_run_dir(prepared)


def check_sweep_dir(sweep: PreparedSweep) -> None:
    """Look whether every trial can use its directory; as `check_run_dir`, writes nothing."""
    for trial in sweep.trials:
        # pbt changes what a trial's directory holds on the way.
        check = check_start if sweep.section.scheduler.name == "pbt" else check_run_dir
        check(trial.prepared)


def claim_sweep_dir(sweep: PreparedSweep) -> None:
    """Make the run directories of the sweep and of every trial, each with its configuration; as `claim_run_dir`."""
    for trial in sweep.trials:
        if sweep.section.scheduler.name == "pbt":
            renew(trial.prepared)
        else:
            claim_run_dir(trial.prepared)
    resolved = {**sweep.document.data, "sweep": plain(sweep.section)}
    resolved.pop("seeds", None)
    if resolved["store"] == default_store(str(resolved["run_dir"])):
        del resolved["store"]  # so that a run directory can be moved
    text = f"# From {sweep.source}; every trial's own, with all defaults, is in trials/.\n"
    text += yaml.safe_dump(resolved, sort_keys=False, width=110)
    try:
        write_atomically(sweep.run_dir / CONFIG_FILE, text.encode())
    except StoreError as error:
        raise ConfigError(f"run_dir: {error.message}") from error
