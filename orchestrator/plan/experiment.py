"""What the nodes of a regime share, freed of everything that only says where files lie."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from workers.domains.planning import AnyOutline, SplitRows
from workers.models.outline import ChainOutline
from workers.specs.experiment import Experiment
from workers.specs.tasks import DataTask, ModelTask

if TYPE_CHECKING:
    from orchestrator.config.schema import Config, Regime


def experiment_of(config: Config, regime: Regime, data_outline: AnyOutline, found: object | None) -> Experiment:
    """What all tasks of a regime hold. `found`: what the family's `inspect` gave. The store holds prepared data and
    initial weights, so a stage needs neither's path."""
    data = regime.domain.without_files(config.data, data_outline)
    asked = regime.domain.views(config.data)
    if asked is not None:
        # Stages are given their own number; what else is done does not depend on it.
        data = regime.domain.with_views(data, 1 if asked == "auto" else asked)
    return Experiment(
        model=regime.family.architecture(regime.model, found),
        data=data,
        classes=outputs_of(config, data_outline, found),
        seed=config.seed,
        code=config.family.file_digests(config.model, found).code,
        loss=config.domain.loss(config.training),
    )


def data_task(config: Config, data: AnyOutline, found: object | None) -> DataTask:
    """Prepare the data set. It holds what decides how samples are prepared, so that regimes and runs share the node."""
    tokenizing = config.family.tokenizing(config.model)
    task = config.domain.task(config.data, data.fingerprint, config.seed, tokenizing)
    if task.model is None:
        return task
    return replace(task, tokenizer=config.family.file_digests(config.model, found).tokenizer)


def model_task(
    config: Config, regime: Regime, data: AnyOutline, found: object | None, weights_digest: str | None
) -> ModelTask:
    """Write the initial weights. It holds what decides them: how the chain is cut, or computes, later does not."""
    sized = regime.traits.sized_weights
    files = regime.family.file_digests(regime.model, found)
    return ModelTask(
        model=regime.family.start(regime.model, found),
        classes=outputs_of(config, data, found),
        seed=config.seed,
        weights_digest=weights_digest,
        sample=regime.domain.sample(config.data, data) if sized else None,
        companions=files.companions,
        code=files.code,
    )


def outline_of(config: Config, regime: Regime, data: AnyOutline, found: object | None) -> ChainOutline:
    """The chain of a regime in figures, for one sample of this data set."""
    sample = regime.domain.sample(config.data, data)
    return regime.family.outline(regime.model, found, sample, outputs_of(config, data, found))


def outputs_of(config: Config, data: AnyOutline, found: object | None) -> int:
    """What the head chooses from: the classes of the data set, or the model's vocabulary."""
    return config.family.outputs(found, config.domain.classes(data))


def rows_of(config: Config, data: AnyOutline) -> SplitRows:
    """Samples of every split; of packed text, about."""
    return config.domain.rows(config.data, data)
