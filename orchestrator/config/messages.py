"""Raw settings as a section, or what is wrong with them in words: the key, its value, what is allowed there."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from cache_store.storage.addresses import redacted
from cache_store.suggest import did_you_mean, nearest
from orchestrator.config.schema import OVERRIDES, Config, RegimeConfig, validate
from orchestrator.config.values import OneOf
from orchestrator.config.yaml_loader import MAX_LISTED, KeyPath, key_text
from workers.models.base import Finding
from workers.specs.experiment import TrainSpec

T = TypeVar("T")

# What Hugging Face's Trainer, Lightning, Axolotl and LLaMA-Factory call a setting, and where it stands here.
WORDS_ELSEWHERE = {
    "learning_rate": "training.optimizer.lr",
    "optim": "training.optimizer.name",
    "adam_beta1": "training.optimizer.betas",
    "adam_beta2": "training.optimizer.betas",
    "adam_epsilon": "training.optimizer.eps",
    "lr_scheduler": "training.schedule.name",
    "lr_scheduler_type": "training.schedule.name",
    "warmup_steps": "training.schedule.warmup, a share of the steps",
    "warmup_ratio": "training.schedule.warmup",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "max_epochs": "training.epochs",
    "max_steps": "training.exit.steps, the most steps of a stage",
    "train_batch_size": "training.batch_size",
    "per_device_train_batch_size": "training.micro_batch, and training.batch_size for the samples of an optimizer step",
    "micro_batch_size": "training.micro_batch",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "eval_batch_size": "evaluation.batch_size",
    "gradient_accumulation_steps": "training.accumulate",
    "accumulate_grad_batches": "training.accumulate",
    "max_grad_norm": "training.clip",
    "gradient_clip_val": "training.clip",
    "gradient_checkpointing": "training.activation_checkpointing",
    "label_smoothing_factor": "training.label_smoothing",
    "torch_compile": "training.compile",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "save_steps": "training.checkpoint_every_s, in seconds",
    "lora_r": "training.lora.rank",
    "lora_alpha": "training.lora.alpha",
    "lora_target_modules": "training.lora.targets",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "output_dir": "run_dir",
    "max_length": "data.sequence_length",
    "max_seq_length": "data.sequence_length",
    "sequence_len": "data.sequence_length",
    "cutoff_len": "data.sequence_length",
    "val_set_size": "data.validation",
}
# Texts that YAML would have read as the number that is wanted, had they not been quoted.
_UNQUOTED = {"int": re.compile(r"[-+]?[0-9]+"), "float": re.compile(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")}
_NOTHING = re.compile(r"(?!)")


def validated(kind: type[T], raw: Any, prefix: KeyPath, findings: list[Finding]) -> T | None:
    """Read `raw`, which stands at `prefix`, as `kind`. What is wrong is appended to `findings` and taken out of `raw`,
    so that later checks still see the rest with defaults in its place. None when that does not help."""
    pruned: set[KeyPath] = set()
    for _ in range(5):
        try:
            value: T = validate(kind, raw)
            return value
        except ValidationError as error:
            found = list(_explain(error, raw, kind, prefix))
            # What was taken out in an earlier round is not missing from the file, and what held it is not too short.
            held = {known[:depth] for known in pruned for depth in range(1, len(known) + 1)}
            findings += [((*prefix, *path), message) for path, message in found if path not in held]
            # Where something needed is missing, the section around it goes: a regime without a kind.
            doomed = [path if _has(raw, path) else path[:-1] for path, _ in found]
            pruned.update((*doomed, *(path for path, _ in found)))
            for path in doomed:
                _prune(raw, path)
    return None


def _explain(error: ValidationError, raw: Any, kind: type[Any], prefix: KeyPath) -> Iterator[Finding]:
    """One finding per key, with the key's path inside `raw`. Alternatives of a union are joined by `or`."""
    hinted = 0
    grouped: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        grouped.setdefault(_real_path(item["loc"], raw, item["type"]), []).append(item)
    for path, items in grouped.items():
        first = items[0]
        value = _at(raw, path)
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            # Names are compared for those alone that may be listed: of 20,000 that took longer than everything else.
            message = "unknown key" + (_suggest_key(kind, path, prefix) if hinted < MAX_LISTED else "")
            hinted += 1
        elif first["type"] in ("missing", "missing_argument"):
            message = "is required" + _allowed_values(kind, path)
        elif first["type"] in ("dataclass_type", "model_type", "dict_type", "model_attributes_type"):
            message = f"{show(value)}: must be a section with keys of its own{_as_section(kind, path, value)}"
        else:
            message = f"{show(value)}: {' or '.join(dict.fromkeys(_wording(item, value) for item in items))}"
        yield path, message


def _real_path(loc: tuple[str | int, ...], raw: Any, kind: str) -> KeyPath:
    """The error's location without the names of union members that pydantic puts into it."""
    path: list[str | int] = []
    here = raw
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        inside_list = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if inside_list or (isinstance(here, dict) and part in here):
            path.append(part)
            here = here[part]
        elif last and kind.startswith("missing") and isinstance(here, dict | list):
            path.append(part)
    return tuple(path)


def _wording(item: Any, value: Any) -> str:
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    message: str = item["msg"].replace("Input should be", "must be")
    if item["type"].startswith("bool"):
        return "must be true or false"
    if isinstance(value, str) and _UNQUOTED.get(item["type"].split("_")[0], _NOTHING).fullmatch(value):
        return f"{message[:1].lower()}{message[1:]}; write {value} without quotes"
    if item["type"] == "string_pattern_mismatch":
        return "must start with a letter or digit and hold only letters, digits, '.', '-' and '_'"
    if item["type"] == "literal_error" and isinstance(value, str):
        choices = re.findall(r"'([^']*)'", message)
        message += did_you_mean(value, choices)
    return message[:1].lower() + message[1:]


def _as_section(kind: type[Any], path: KeyPath, value: Any) -> str:
    """How a plain value is written as the section that should stand there: `; write {name: cosine}`."""
    fields = fields_of(_kind_at(kind, path))
    if not fields or not isinstance(value, str):
        return ""
    if "name" not in fields:
        return f": {', '.join(fields)}"
    names = [str(name) for name in typing.get_args(fields["name"])]
    name = value if value in names else nearest(value, names)
    return f"; write {{name: {name}}}" if name else f"; write {{name: …}}, one of {', '.join(names)}"


def _suggest_key(kind: type[Any], path: KeyPath, prefix: KeyPath) -> str:
    """Where an unknown key belongs: under the same name further down, close by in spelling, as another program's word
    for one of ours, or anywhere in a file."""
    wrong = str(path[-1])
    here = _kind_at(kind, path[:-1])
    siblings = list(fields_of(here))
    below = _first_keys(here).get(wrong)
    if below is not None:
        return f"; did you mean {key_text((*prefix, *path[:-1], *below))}?"
    if wrong in WORDS_ELSEWHERE:
        return f"; here it is {WORDS_ELSEWHERE[wrong]}"
    close = nearest(wrong, siblings)
    if close is not None:
        return f"; did you mean {close}?"
    elsewhere = _first_keys(Config).get(wrong)
    if elsewhere is not None:
        return f"; did you mean {key_text(elsewhere)}?"
    return f"; allowed here: {', '.join(siblings)}" if siblings else ""


def _allowed_values(kind: type[Any], path: KeyPath) -> str:
    section, name = _kind_at(kind, path[:-1]), str(path[-1])
    hint = fields_of(section).get(name)
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else _table_names(section, name)
    # A regime of a misspelt name has no kind.
    close = did_you_mean(str(path[-2]), map(str, choices)) if len(path) > 1 else ""
    return f"; one of {', '.join(map(str, choices))}{close}" if choices else ""


def _table_names(section: Any, name: str) -> tuple[str, ...]:
    """What a field allows that takes its values from a table; () for others."""
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return ()
    tables = [item.table for item in section.model_fields[name].metadata if isinstance(item, OneOf)]
    return tuple(name for table in tables for name in table)


@cache
def fields_of(kind: Any) -> dict[str, Any]:
    """Keys of a section and their types (without bounds)."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {}


def _kind_at(kind: Any, path: KeyPath) -> Any:
    for index, part in enumerate(path):
        if kind is RegimeConfig and part in OVERRIDES:
            kind = OVERRIDES[str(part)]
            continue
        if kind is RegimeConfig and part == "stages":
            return TrainSpec if index + 1 < len(path) else None
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            continue
        kind = _section_of(fields_of(kind).get(str(part)))
    return kind


def _section_of(hint: Any) -> Any:
    """The section among the alternatives of a field that may also be left out or say it in a word."""
    if isinstance(hint, types.UnionType):
        return next((member for member in typing.get_args(hint) if fields_of(member)), None)
    return hint


@cache
def _first_keys(kind: Any) -> dict[str, KeyPath]:
    """Last word of a key -> the first key of a section that ends in it."""
    found: dict[str, KeyPath] = {}
    for key in _all_keys(kind):
        found.setdefault(str(key[-1]), key)
    return found


def _all_keys(kind: Any, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for name, hint in fields_of(kind).items():
        yield (*prefix, name)
        yield from _all_keys(_section_of(hint), (*prefix, name))


def _at(raw: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _has(raw: Any, path: KeyPath) -> bool:
    parent = _at(raw, path[:-1])
    return isinstance(parent, list) or (isinstance(parent, dict) and bool(path) and path[-1] in parent)


def _prune(raw: Any, path: KeyPath) -> None:
    """Take the key at `path` out; inside a list, take out the key that holds the list."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    if not path:
        return
    parent = _at(raw, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def show(value: Any) -> str:
    """A value as a message quotes it, without credentials where it is an address that holds some."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else redacted(value)
    if not text.strip() or not text.isprintable():
        text = json.dumps(text)
    return text if len(text) <= 80 else text[:77] + "..."
