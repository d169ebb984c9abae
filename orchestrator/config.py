"""A configuration file as a `Config`: what it leaves out filled in, every problem raised at once.

Everything about configurations is imported from here; `sections` has what they may say, `checks` the rules,
`explain` the words, `compatible` what a run directory tolerates.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
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
from orchestrator.yaml_loader import Document, KeyPath, apply_overrides, load_document, raise_problems
from workers.specs import Precision

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
    apply_overrides(document, overrides)
    _name_regimes(document)
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
