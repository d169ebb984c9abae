"""Everything that is wrong with a configuration, at once: each section on its own, then rules that span several.

No rule here looks at the data.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cache_store.errors import ConfigError, UserError
from orchestrator.config.messages import validated
from orchestrator.config.precision import settle
from orchestrator.config.rules import base, blocks, gangs, judged, losses, measured, models
from orchestrator.config.schema import (
    MEMORY,
    OVERRIDES,
    Config,
    Regime,
    config_class,
    config_of,
    fill_in,
    merge,
    plain,
    training_of,
    validate,
)
from orchestrator.config.yaml_loader import Document, KeyPath, Problem, raise_problems
from workers.domains.planning import AnyData
from workers.models.base import Finding
from workers.models.registry import DEFAULT
from workers.specs.experiment import TrainSpec
from workers.specs.memory import MemorySpec


@dataclass(frozen=True)
class Checked:
    """A configuration after all checks that need no data."""

    document: Document
    problems: tuple[Problem, ...]
    #: None where too much is wrong to go on. It stands for what the file means only when there are no problems.
    config: Config | None
    #: Set whenever that section alone is sound.
    data: AnyData | None
    #: What the model's family found when it looked at the model, and whether it could.
    found: object | None
    inspected: bool

    def sound(self) -> Config:
        """The configuration. ConfigError with all problems when there are any."""
        return sound(self.document, self.problems, self.config)


def sound(
    document: Document, problems: Sequence[Problem], config: Config | None, kind: type[UserError] = ConfigError
) -> Config:
    """`config`, where nothing is wrong with it; else raise one error of this kind that lists every problem."""
    raise_problems(document.source, problems, kind)
    if config is None:
        raise ConfigError(f"{document.source}: cannot be read as a configuration")
    return config


def check(document: Document) -> Checked:
    """Find every problem that can be found without looking at the data."""
    findings: list[Finding] = []
    raw = copy.deepcopy(document.data)
    settle(raw)
    try:
        kind = config_of(document.data)
    except ConfigError as error:
        return _unknown_family(document, raw, error)
    fill_in(raw)
    config = validated(kind, raw, (), findings)
    found: object | None = None
    inspected = False
    if config is None:
        data = _section(kind.model_fields["data"].annotation, raw, "data")
    else:
        data = config.data
        resolved = _resolve_regimes(config, findings)
        found, wrong = _inspect(config)
        inspected = wrong is None
        findings += [*_rules(config, resolved, found, wrong), *gangs.problems(config)]
    return Checked(document, _all_problems(document, findings), config, data, found, inspected)


def _all_problems(document: Document, findings: Sequence[Finding]) -> tuple[Problem, ...]:
    """What reading the file found, then `findings`: of a key that could not be read nothing more is said."""
    unread = {problem.path for problem in document.problems if problem.path}
    further = document.located(finding for finding in findings if finding[0] not in unread)
    return tuple(dict.fromkeys((*document.problems, *further)))


def _unknown_family(document: Document, raw: Any, error: ConfigError) -> Checked:
    """What can be said of a file whose model is of no known family: nothing of its model and data."""
    findings: list[Finding] = []
    validated(config_class(DEFAULT), raw, (), findings)
    others = [finding for finding in findings if finding[0][:1] not in (("model",), ("data",))]
    problems = _all_problems(document, [models.finding_of(error), *others])
    return Checked(document, problems, None, None, None, inspected=False)


def _section(kind: Any, raw: Any, key: str) -> Any:
    """One section when it is sound on its own, else None."""
    try:
        return validate(kind, raw.get(key, {}))
    except ValidationError:
        return None


def _inspect(config: Config) -> tuple[object | None, ConfigError | None]:
    """What the model's family finds, or why it cannot look at the model."""
    try:
        return config.family.inspect(config.model), None
    except ConfigError as error:
        return None, error


def _rules(
    config: Config, regimes: Mapping[str, Regime], found: object | None, wrong: ConfigError | None
) -> Iterator[Finding]:
    """All rules. Those about the chain are left out where `wrong` says why there is none."""
    yield from config.domain.problems(config.data)
    yield from config.domain.loss_refusals(config.data, config.training)
    yield from base.stores(config)
    yield from base.pipelines(config)
    yield from base.variants(config)
    yield from base.yardstick(config)
    yield from base.trackers(config)
    yield from blocks.settings(config)
    yield from judged.problems(config)
    yield from measured.problems(config)
    if wrong is not None:
        yield models.finding_of(wrong)
    sample = config.domain.checked_sample(config.data)
    for regime in regimes.values():
        yield from models.refused(config, regime)
        yield from base.run_exit(config, regime)
        yield from losses.regime(config, regime)
        if wrong is None and sample is not None:
            yield from models.chain(config, regime, found, sample)
        yield from base.trainings(config, regime)
        yield from base.window(config, regime)
        yield from blocks.training(config, regime)
    if wrong is None:
        yield from config.family.data_problems(config.model, found, config.data)


def _resolve_regimes(config: Config, findings: list[Finding]) -> dict[str, Regime]:
    """Regimes with overrides merged in; wrong overrides are reported and left out."""
    resolved: dict[str, Regime] = {}
    for name, own in config.regimes.items():
        prefix: KeyPath = ("regimes", name)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            findings.append((prefix, "a regime's name has letters, digits, - and _ only"))
        values: dict[str, Any] = {}
        for key, kind in OVERRIDES.items():
            merged = merge(plain(getattr(config, key)), getattr(own, key))
            values[key] = validated(kind, merged, (*prefix, key), findings)
        stages: dict[str, Any] = {}
        for stage, override in own.stages.items():
            at: KeyPath = (*prefix, "stages", stage)
            merged = merge(plain(values["training"]), training_of(override))
            value = validated(TrainSpec, merged, at, findings)
            stages[stage] = plain(value) if value is not None else {}
            if MEMORY in override:
                merged = merge(plain(values["memory"]), override[MEMORY])
                memory = validated(MemorySpec, merged, (*at, MEMORY), findings)
                stages[stage][MEMORY] = plain(memory) if memory is not None else {}
        refusal = config.family.traits.can.head_convs
        if own.head_convs is not None and refusal is not None:
            findings.append(((*prefix, "head_convs"), refusal))
        resolved[name] = Regime(
            name,
            own.kind,
            config.model_of(own),
            stages=stages,
            pipeline=config.pipeline_of(own),
            variant=config.variant_of(own),
            blocks=config.blocks_of(own),
            **values,
        )
    return resolved
