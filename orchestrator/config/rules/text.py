"""Rules of causal language models. They look at the checkpoint's configuration, not at weights or text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cache_store.errors import ConfigError
from orchestrator.config.rules.base import CrossChecks
from orchestrator.config.schema import Regime, TextConfig
from orchestrator.config.yaml_loader import KeyPath
from orchestrator.regimes.stages import Stage

if TYPE_CHECKING:
    from workers.models.causal_lm.outline import LMOutline


class TextChecks(CrossChecks):
    """See `CrossChecks`."""

    config: TextConfig

    def run(self, regimes: Mapping[str, Regime]) -> LMOutline | None:
        self.held_out()
        self.pipelines()
        language = self.language()
        for name, regime in regimes.items():
            self.trainings(name, regime)
            self.window(name, regime)
            self.low_rank(regime)
            self.run_exit(regime)
            if language is None:
                continue
            blocks = ("embed", *(f"layer{index}" for index in range(language.layers)))
            kept = len(regime.in_training(blocks)) - 1
            if self.omitted(regime, language.layers) and self.split(regime, kept):
                stages = regime.layout(blocks)
                self.stage_names(regime, stages)
                self.wave(regime, stages)
                self.something_to_train(regime, stages)
        if language is not None:
            self.positions(language)
            self.isolation(language)
            self.tokenizer(language)
        return language

    def language(self) -> LMOutline | None:
        """What the checkpoint is. Problems are located at the keys they begin with."""
        # Loads torch and transformers: only they know every architecture.
        from workers.models.causal_lm.inspect import inspect

        try:
            return inspect(self.config.model)
        except ConfigError as error:
            where = str(error.details.get("where", "model"))
            path: KeyPath = tuple(where.split("."))
            self.report(path, error.message.removeprefix(f"{where}: "))
            return None

    def held_out(self) -> None:
        for key in ("validation", "test"):
            share = getattr(self.config.data, key)
            if share >= 1 and share != int(share):
                self.report(("data", key), f"{share}: must be a fraction below 1 or a whole number of documents")

    def positions(self, language: LMOutline) -> None:
        longest = language.positions
        if longest is not None and self.config.data.sequence_length > longest:
            message = f"{self.config.data.sequence_length}: the model has {longest} positions"
            self.report(("data", "sequence_length"), message)

    def isolation(self, language: LMOutline) -> None:
        """Check that a model which is to keep packed documents apart does. Tries it only then: it may take seconds."""
        from workers.data.text.formats import data_is_packed

        data = self.config.data
        if not data.isolate or not data_is_packed(data):
            return
        from workers.models.causal_lm.trials.isolation import keeps_documents_apart

        if not keeps_documents_apart(dataclasses.replace(self.config.model, config=dict(language.config))):
            kind = language.config.get("model_type")
            self.report(
                ("data", "isolate"),
                f"true: {kind} with model.attention {self.config.model.attention} does not keep packed "
                "documents apart; set data.isolate: false, or data.pack: false for a sample a document",
            )

    def tokenizer(self, language: LMOutline) -> None:
        """Whether it is there, fits the model, and can do what the data ask of it. A folder without weights can be
        planned for without its tokenizer too."""
        from workers.data.text.formats import TEXT_FORMATS
        from workers.data.text.tokens.tokenizers import load_tokenizer

        model = self.config.model
        if model.tokenizer is None and not language.has_weights:
            if model.path is None:
                self.report(("model", "tokenizer"), "none given; random weights need one: a folder, a hub id, or bytes")
            return
        try:
            tokenizer = load_tokenizer(dataclasses.replace(model, config=dict(language.config)))
            TEXT_FORMATS[self.config.data.name].encoder(tokenizer)
        except ConfigError as error:
            key, _, message = error.message.partition(": ")
            self.report(tuple(key.split(".")), message)

    def something_to_train(self, regime: Regime, stages: Sequence[Stage]) -> None:
        """Adapters are in decoder layers, and in the LM head where it is asked for."""
        for stage in stages:
            train = regime.stage_training(stage)
            layers = any(part.startswith("layer") for part in stage.trained)
            if train.lora is not None and train.lm_head != "lora" and not layers:
                self.report(
                    self.locate(regime.name, "training", "lora"),
                    f"leaves {stage.name} of {regime.name} nothing to train: it has no decoder layers to adapt; "
                    f"allowed: training.lm_head: lora, or regimes.{regime.name}.stages.{stage.group}: {{lora: null}}",
                )

    def low_rank(self, regime: Regime) -> None:
        if regime.training.lm_head == "lora" and regime.training.lora is None:
            self.report(self.locate(regime.name, "training", "lm_head"), "lora: needs training.lora")
        if regime.training.channels_last:
            self.report(self.locate(regime.name, "training", "channels_last"), "true: is for images")

    def omitted(self, regime: Regime, layers: int) -> bool:
        beyond = [index for index in regime.split.omit if index >= layers]
        if beyond:
            message = f"{beyond}: the model has layers 0 to {layers - 1}"
            self.report(self.locate(regime.name, "split", "omit"), message)
        return not beyond
