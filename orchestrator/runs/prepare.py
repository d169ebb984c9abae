"""From a configuration file to something that can run: the edge where files are looked at.

Everything that can be wrong with the input is found here, before anything starts: the configuration, the data
set, the file of initial weights, the run directory and the space for snapshots.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cache_store.errors import ConfigError, UserError
from cache_store.records.nodes import NodeStore
from cache_store.storage.durable import write_atomically
from cache_store.storage.open import existing_storage
from orchestrator.config import load as configuration
from orchestrator.config.rates import Rates
from orchestrator.config.rules import ray_jobs
from orchestrator.config.schema import Config, ImageConfig
from orchestrator.config.yaml_loader import Document, KeyPath, Problem, parse_document, raise_problems
from orchestrator.plan.builder import build_plan
from orchestrator.plan.experiment import rows_of, tokens_a_sample
from orchestrator.plan.graph import Plan
from orchestrator.units import human_bytes
from workers.specs.experiment import ImageSpec, ResNetSpec
from workers.specs.language import CausalLMSpec, TextSpec
from workers.specs.results import MeasuredCosts, MeasureResult

if TYPE_CHECKING:
    from workers.data.images.outline import DataOutline
    from workers.data.text.inspect import TextOutline
    from workers.models.causal_lm.outline import LMOutline
    from workers.models.outline import ChainOutline

    AnyData = ImageSpec | TextSpec
    AnyOutline = DataOutline | TextOutline

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Prepared:
    """All that a driver needs to know. `source`: the configuration file as it was named."""

    source: str
    config: Config
    data: AnyOutline
    #: The checkpoint of a language model.
    language: LMOutline | None
    plan: Plan
    #: The plan again, with what measure nodes found (node id -> figures).
    replan: Callable[[Mapping[str, MeasuredCosts]], Plan] = field(repr=False, compare=False)

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)


def prepare(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    inspect: Callable[[AnyData, int], AnyOutline] | None = None,
) -> Prepared:
    """Check everything and make the plan. Raises ConfigError (or DataError, when the data set is the only
    problem) with all problems at once. `inspect` stands in for looking at the data set."""
    return prepare_document(configuration.read_document(path, overrides), inspect=inspect)


def prepare_document(source: Document, *, inspect: Callable[[AnyData, int], AnyOutline] | None = None) -> Prepared:
    """As `prepare`, of a file that was read already."""
    checked = configuration.check(source)
    document, config, problems = checked.document, checked.config, list(checked.problems)
    data: AnyOutline | None = None
    kind: type[UserError] = ConfigError
    if checked.data is not None:
        try:
            data = (inspect or look_at_data)(checked.data, config.seed if config is not None else 0)
        except UserError as error:
            found = _data_problems(error, document, problems)
            kind = ConfigError if problems else type(error)
            problems += found
    weights_digest = checked.language.weights_digest if checked.language is not None else None
    if isinstance(config, ImageConfig) and config.model.weights is not None:
        try:
            weights_digest = _file_digest(config.model.weights)
        except OSError as error:
            message = f"{config.model.weights}: {error.strerror or error}"
            problems.append(document.problem(("model", "weights"), message))
    if config is not None and data is not None:
        problems += _row_problems(config, data, document)
    if config is not None:
        problems += ray_jobs.problems(config, document, Path.cwd())
    raise_problems(document.source, problems, kind)
    assert config is not None
    assert data is not None
    outlines = _outlines(config, data, checked.language)

    def replan(figures: Mapping[str, MeasuredCosts]) -> Plan:
        return build_plan(
            config,
            outlines,
            data,
            language=checked.language,
            weights_digest=weights_digest,
            rates=_rates(config),
            on_host=not _on_gpu(config),
            figures=figures,
        )

    try:
        plan = replan({})
        if plan.unmeasured:
            # Measured once in the life of a store: every invocation, wherever it runs, decides by the same figures.
            plan = replan(measured_figures(config.store, plan))
    except ConfigError as error:
        raise_problems(document.source, [document.problem(("snapshots", "budget"), error.message)])
        raise
    return Prepared(document.source, config, data, checked.language, plan, replan)


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


def _outlines(config: Config, data: AnyOutline, language: LMOutline | None) -> dict[str, ChainOutline]:
    """The chain of every regime, for one sample."""
    if language is not None:
        from workers.models.causal_lm.outline import lm_chain

        chain: ChainOutline = lm_chain(language, tokens_a_sample(config, data))
        return dict.fromkeys(config.regimes, chain)
    from workers.models.registry import outline

    assert isinstance(config, ImageConfig)
    found = {}
    for name in config.regimes:
        model = config.regime(name).model
        assert isinstance(model, ResNetSpec)
        found[name] = outline(model, config.data.image_size, data.classes)  # type: ignore[union-attr]
    return found


def look_at_data(data: AnyData, seed: int) -> AnyOutline:
    """What the data set is, from its files."""
    if isinstance(data, TextSpec):
        from workers.data.text.inspect import inspect_text

        return inspect_text(data, seed)
    from workers.data.images.inspect import inspect

    return inspect(data)


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


def _row_problems(config: Config, data: AnyOutline, document: Document) -> list[Problem]:
    if not isinstance(config, ImageConfig):
        return []  # text says so itself
    rows = rows_of(config, data)
    if rows.validation >= 1 and rows.train >= 1:
        return []
    left = "validate" if rows.validation < 1 else "train"
    message = (
        f"{config.data.validation:g}: of {rows.train + rows.validation} training samples, leaves none to {left} on"
    )
    return [document.problem(("data", "validation"), message)]


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rates(config: Config) -> Rates:
    """As `Config.rates`, with a look at this machine where the configuration leaves the device open."""
    if config.resources.gflops == "auto" and config.resources.device == "auto" and _has_gpu():
        return Rates.nominal("cuda")
    return config.rates()


def _on_gpu(config: Config) -> bool:
    device = config.resources.device
    return device == "cuda" or (device == "auto" and _has_gpu())


def _has_gpu() -> bool:
    # Asking torch would take seconds; a wrong guess changes nothing but predicted times.
    return os.path.exists("/dev/nvidia0") and os.environ.get("CUDA_VISIBLE_DEVICES", "0") != ""


def claim_run_dir(prepared: Prepared) -> None:
    """Make the run directory and write the resolved configuration into it.

    Raises ConfigError, leaving everything as it was, when there are no weights to start from, when the directory holds
    another configuration or cannot be written, or when the disk has no room for the snapshots."""
    _check_weights(prepared)
    run_dir, resolved = prepared.run_dir, prepared.config.resolved()
    target = run_dir / CONFIG_FILE
    try:
        existing = target.read_text() if target.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run_dir: {target} cannot be read: {error}") from error
    if existing is not None:
        held = parse_document(existing, str(target))
        conflicts = configuration.compatible(held.data, resolved)
        if held.problems or conflicts:
            listing = "\n".join(f"  {key}" for key in conflicts or [str(problem) for problem in held.problems])
            raise ConfigError(
                f"run_dir: {run_dir} holds another configuration; nothing was started. "
                f"It differs in:\n{listing}\n"
                f"Choose another directory with run_dir=...; with store={prepared.config.store} "
                "it still reuses what is unchanged.",
                conflicts=conflicts,
            )
    check_space(prepared)
    text = f"# Resolved from {prepared.source}: every setting, defaults included.\n"
    text += yaml.safe_dump(resolved, sort_keys=False, width=110)
    if text == existing:
        return
    try:
        write_atomically(target, text.encode())
    except OSError as error:
        raise ConfigError(f"run_dir: {run_dir} cannot be written: {error.strerror or error}") from error


def _check_weights(prepared: Prepared) -> None:
    """A checkpoint's configuration is enough to plan with, not to train."""
    language, config = prepared.language, prepared.config
    if language is not None and isinstance(config.model, CausalLMSpec):
        path = config.model.path
        if path is not None and not language.has_weights:
            raise ConfigError(
                f"model.path: {path} has a config.json but no weights: it can be planned for (--dry-run), not trained; "
                "allowed: a folder with *.safetensors, or without model.path random weights for model.config",
                path=path,
            )


def check_space(prepared: Prepared) -> None:
    """ConfigError when the disk has no room for the snapshots of the plan."""
    needed = prepared.plan.peak_snapshot_bytes
    store = prepared.config.store.removeprefix("file://")
    if not needed or "://" in store:
        return
    folder = Path(store).absolute()
    # What is there already is part of what is needed.
    held = sum(file.stat().st_size for file in folder.glob("sets/*/shards/*") if file.is_file())
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free + held:
        raise ConfigError(
            f"snapshots need about {human_bytes(needed)} at one time, {folder} has {human_bytes(free)} free; "
            "set snapshots.budget, lower data.views, or choose another store",
            needed=needed,
            free=free,
        )
