"""Rules that involve more than one key of a configuration, whatever its model; each method is one rule."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from pydantic import ValidationError

from orchestrator.config.messages import nearest
from orchestrator.config.rules import gangs
from orchestrator.config.schema import Config, Regime, validate
from orchestrator.config.yaml_loader import Document, KeyPath, Problem
from orchestrator.regimes.stages import Stage
from orchestrator.regimes.table import REGIMES, kinds_that
from orchestrator.regimes.wavefront import FINAL
from workers.specs.experiment import TrainSpec
from workers.specs.language import CausalLMSpec

#: Shards read ahead of the batch that is loaded (SHARDS_AHEAD of workers.training.batches, which imports torch).
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

        for path, message in gangs.training_problems(self.config.resources.gang, train):
            self.report(at(*path), message)

    def pipelines(self) -> None:
        """`wavefront` overlaps the segments of SegProp; other regimes have none that meet the network's own head."""
        waving = kinds_that(lambda row: row.may_wave)
        for name, own in self.config.regimes.items():
            if not REGIMES[own.kind].may_wave and (own.pipeline == "wavefront" or own.wavefront):
                key = "pipeline" if own.pipeline == "wavefront" else "wavefront"
                self.report(
                    ("regimes", name, key),
                    f"wavefront: is for {waving}, {name} is {own.kind}; allowed here: leave it out",
                )
        if self.config.pipeline == "wavefront" and not any(
            REGIMES[r.kind].may_wave for r in self.config.regimes.values()
        ):
            self.report(("pipeline",), f"wavefront: is for {waving}, and no regime here is one; allowed: sequential")

    def run_exit(self, regime: Regime) -> None:
        """Only a network that is whole after every stage can be good enough before the last one."""
        own = self.config.regimes[regime.name].run_exit
        if regime.run_exit.gate is None:
            return
        at = ("regimes", regime.name, "run_exit") if own else ("run_exit",)
        if not regime.row.may_end_early:
            if own:
                ending = kinds_that(lambda row: row.may_end_early)
                self.report(at, f"is for {ending}, {regime.name} is {regime.kind}; allowed here: leave it out")
            return
        if regime.pipeline == "wavefront":
            self.report(
                at, f"not with pipeline wavefront ({regime.name}): its stages do not wait for each other's scores"
            )
        if regime.snapshots.production == "overlap":
            self.report(
                self.locate(regime.name, "snapshots", "production"),
                f"overlap: not with run_exit ({regime.name}), which decides first whether there is anything to read; "
                "allowed: before",
            )
        if not self.config.evaluation.stages:
            self.report(("evaluation", "stages"), "false: run_exit looks at the whole network after every stage")
        if not self.pretrained(regime) and regime.split.intermediate == "omit":
            self.report(
                at,
                f"{regime.name} starts from random weights and omits what is not trained yet: blocks that a run leaves "
                "untrained would be noise; allowed: weights to start from, or split.intermediate: frozen",
            )

    def pretrained(self, regime: Regime) -> bool:
        """Whether a regime starts from weights that were trained before."""
        model = regime.model
        return (model.path if isinstance(model, CausalLMSpec) else model.weights) is not None

    def wave(self, regime: Regime, stages: Sequence[Stage]) -> None:
        """A wave needs segments to overlap, and stages of a fixed number of epochs, enough for the rounds."""
        if regime.pipeline != "wavefront":
            return
        rounds = regime.wavefront.rounds
        running = [stage for stage in stages if stage.group != FINAL]
        if len(running) < 2:
            self.report(
                self.locate(regime.name, "split", "base"),
                f"leaves {regime.name} one stage, and pipeline wavefront nothing to overlap; allowed: a smaller base, "
                "or pipeline: sequential",
            )
        if regime.snapshots.production == "overlap":
            self.report(
                self.locate(regime.name, "snapshots", "production"),
                f"overlap: not with pipeline wavefront ({regime.name}), whose rounds wait for their sets; allowed: "
                "before",
            )
        refused: dict[KeyPath, str] = {}
        for stage in running:
            train = regime.stage_training(stage)
            where = f"{stage.name} of {regime.name}"
            if train.epochs < rounds:
                own: KeyPath = ("regimes", regime.name, "wavefront", "rounds")
                written = own in self.document.lines or own in self.document.origins
                self.report(
                    own if written else ("wavefront", "rounds"),
                    f"{rounds}: more than the {train.epochs} epochs of {where}; allowed: 2 to {train.epochs}"
                    if train.epochs > 1
                    else f"{rounds}: {where} has one epoch, which cannot be cut; allowed: more training.epochs",
                )
                break
            for key in ("steps", "plateau", "target"):
                value = getattr(train.exit, key)
                if value is not None:
                    refused.setdefault(
                        self._stage_key(regime, stage, "exit", key),
                        f"{value}: {where} runs in rounds of a fixed number of epochs (pipeline wavefront); allowed: "
                        "null, and an exit of the final pass alone, in stages.final",
                    )
            if train.lora is not None:
                refused.setdefault(
                    self._stage_key(regime, stage, "lora"),
                    f"not in a round of pipeline wavefront ({where}): low-rank adapters are merged when a piece of "
                    "work ends; allowed: null",
                )
        for path, message in refused.items():
            self.report(path, message)

    def _stage_key(self, regime: Regime, stage: Stage, *keys: str) -> KeyPath:
        """Where a setting of a stage's training was written."""
        for name in (stage.name, stage.group):
            if keys[0] in self.config.regimes[regime.name].stages.get(name, {}):
                return ("regimes", regime.name, "stages", name, *keys)
        return self.locate(regime.name, "training", *keys)

    def split(self, regime: Regime, n: int) -> bool:
        if not regime.row.has_base:
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
