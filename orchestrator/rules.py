"""Rules that involve more than one key of a configuration, whatever its model; each method is one rule."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from pydantic import ValidationError

from orchestrator.explain import nearest
from orchestrator.sections import Config, Regime, validate
from orchestrator.stages import Stage
from orchestrator.yaml_loader import Document, KeyPath, Problem
from workers.specs import TrainSpec

#: Shards read ahead of the batch that is loaded (SHARDS_AHEAD of workers.batches, which imports torch).
AHEAD = 2


class CrossChecks:
    """Collects problems; `run` of a subclass applies all rules."""

    def __init__(self, config: Config, document: Document, problems: list[Problem]) -> None:
        self.config = config
        self.document = document
        self.problems = problems

    def report(self, path: KeyPath, message: str) -> None:
        self.problems.append(self.document.problem(path, message))

    def locate(self, regime: str, section: str, *keys: str) -> KeyPath:
        """Where a regime's setting was written: in its own override, or in the section all share."""
        for own in (("regimes", regime, section, *keys), ("regimes", regime, section, keys[0])):
            if own in self.document.lines or own in self.document.origins:
                return ("regimes", regime, section, *keys)
        return (section, *keys)

    def window(self, name: str, regime: Regime) -> None:
        """What is open at one time, with what is read ahead, must fit into the memory there is for it."""
        settings, memory = regime.snapshots, self.config.resources.snapshot_memory
        if settings.shuffle == "window" and memory is not None:
            needed = (settings.window + AHEAD) * settings.shard_bytes
            if needed > memory:
                self.report(
                    ("resources", "snapshot_memory"),
                    f"{memory}: {settings.window} shards open at a time and {AHEAD} read ahead, of "
                    f"{settings.shard_bytes} bytes each, need {needed} (regime {name}); raise it, or lower "
                    "snapshots.window or snapshots.shard_bytes",
                )

    def trainings(self, name: str, regime: Regime) -> None:
        """`training` of a regime, and of every stage that overrides it."""
        self.training(regime.training, name, ("training",))
        for stage in self.config.regimes[name].stages:
            try:
                spec = validate(TrainSpec, regime.stages[stage])
            except ValidationError:
                continue
            self.training(spec, name, ("stages", stage))

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
        if train.micro_batch is not None and train.accumulate != 1:
            self.report(at("micro_batch"), "sets the micro-batches of a step by itself; leave accumulate out")
        if not all(0 <= beta < 1 for beta in train.optimizer.betas):
            self.report(
                at("optimizer", "betas"),
                f"{list(train.optimizer.betas)}: both must be at least 0 and below 1",
            )
        if train.optimizer.nesterov and (train.optimizer.name != "sgd" or train.optimizer.momentum == 0):
            self.report(at("optimizer", "nesterov"), "true: needs sgd with a momentum above 0")
        if train.optimizer.name == "adamw8bit" or train.frozen_weights != "full":
            key = ("optimizer", "name") if train.optimizer.name == "adamw8bit" else ("frozen_weights",)
            value = train.optimizer.name if len(key) == 2 else train.frozen_weights
            if importlib.util.find_spec("bitsandbytes") is None:
                self.report(at(*key), f"{value}: needs bitsandbytes: pip install 'segprop[quantized]'")
        if train.precision == "fp16" and self.config.resources.device == "cpu":
            self.report(at("precision"), "fp16: not available on resources.device cpu; allowed there: fp32, bf16")

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

    def stage_names(self, regime: Regime, stages: Sequence[Stage]) -> None:
        """Overrides must name stages there are."""
        allowed = list(dict.fromkeys([*(stage.group for stage in stages), *(stage.name for stage in stages)]))
        for name in self.config.regimes[regime.name].stages:
            if name not in allowed:
                self.report(
                    ("regimes", regime.name, "stages", name),
                    f"unknown stage{nearest(name, allowed)}; allowed: {', '.join(allowed)}",
                )
