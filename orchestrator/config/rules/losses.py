"""Rules about the loss of regimes and what depends on it: all train with the same, or they could not be compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from orchestrator.config.rules.base import locate
from orchestrator.config.schema import Config, Regime
from orchestrator.config.yaml_loader import KeyPath
from workers.models.base import Finding


def regime(config: Config, regime: Regime) -> Iterator[Finding]:
    """Check that a regime and its stages train with the loss of all, and that its settings fit that loss."""
    own = config.regimes[regime.name]
    overrides: list[tuple[KeyPath, dict[str, Any]]] = [(("regimes", regime.name, "training"), own.training)]
    overrides += [(("regimes", regime.name, "stages", stage), said) for stage, said in own.stages.items()]
    for path, said in overrides:
        if "loss" in said:
            yield (*path, "loss"), "all regimes and stages train with the same loss; allowed: in `training` alone"
    if "loss" in own.training:
        return
    general = set(config.domain.loss_refusals(config.data, config.training))
    train = replace(regime.training, loss=config.training.loss)
    for (section, *keys), message in config.domain.loss_refusals(config.data, train):
        if ((section, *keys), message) not in general:
            yield locate(config, regime.name, str(section), *map(str, keys)), message
    accuracy = regime.run_exit.accuracy
    if accuracy is not None and "accuracy" not in config.domain.metrics(config.data):
        yield (
            locate(config, regime.name, "run_exit", "accuracy"),
            f"{accuracy:g}: these targets have no accuracy, but {', '.join(config.domain.metrics(config.data))}; "
            "allowed: run_exit.loss",
        )
