"""A configuration file as a `Config`: what it leaves out filled in, every problem raised at once.

Everything about configurations is imported from here; `schema` has what they may say, `rules` the rules,
`messages` the words, `compatibility` what a run directory tolerates.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.compatibility import compatible
from orchestrator.config.messages import fields_of
from orchestrator.config.regimes import _flatten_parameters, _name_regimes, _nest_parameters
from orchestrator.config.resources import ResourceConfig
from orchestrator.config.rules.check import Checked, check
from orchestrator.config.schema import (
    Config,
    EvaluationConfig,
    Regime,
    RegimeConfig,
    SnapshotConfig,
    SplitConfig,
)
from orchestrator.config.values import default_store, parse_size
from orchestrator.config.yaml_loader import Document, apply_overrides, load_document, parse_document
from workers.specs.experiment import Precision

__all__ = [
    "Checked",
    "Config",
    "EvaluationConfig",
    "Precision",
    "Regime",
    "RegimeConfig",
    "ResourceConfig",
    "SnapshotConfig",
    "SplitConfig",
    "check",
    "compatible",
    "default_store",
    "document_of",
    "load",
    "parse_size",
    "read_document",
    "with_values",
]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with `a.b.c=value` overrides applied.

    Raises ConfigError that lists every problem: line, key, value, what is allowed, the nearest known key."""
    return check(read_document(path, overrides)).sound()


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> Document:
    """The file with defaults that depend on its name, and its `regimes` as a mapping."""
    return _completed(load_document(path), Path(path), overrides)


def document_of(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Document:
    """A configuration given as a mapping, as if it were a file in the current directory."""
    text = yaml.safe_dump(dict(values), sort_keys=False)
    return _completed(parse_document(text, "configuration"), Path("run"), overrides)


def _completed(document: Document, path: Path, overrides: Sequence[str]) -> Document:
    _name_regimes(document)
    _nest_parameters(document)
    apply_overrides(document, overrides)
    _name_regimes(document)
    _flatten_parameters(document)
    data = document.data
    training = data.get("training")
    loss = training.get("loss") if isinstance(training, dict) else None
    for section in (data.get("model"), data.get("data"), loss):
        _look_beside(section, path.parent)
    for key in fields_of(Config):
        # An empty section (`training:` and nothing below) means its defaults, not null.
        if key in data and data[key] is None:
            del data[key]
    if "run" not in data:
        data["run"] = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "run"
    data.setdefault("run_dir", f"runs/{data['run']}")
    data.setdefault("store", default_store(str(data["run_dir"])))
    return document


def _look_beside(section: Any, folder: Path) -> None:
    """Let a function of the user's be looked for in the folder of the configuration that names it."""
    if isinstance(section, dict) and isinstance(section.get("build"), str) and section.get("path") is None:
        section["path"] = str(folder)


def with_values(document: Document, values: Mapping[str, Any], word: str) -> Document:
    """A copy that is no sweep, with these keys set, dotted -> value; problems with them begin with `word`."""
    changed = copy.deepcopy(document)
    changed.data.pop("sweep", None)
    changed.data.pop("seeds", None)
    apply_overrides(changed, [f"{key}={json.dumps(value)}" for key, value in values.items()], word)
    _name_regimes(changed)
    return changed
