"""A configuration file as a `Config`: what it leaves out filled in, every problem raised at once.

Everything about configurations is imported from here; `sections` has what they may say, `checks` the rules,
`explain` the words, `compatible` what a run directory tolerates.
"""

from __future__ import annotations

import copy
import json
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.checks import Checked, check
from orchestrator.compatible import compatible
from orchestrator.explain import fields_of, show
from orchestrator.sections import (
    OVERRIDES,
    Config,
    EvaluationConfig,
    ImageConfig,
    Regime,
    RegimeConfig,
    ResourceConfig,
    SnapshotConfig,
    SplitConfig,
    TextConfig,
    default_store,
    parse_size,
)
from orchestrator.stages import Kind
from orchestrator.sweep_section import Draw
from orchestrator.yaml_loader import Document, KeyPath, apply_overrides, load_document, raise_problems
from workers.specs.experiment import Precision

__all__ = [
    "Checked",
    "Config",
    "EvaluationConfig",
    "ImageConfig",
    "Precision",
    "Regime",
    "RegimeConfig",
    "ResourceConfig",
    "SnapshotConfig",
    "SplitConfig",
    "TextConfig",
    "check",
    "compatible",
    "default_store",
    "load",
    "parse_size",
    "read_document",
    "with_values",
]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `a.b.c=value` overrides applied.

    Raises ConfigError that lists every problem: line, key, value, what is allowed, the nearest known key."""
    checked = check(read_document(path, overrides))
    raise_problems(checked.document.source, checked.problems)
    assert checked.config is not None
    return checked.config


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """The file with defaults that depend on its name, and its `regimes` as a mapping."""
    document = load_document(path)
    _name_regimes(document)
    _nest_parameters(document)
    apply_overrides(document, overrides)
    _name_regimes(document)
    _flatten_parameters(document)
    data = document.data
    for key in fields_of(Config):
        # An empty section (`training:` and nothing below) means its defaults, not null.
        if key in data and data[key] is None:
            del data[key]
    if "run" not in data:
        data["run"] = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).stem).lstrip("._-") or "run"
    data.setdefault("run_dir", f"runs/{data['run']}")
    data.setdefault("store", default_store(str(data["run_dir"])))
    return document


def with_values(document: Document, values: Mapping[str, Any], word: str) -> Document:
    """A copy without the `sweep` section and with these keys set, dotted -> value; problems with them begin with
    `word`."""
    changed = copy.deepcopy(document)
    changed.data.pop("sweep", None)
    apply_overrides(changed, [f"{key}={json.dumps(value)}" for key, value in values.items()], word)
    _name_regimes(changed)
    return changed


def _nest_parameters(document: Document) -> None:
    """`sweep.parameters` with `{split.base: {grid: [1]}}` as `{split: {base: {grid: [1]}}}`, which is how an override
    of `sweep.parameters.split.base.grid` finds it."""
    parameters = _parameters(document)
    if parameters is None:
        return
    for key in [key for key in parameters if "." in key]:
        *sections, last = key.split(".")
        value, here = parameters.pop(key), parameters
        for word in sections:
            here = here.setdefault(word, {}) if isinstance(here, dict) else {}
        if last in here:
            document.problems.append(document.problem((*_PARAMETERS, key), "is named twice"))
            continue
        here[last] = value
        _move(document, (*_PARAMETERS, key), (*_PARAMETERS, *sections, last))


def _flatten_parameters(document: Document) -> None:
    """And back: a mapping with a kind of values among its keys, or whatever is no mapping, is a parameter's own."""
    parameters = _parameters(document)
    if parameters is None:
        return
    flat: dict[str, Any] = {}

    def walk(value: Any, words: tuple[str, ...]) -> None:
        inner = isinstance(value, dict) and not set(value) & set(Draw.model_fields)
        if inner and any(isinstance(item, dict) for item in value.values()):
            for key, item in value.items():
                walk(item, (*words, key))
            return
        if words:
            _move(document, (*_PARAMETERS, *words), (*_PARAMETERS, ".".join(words)))
            flat[".".join(words)] = value

    walk(parameters, ())
    document.data["sweep"]["parameters"] = flat


_PARAMETERS: KeyPath = ("sweep", "parameters")


def _parameters(document: Document) -> dict[str, Any] | None:
    sweep = document.data.get("sweep")
    parameters = sweep.get("parameters") if isinstance(sweep, dict) else None
    return parameters if isinstance(parameters, dict) else None


def _move(document: Document, old: KeyPath, new: KeyPath) -> None:
    """Lines and origins of a key and what is below it."""
    lines = {(*new, *path[len(old) :]): line for path, line in document.lines.items() if path[: len(old)] == old}
    origins = {(*new, *path[len(old) :]): text for path, text in document.origins.items() if path[: len(old)] == old}
    document.lines.update(lines)
    document.origins.update(origins)


def _name_regimes(document: Document) -> None:
    """`[e2e, lw]` -> `{e2e: {kind: e2e}, lw: {kind: lw}}`; `kind` is by default the regime's name."""
    regimes = document.data.get("regimes")
    if regimes is None:
        document.data["regimes"] = {kind: {"kind": kind} for kind in ("e2e", "lw", "segprop")}
        return
    if isinstance(regimes, list):
        mapping: dict[str, Any] = {}
        for index, name in enumerate(regimes):
            path: KeyPath = ("regimes", index)
            if not isinstance(name, str):
                document.problems.append(document.problem(path, f"{show(name)}: must be a regime's name"))
            elif name in mapping:
                document.problems.append(document.problem(path, f"{name!r} is listed twice"))
            else:
                mapping[name] = {}
                if path in document.lines:
                    document.lines[("regimes", name)] = document.lines[path]
                if path in document.origins:
                    document.origins[("regimes", name)] = document.origins[path]
        document.data["regimes"] = regimes = mapping
    if isinstance(regimes, dict):
        for name, settings in regimes.items():
            if settings is None:
                regimes[name] = settings = {}
            if isinstance(settings, dict):
                for key in [key for key, value in settings.items() if value is None and key in OVERRIDES]:
                    del settings[key]
                if "kind" not in settings and name in typing.get_args(Kind):
                    settings["kind"] = name
