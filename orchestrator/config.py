"""The configuration: what it may say, what it means, and everything that is wrong with one, at once.

`load` reads a file and returns a `Config`; `Config.regime(name)` is a regime with every override resolved.
Sections that travel to workers are the dataclasses of `workers.specs`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from cache_store.errors import ConfigError
from orchestrator.estimate import Rates
from orchestrator.stages import Kind, Stage, layout
from orchestrator.yaml_loader import (
    Document,
    KeyPath,
    Problem,
    apply_overrides,
    key_text,
    load_document,
    raise_problems,
)
from workers.models.outline import ChainOutline, outline
from workers.specs import DataSpec, ModelSpec, Precision, SnapshotDtype, TrainSpec, to_json

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?)B", re.IGNORECASE)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(value: Any) -> Any:
    """Bytes as a number, or text such as `20GB`, `32 MiB`."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("must be bytes as a whole number, or text such as 20GB or 32MiB")
    number, unit = match.groups()
    base = 1024 if unit.lower().endswith("i") else 1000
    return int(float(number) * base ** _UNITS[unit.lower().rstrip("i")])


Bytes = Annotated[int, BeforeValidator(parse_size), Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitConfig(Section):
    """How the chain is cut into base prefix, intermediate blocks and global head."""

    base: int = Field(default=1, ge=1, description="p: blocks 0..p-1 are trained first, together with the global head.")
    head: int = Field(default=0, ge=0, description="r: the global head is the last r blocks and the head itself.")
    segment_size: int = Field(default=1, ge=1, description="Blocks that are trained together in one stage.")
    intermediate: Literal["omit", "frozen"] = Field(
        default="omit",
        description="Blocks between the current segment and the global head: bridged by an adapter, or kept "
        "in the path without being trained (for pretrained models).",
    )
    train_base: bool = Field(
        default=True,
        description="false: the base is taken as it comes, stage 1 trains the global head alone.",
    )


class SnapshotConfig(Section):
    """Frozen prefix activations: whether they are stored, and how."""

    mode: Literal["auto", "always", "never"] = Field(
        default="auto", description="auto: stored where that saves forward work and fits the budget."
    )
    dtype: SnapshotDtype = Field(default="auto", description="auto: the type the training precision computes in.")
    group_rows: int = Field(default=256, ge=1, description="Samples that go through the frozen prefix together.")
    shard_bytes: Bytes = Field(default=32 << 20, description="Size of a shard, rounded down to whole groups.")
    budget: Bytes | None = Field(
        default=None,
        description="Most snapshot bytes alive at one time, e.g. 20GB; shared evenly by the regimes that "
        "store. None: the free space.",
    )
    retention: Literal["release", "keep"] = Field(
        default="release", description="release: a set is dropped when its last reader has committed."
    )


class ResourceConfig(Section):
    """Where the work runs. Nothing here changes a result, so a run may go on with other resources."""

    runner: Literal["ray", "local"] = Field(default="ray", description="local: in this process, one task at a time.")
    address: str | None = Field(default=None, description="Address of a running Ray cluster; None: start one here.")
    slots: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto",
        description="Tasks at one time; auto: one per GPU, or one per CPU core where there is none.",
    )
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default="auto", description="CPU threads of a task; auto: the cores divided by the slots."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one.")
    max_attempts: int = Field(default=3, ge=1, description="Attempts of a task before it counts as failed.")
    gflops: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        default="auto",
        description="Measured speed of one slot in GFLOP/s, for predicted times; auto: nominal figures.",
    )


class EvaluationConfig(Section):
    batch_size: int = Field(default=512, ge=1, description="Samples of one evaluation batch.")
    stages: bool = Field(default=True, description="Score the whole chain on validation after every stage.")


class RegimeConfig(Section):
    """One regime of the comparison. Every mapping is a partial override of the section of the same name."""

    kind: Kind = Field(description="e2e, lw or segprop; needed where the regime has another name.")
    head_convs: int | None = Field(default=None, ge=1, le=3, description="Overrides model.head_convs.")
    training: dict[str, Any] = Field(default_factory=dict, description="Overrides `training`.")
    split: dict[str, Any] = Field(default_factory=dict, description="Overrides `split`.")
    snapshots: dict[str, Any] = Field(default_factory=dict, description="Overrides `snapshots`.")
    stages: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Overrides `training` for single stages, by name (stage2-seg2) or by group (base, segments, head).",
    )


@dataclass(frozen=True)
class Regime:
    """One regime with everything resolved."""

    name: str
    kind: Kind
    model: ModelSpec
    split: SplitConfig
    training: TrainSpec
    snapshots: SnapshotConfig
    #: Partial overrides of `training` by stage name or group.
    stages: Mapping[str, Mapping[str, Any]]

    def layout(self, blocks: Sequence[str]) -> tuple[Stage, ...]:
        return layout(
            self.kind,
            blocks,
            base=self.split.base,
            head=self.split.head,
            segment_size=self.split.segment_size,
            frozen_intermediate=self.split.intermediate == "frozen",
            train_base=self.split.train_base,
        )

    def stage_training(self, stage: Stage) -> TrainSpec:
        """`training` for one stage: the override of its name wins over that of its group."""
        merged = to_json(self.training)
        for key in (stage.group, stage.name) if stage.group != stage.name else (stage.name,):
            merged = _merge(merged, self.stages.get(key, {}))
        spec: TrainSpec = _validate(TrainSpec, merged)
        return spec


class Config(Section):
    """A whole configuration."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name; default: the file's name.")
    run_dir: str = Field(min_length=1, description="Folder of the results; default: runs/<run>.")
    store: str = Field(min_length=1, description="Storage root, a folder or URI; default: <run_dir>/store.")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Every random choice derives from it.")
    model: ModelSpec
    data: DataSpec
    split: SplitConfig = Field(default_factory=SplitConfig)
    training: TrainSpec = Field(default_factory=TrainSpec)
    regimes: dict[str, RegimeConfig] = Field(
        min_length=1, description="Names out of e2e, lw, segprop, or name -> overrides. Default: all three."
    )
    snapshots: SnapshotConfig = Field(default_factory=SnapshotConfig)
    resources: ResourceConfig = Field(default_factory=ResourceConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    def regime(self, name: str) -> Regime:
        """The regime called `name`, resolved."""
        own = self.regimes[name]
        model = self.model if own.head_convs is None else dataclasses.replace(self.model, head_convs=own.head_convs)
        return Regime(
            name=name,
            kind=own.kind,
            model=model,
            split=_validate(SplitConfig, _merge(_plain(self.split), own.split)),
            training=_validate(TrainSpec, _merge(_plain(self.training), own.training)),
            snapshots=_validate(SnapshotConfig, _merge(_plain(self.snapshots), own.snapshots)),
            stages=own.stages,
        )

    def rates(self) -> Rates:
        """Speed of a slot for predicted times; without a measured figure `auto` counts as a CPU."""
        resources = self.resources
        if resources.gflops != "auto":
            return Rates.measured(resources.gflops)
        threads = resources.threads if resources.threads != "auto" else 1
        return Rates.nominal("cuda" if resources.device == "cuda" else "cpu", threads)

    def resolved(self) -> dict[str, Any]:
        """Every setting written out and loadable again: what `config.yaml` in a run directory holds."""
        dump: dict[str, Any] = {
            name: _plain(getattr(self, name)) for name in type(self).model_fields if name != "regimes"
        }
        if self.store == default_store(self.run_dir):
            del dump["store"]  # so that a run directory can be moved
        dump["regimes"] = {
            name: {
                "kind": regime.kind,
                "head_convs": regime.model.head_convs,
                "training": _plain(regime.training),
                "split": _plain(regime.split),
                "snapshots": _plain(regime.snapshots),
                "stages": _plain(regime.stages),
            }
            for name, regime in ((name, self.regime(name)) for name in self.regimes)
        }
        return dump


def default_store(run_dir: str) -> str:
    return f"{run_dir}/store"


# -- loading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A configuration after all checks that need no data. `config` is None where too much is wrong to go on;
    it stands for what the file means only when `problems` is empty. `data` is set whenever that section alone
    is sound, `outlines` for every regime whose chain is possible."""

    document: Document
    config: Config | None
    data: DataSpec | None
    outlines: dict[str, ChainOutline]
    problems: list[Problem]


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
    for key in _fields(Config):
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
                document.problems.append(document.problem(path, f"{_show(name)}: must be a regime's name"))
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
                for key in [key for key, value in settings.items() if value is None and key in _OVERRIDES]:
                    del settings[key]
                if "kind" not in settings and name in typing.get_args(Kind):
                    settings["kind"] = name


def check(document: Document) -> Checked:
    """Every problem that can be found without looking at the data."""
    problems = list(document.problems)
    raw = copy.deepcopy(document.data)
    config = _validated(Config, raw, document, (), problems)
    data = config.data if config is not None else _section(DataSpec, document, "data")
    outlines: dict[str, ChainOutline] = {}
    if config is not None:
        resolved = _resolve_regimes(config, document, problems)
        checker = _CrossChecks(config, document, problems)
        outlines = checker.run(resolved)
    return Checked(document, config, data, outlines, list(dict.fromkeys(problems)))


def _section(kind: type[Any], document: Document, key: str) -> Any:
    """One section when it is sound on its own, else None."""
    try:
        return _validate(kind, document.data.get(key, {}))
    except ValidationError:
        return None


def _validated(kind: Any, raw: Any, document: Document, prefix: KeyPath, problems: list[Problem]) -> Any:
    """`raw` as `kind`. Problems are appended; what is wrong is then taken out, so that later checks still see
    the rest with defaults in its place. None when that does not help."""
    pruned: set[KeyPath] = set()
    for _ in range(5):
        try:
            return _validate(kind, raw)
        except ValidationError as error:
            found = list(_explain(error, raw, kind, document, prefix))
            # What was taken out in an earlier round is not missing from the file.
            problems += [problem for path, problem in found if path not in pruned]
            # Where something needed is missing, the section around it goes: a regime without a kind.
            doomed = [path if _has(raw, path) else path[:-1] for path, _ in found]
            pruned.update((*doomed, *(path for path, _ in found)))
            for path in doomed:
                _prune(raw, path)
    return None


def _resolve_regimes(config: Config, document: Document, problems: list[Problem]) -> dict[str, Regime]:
    """Regimes with overrides merged in; wrong overrides are reported and left out."""
    resolved: dict[str, Regime] = {}
    for name, own in config.regimes.items():
        prefix: KeyPath = ("regimes", name)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            problems.append(document.problem(prefix, "a regime's name has letters, digits, - and _ only"))
        values: dict[str, Any] = {}
        for key, kind in _OVERRIDES.items():
            merged = _merge(_plain(getattr(config, key)), getattr(own, key))
            values[key] = _validated(kind, merged, document, (*prefix, key), problems)
        stages: dict[str, Any] = {}
        for stage, override in own.stages.items():
            merged = _merge(_plain(values["training"]), override)
            value = _validated(TrainSpec, merged, document, (*prefix, "stages", stage), problems)
            stages[stage] = _plain(value) if value is not None else {}
        model = config.model
        if own.head_convs is not None:
            model = dataclasses.replace(model, head_convs=own.head_convs)
        resolved[name] = Regime(name, own.kind, model, stages=stages, **values)
    return resolved


class _CrossChecks:
    """Rules that involve more than one key. Each method is one rule."""

    def __init__(self, config: Config, document: Document, problems: list[Problem]) -> None:
        self.config = config
        self.document = document
        self.problems = problems

    def run(self, regimes: Mapping[str, Regime]) -> dict[str, ChainOutline]:
        self.image_sizes()
        self.validation_share()
        self.shortcuts()
        outlines: dict[str, ChainOutline] = {}
        for name, regime in regimes.items():
            self.training(regime.training, name, ("training",))
            chain = self.chain(regime)
            if chain is not None and self.split(regime, len(chain.blocks)):
                outlines[name] = chain
                self.stages(regime, chain)
            for stage in self.config.regimes[name].stages:
                try:
                    spec = _validate(TrainSpec, regime.stages[stage])
                except ValidationError:
                    continue
                self.training(spec, name, ("stages", stage))
        return outlines

    def report(self, path: KeyPath, message: str) -> None:
        self.problems.append(self.document.problem(path, message))

    def locate(self, regime: str, section: str, *keys: str) -> KeyPath:
        """Where a regime's setting was written: in its own override, or in the section all share."""
        for own in (("regimes", regime, section, *keys), ("regimes", regime, section, keys[0])):
            if own in self.document.lines or own in self.document.origins:
                return ("regimes", regime, section, *keys)
        return (section, *keys)

    def image_sizes(self) -> None:
        data = self.config.data
        if data.resize is not None and data.resize < data.image_size:
            self.report(
                ("data", "resize"),
                f"{data.resize}: must be at least data.image_size, which is {data.image_size}",
            )

    def validation_share(self) -> None:
        data = self.config.data
        if data.validation >= 1 and data.validation != int(data.validation):
            message = f"{data.validation}: must be a fraction below 1 or a whole number of samples"
            self.report(("data", "validation"), message)

    def shortcuts(self) -> None:
        if self.config.data.name == "digits" and self.config.data.path is not None:
            self.report(("data", "path"), "digits come with scikit-learn; leave data.path out")

    def training(self, train: TrainSpec, regime: str, section: tuple[str, ...]) -> None:
        def at(*keys: str) -> KeyPath:
            if section[0] == "training":
                return self.locate(regime, "training", *keys)
            own: KeyPath = ("regimes", regime, *section, *keys)
            written = own in self.document.lines or own in self.document.origins
            return own if written else self.locate(regime, "training", *keys)

        if train.batch_size % train.accumulate:
            message = f"{train.accumulate}: must divide the batch_size, which is {train.batch_size}"
            self.report(at("accumulate"), message)
        if not all(0 <= beta < 1 for beta in train.optimizer.betas):
            self.report(
                at("optimizer", "betas"),
                f"{list(train.optimizer.betas)}: both must be at least 0 and below 1",
            )
        if train.optimizer.nesterov and (train.optimizer.name != "sgd" or train.optimizer.momentum == 0):
            self.report(at("optimizer", "nesterov"), "true: needs sgd with a momentum above 0")
        if train.precision == "fp16" and self.config.resources.device == "cpu":
            self.report(at("precision"), "fp16: not available on resources.device cpu; allowed there: fp32, bf16")

    def chain(self, regime: Regime) -> ChainOutline | None:
        """The outline says itself what is impossible; the count of classes does not matter for that."""
        try:
            return outline(regime.model, self.config.data.image_size, 10)
        except ConfigError as error:
            where = error.details.get("where", "model")
            message = error.message.removeprefix(f"{where}: ")
            path: KeyPath = tuple(str(where).split("."))
            own = self.config.regimes[regime.name].head_convs
            if path == ("model", "head_convs") and own is not None:
                path = ("regimes", regime.name, "head_convs")
            self.report(path, message)
            return None

    def split(self, regime: Regime, n: int) -> bool:
        if regime.kind != "segprop":
            return True
        p, r = regime.split.base, regime.split.head
        if p + r <= n:
            return True
        key = "base" if p > n or r == 0 else "head"
        value = p if key == "base" else r
        other = f"with split.head {r} " if key == "base" else f"with split.base {p} "
        most = n - (r if key == "base" else p)
        self.report(
            self.locate(regime.name, "split", key),
            f"{value}: base + head may not exceed the {n} blocks of the chain; {other}at most {max(most, 0)}",
        )
        return False

    def stages(self, regime: Regime, chain: ChainOutline) -> None:
        """Adapters and local heads must reach the head's grid; overrides must name stages there are."""
        stages = regime.layout([block.name for block in chain.blocks])
        for stage in stages:
            try:
                if stage.adapter is not None:
                    chain.adapter(*stage.adapter)
                if stage.aux is not None:
                    chain.aux(stage.aux)
            except ConfigError as error:
                where = str(error.details.get("where", "data.image_size"))
                message = error.message.removeprefix(f"{where}: ")
                self.report(tuple(where.split(".")), f"{stage.name} of {regime.kind}: {message}")
        allowed = list(dict.fromkeys([*(stage.group for stage in stages), *(stage.name for stage in stages)]))
        for name in self.config.regimes[regime.name].stages:
            if name not in allowed:
                self.report(
                    ("regimes", regime.name, "stages", name),
                    f"unknown stage{_nearest(name, allowed)}; allowed: {', '.join(allowed)}",
                )


# -- explaining what pydantic found -------------------------------------------------------------------------

_OVERRIDES: dict[str, type[Any]] = {
    "training": TrainSpec,
    "split": SplitConfig,
    "snapshots": SnapshotConfig,
}


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _validate(kind: Any, raw: Any) -> Any:
    # Through JSON, where strict mode still takes a list for a tuple, but never "3" or true for 3.
    return _adapter(kind).validate_json(json.dumps(raw), strict=True)


def _explain(
    error: ValidationError, raw: Any, kind: type[Any], document: Document, prefix: KeyPath
) -> Iterator[tuple[KeyPath, Problem]]:
    """One problem per key, with the key's path inside `raw`. Alternatives of a union are joined by `or`."""
    grouped: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        grouped.setdefault(_real_path(item["loc"], raw, item["type"]), []).append(item)
    for path, items in grouped.items():
        first = items[0]
        value = _at(raw, path)
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            message = "unknown key" + _suggest_key(kind, path, prefix)
        elif first["type"] in ("missing", "missing_argument"):
            message = "is required" + _allowed_values(kind, path)
        elif first["type"] in ("dataclass_type", "model_type", "dict_type", "model_attributes_type"):
            message = f"{_show(value)}: must be a section with keys of its own"
        else:
            message = f"{_show(value)}: {' or '.join(dict.fromkeys(_wording(item, value) for item in items))}"
        yield path, document.problem((*prefix, *path), message)


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
    if item["type"] == "string_pattern_mismatch":
        return "must start with a letter or digit and hold only letters, digits, '.', '-' and '_'"
    if item["type"] == "literal_error" and isinstance(value, str):
        choices = re.findall(r"'([^']*)'", message)
        message += _nearest(value, choices)
    return message[:1].lower() + message[1:]


def _suggest_key(kind: type[Any], path: KeyPath, prefix: KeyPath) -> str:
    wrong = str(path[-1])
    siblings = list(_fields(_kind_at(kind, path[:-1])))
    close = difflib.get_close_matches(wrong, siblings, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    everywhere = [key for key in _all_keys(Config) if key[-1] == wrong]
    if everywhere and not prefix:
        return f"; did you mean {key_text(everywhere[0])}?"
    return f"; allowed here: {', '.join(siblings)}" if siblings else ""


def _allowed_values(kind: type[Any], path: KeyPath) -> str:
    hint = _fields(_kind_at(kind, path[:-1])).get(str(path[-1]))
    choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    return f"; one of {', '.join(map(str, choices))}" if choices else ""


def _nearest(value: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(value, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@cache
def _fields(kind: Any) -> dict[str, Any]:
    """Keys of a section and their types (without bounds)."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {}


def _kind_at(kind: Any, path: KeyPath) -> Any:
    for index, part in enumerate(path):
        if kind is RegimeConfig and part in _OVERRIDES:
            kind = _OVERRIDES[str(part)]
            continue
        if kind is RegimeConfig and part == "stages":
            return TrainSpec if index + 1 < len(path) else None
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            continue
        kind = _fields(kind).get(str(part))
        if isinstance(kind, types.UnionType):
            kind = next((member for member in typing.get_args(kind) if _fields(member)), None)
    return kind


def _all_keys(kind: Any, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for name, hint in _fields(kind).items():
        yield (*prefix, name)
        yield from _all_keys(hint, (*prefix, name))


# -- small helpers -----------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """JSON values of a section."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _merge(base: Any, override: Any) -> Any:
    """`override` laid over `base`, section by section."""
    if not isinstance(base, Mapping) or not isinstance(override, Mapping):
        return override
    merged = dict(base)
    for key, value in override.items():
        merged[key] = _merge(base[key], value) if key in base else value
    return merged


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


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 80 else text[:77] + "..."


# -- run directories ---------------------------------------------------------------------------------------

#: What may differ between two configurations of one run directory: nothing here changes a result.
_FREE = (
    ("run",),
    ("run_dir",),
    ("resources",),
    ("evaluation",),
    ("data", "download"),
    ("training", "checkpoint_every_s"),
    ("snapshots", "mode"),
    ("snapshots", "budget"),
    ("snapshots", "shard_bytes"),
    ("snapshots", "retention"),
)
#: Compared regime by regime, where they are resolved.
_BY_REGIME = ("training", "split", "snapshots", "regimes")


def compatible(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys in which two resolved configurations conflict: a run directory may grow (more regimes) and move to
    other resources, but what it holds never changes meaning. Empty: go on."""
    conflicts = [
        key_text(path)
        for name in sorted({*old, *new} - set(_BY_REGIME))
        for path in _differences(old.get(name), new.get(name), (name,))
    ]
    new_regimes = new.get("regimes", {})
    for name, settings in old.get("regimes", {}).items():
        if name not in new_regimes:
            conflicts.append(f"regimes.{name} (left out)")
            continue
        conflicts += [key_text(("regimes", name, *path)) for path in _differences(settings, new_regimes[name], ())]
    return conflicts


def _differences(old: Any, new: Any, path: KeyPath) -> Iterator[KeyPath]:
    if path in _FREE:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            if path[:1] == ("stages",) and len(path) == 2 and key == "checkpoint_every_s":
                continue
            yield from _differences(old.get(key), new.get(key), (*path, key))
    elif old != new:
        yield path


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
    "load",
    "parse_size",
    "read_document",
]
