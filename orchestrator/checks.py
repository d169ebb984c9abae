"""Everything that is wrong with a configuration, at once: each section on its own, then rules that span several.

No rule here looks at the data.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cache_store.errors import ConfigError
from orchestrator.explain import nearest, validated
from orchestrator.sections import OVERRIDES, Config, Regime, merge, plain, validate
from orchestrator.yaml_loader import Document, KeyPath, Problem
from workers.models.outline import ChainOutline, outline
from workers.specs import DataSpec, TrainSpec


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


def check(document: Document) -> Checked:
    """Every problem that can be found without looking at the data."""
    problems = list(document.problems)
    raw = copy.deepcopy(document.data)
    config = validated(Config, raw, document, (), problems)
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
                    spec = validate(TrainSpec, regime.stages[stage])
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
                    f"unknown stage{nearest(name, allowed)}; allowed: {', '.join(allowed)}",
                )
