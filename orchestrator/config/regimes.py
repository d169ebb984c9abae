"""Bring the `regimes` section into its full form: names, kinds, parameters as nested keys; and say which of them the
others are compared with."""

from __future__ import annotations

import dataclasses
from typing import Any

from orchestrator.config.messages import show
from orchestrator.config.schema import OVERRIDES, Config
from orchestrator.config.sweep_schema import Draw
from orchestrator.config.yaml_loader import Document, KeyPath
from orchestrator.regimes.table import REGIMES


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
    """`[e2e, lw]` -> `{e2e: {kind: e2e}, lw: {kind: lw}}`, and `e2e` alone likewise; `kind` is by default the regime's
    name."""
    regimes = document.data.get("regimes")
    if regimes is None:
        document.data["regimes"] = {kind: {"kind": kind} for kind, row in REGIMES.items() if row.by_default}
        return
    if isinstance(regimes, str):
        document.data["regimes"] = regimes = {regimes: {}}
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
                if "kind" not in settings and name in REGIMES:
                    settings["kind"] = name


def yardstick_of(config: Config) -> str | None:
    """Name the regime that the others are compared with: as the configuration says, else the end-to-end regime without
    training or split of its own, else the first one; None where there is no such regime."""
    if config.evaluation.yardstick is not None:
        return config.evaluation.yardstick
    whole = [name for name, regime in config.regimes.items() if REGIMES[regime.kind].baseline]
    plain = [
        name
        for name, regime in ((name, config.regime(name)) for name in whole)
        # A budget gives every regime epochs of its own.
        if dataclasses.replace(regime.training, epochs=config.training.epochs) == config.training
        and regime.split == config.split
    ]
    return next(iter((*plain, *whole)), None)
