"""Rules of causal language models. They look at the checkpoint's configuration, not at weights or text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cache_store.errors import ConfigError
from orchestrator.rules import CrossChecks
from orchestrator.sections import Regime, TextConfig
from orchestrator.yaml_loader import KeyPath

if TYPE_CHECKING:
    from workers.models.causal_lm.outline import LMOutline


class TextChecks(CrossChecks):
    """See `CrossChecks`."""

    config: TextConfig

    def run(self, regimes: Mapping[str, Regime]) -> LMOutline | None:
        self.held_out()
        language = self.language()
        for name, regime in regimes.items():
            self.trainings(name, regime)
            self.low_rank(regime)
            if language is None:
                continue
            blocks = ("embed", *(f"layer{index}" for index in range(language.layers)))
            kept = len(regime.in_training(blocks)) - 1
            if self.omitted(regime, language.layers) and self.split(regime, kept):
                self.stage_names(regime, regime.layout(blocks))
        if language is not None:
            self.positions(language)
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
