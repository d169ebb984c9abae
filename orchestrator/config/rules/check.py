"""Everything that is wrong with a configuration, at once: each section on its own, then rules that span several.

No rule here looks at the data.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from orchestrator.config.messages import validated
from orchestrator.config.rules import gangs
from orchestrator.config.rules.images import ImageChecks
from orchestrator.config.rules.text import TextChecks
from orchestrator.config.schema import (
    OVERRIDES,
    Config,
    ImageConfig,
    Regime,
    TextConfig,
    config_kind,
    merge,
    plain,
    validate,
)
from orchestrator.config.yaml_loader import Document, KeyPath, Problem
from workers.specs.experiment import ImageSpec, ResNetSpec, TrainSpec
from workers.specs.language import TextSpec

if TYPE_CHECKING:
    from workers.models.causal_lm.outline import LMOutline
    from workers.models.outline import ChainOutline


@dataclass(frozen=True)
class Checked:
    """A configuration after all checks that need no data. `config` is None where too much is wrong to go on;
    it stands for what the file means only when `problems` is empty. `data` is set whenever that section alone
    is sound, `outlines` for every regime of images whose chain is possible."""

    document: Document
    config: Config | None
    data: ImageSpec | TextSpec | None
    outlines: dict[str, ChainOutline]
    #: What the checkpoint of a language model is, when it could be looked at.
    language: LMOutline | None
    problems: list[Problem]


def check(document: Document) -> Checked:
    """Every problem that can be found without looking at the data."""
    problems = list(document.problems)
    raw = copy.deepcopy(document.data)
    kind = config_kind(document.data)
    config = validated(kind, raw, document, (), problems)
    data = (
        config.data if config is not None else _section(TextSpec if kind is TextConfig else ImageSpec, document, "data")
    )
    outlines: dict[str, ChainOutline] = {}
    language: LMOutline | None = None
    if config is not None:
        resolved = _resolve_regimes(config, document, problems)
        if isinstance(config, TextConfig):
            language = TextChecks(config, document, problems).run(resolved)
        elif isinstance(config, ImageConfig):
            outlines = ImageChecks(config, document, problems).run(resolved)
        problems += [document.problem(path, message) for path, message in gangs.problems(config)]
    return Checked(document, config, data, outlines, language, list(dict.fromkeys(problems)))


def _section(kind: type[Any], document: Document, key: str) -> Any:
    """One section when it is sound on its own, else None."""
    try:
        return validate(kind, document.data.get(key, {}))
    except ValidationError:
        return None


def _resolve_regimes(config: Config, document: Document, problems: list[Problem]) -> dict[str, Regime]:
    """Regimes with overrides merged in; wrong overrides are reported and left out."""
    resolved: dict[str, Regime] = {}
    for name, own in config.regimes.items():
        prefix: KeyPath = ("regimes", name)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            problems.append(document.problem(prefix, "a regime's name has letters, digits, - and _ only"))
        values: dict[str, Any] = {}
        for key, kind in OVERRIDES.items():
            merged = merge(plain(getattr(config, key)), getattr(own, key))
            values[key] = validated(kind, merged, document, (*prefix, key), problems)
        stages: dict[str, Any] = {}
        for stage, override in own.stages.items():
            merged = merge(plain(values["training"]), override)
            value = validated(TrainSpec, merged, document, (*prefix, "stages", stage), problems)
            stages[stage] = plain(value) if value is not None else {}
        model = config.model
        if own.head_convs is not None:
            if isinstance(model, ResNetSpec):
                model = dataclasses.replace(model, head_convs=own.head_convs)
            else:
                problems.append(document.problem((*prefix, "head_convs"), "is for ResNets; a decoder has split.head"))
        resolved[name] = Regime(name, own.kind, model, stages=stages, pipeline=config.pipeline_of(own), **values)
    return resolved
