"""What the tasks of one regime take: formulas for any network, and the family's own where it knows more than shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cache_store.formats.dtypes import ITEM_BYTES
from orchestrator.config.rates import Rates
from orchestrator.costs import formulas
from orchestrator.costs.formulas import Estimate
from orchestrator.costs.host_updates import Updated, update_seconds, with_updates
from orchestrator.costs.link import link_bytes, with_link
from orchestrator.regimes.blocks import choices
from orchestrator.regimes.stages import Stage
from workers.domains.planning import LoadSeconds, SplitRows
from workers.models.base import StageMemory, StageParts
from workers.specs.experiment import TrainSpec
from workers.specs.memory import ON_DEVICE, FrozenTier, MemorySpec
from workers.specs.ranks import ONE_DEVICE, Ranks
from workers.specs.tasks import BoundarySpec

if TYPE_CHECKING:
    from orchestrator.config.schema import Regime
    from workers.models.outline import ChainOutline, PartOutline


@dataclasses.dataclass(frozen=True)
class Trained:
    """How a stage is trained, with everything settled. `tied`: what parts share is held together."""

    train: TrainSpec
    memory: MemorySpec = ON_DEVICE
    tied: bool = False


@dataclasses.dataclass(frozen=True)
class Estimator:
    """Predicts seconds and bytes of a regime's tasks. `found`: what the family's `inspect` gave; `load`: what loading
    raw inputs takes; `on_host`: workers train on the CPU."""

    regime: Regime
    outline: ChainOutline
    rows: SplitRows
    rates: Rates
    found: object | None
    load: LoadSeconds
    on_host: bool
    #: Where networks lie that run frozen as a whole, if not on the device.
    frozen_beside: FrozenTier | None = None
    #: The devices that train stages together, of so many trainable parameters and more.
    ranks: Ranks = ONE_DEVICE
    ranks_from: int = 0

    def stage(self, stage: Stage, how: Trained, boundary: BoundarySpec | None, source: str) -> Estimate:
        """Predict a stage over its whole schedule. `boundary`: where it starts (None: at the raw inputs); `source`: how
        it gets there."""
        parts, inputs = self._stage(stage, how, boundary, source)
        alone = self._beside(parts, inputs, how, stage)
        if self.ranks.size == 1 or alone.trainable < self.ranks_from:
            return alone
        of_rank = dataclasses.replace(parts, ranks=self.ranks, train=self.rank_train(parts))
        rank = self._beside(of_rank, inputs, dataclasses.replace(how, train=of_rank.train), stage)
        return formulas.with_rank(alone, rank, self.ranks.size)

    def rank_train(self, parts: StageParts) -> TrainSpec:
        """The settings of a stage with what one rank takes of a step: its part of the samples, in micro-batches as
        large as on one device; of smaller ones where normalization keeps what they are made of."""
        train, size = parts.train, self.ranks.size
        batch = -(-train.batch_size // size)
        norms = any(part.buffer_elements for part in parts.path) and self.regime.traits.can.auto_micro is not None
        micro = -(-train.micro // size) if norms else min(train.micro, batch)
        return dataclasses.replace(train, batch_size=batch, micro_batch=micro, accumulate=1)

    def _beside(self, parts: StageParts, inputs: formulas.StageInputs, how: Trained, stage: Stage) -> Estimate:
        """Predict a stage on one of its devices, with what it takes beside it."""
        train = how.train
        predicted, memory = self._predicted(parts, inputs)
        trained, away = 4 * parts.ranks.share(predicted.trainable), 0 if self.on_host else formulas.away_bytes(parts)
        committed = 4 * sum(self.outline.part(name).parameters for name in stage.trained)
        if memory is not None:
            trained, committed, away = memory.gradients, memory.committed, memory.away
        schedule = self.regime.schedule(stage, tied=how.tied)
        if schedule is not None:
            turns = [dataclasses.replace(parts, active=active) for active in choices(schedule)]
            predicted = formulas.by_turns(predicted, [self._predicted(turn, inputs)[0] for turn in turns])
        if not self.on_host:
            crossing = link_bytes(how.memory, away=away, trained=trained)
            predicted = with_link(predicted, train, self.rows.train, crossing, self.rates)
        waits = update_seconds(
            train.optimizer, how.memory, Updated(predicted.trainable, trained), self.rates, on_host=self.on_host
        )
        predicted = with_updates(predicted, train, self.rows.train, waits)
        batch = train.micro * inputs.elements * inputs.item_bytes
        return formulas.with_host(predicted, parts, trained=trained, committed=committed, batch=batch, away=away)

    def _predicted(self, parts: StageParts, inputs: formulas.StageInputs) -> tuple[Estimate, StageMemory | None]:
        """Predict work and device memory; with the memory that the family knows better, where it does."""
        predicted = formulas.train_estimate(parts, inputs, self.rates)
        memory = self.regime.family.stage_memory(self.regime.model, self.found, parts)
        return predicted if memory is None else formulas.with_memory(predicted, memory), memory

    def _stage(
        self, stage: Stage, how: Trained, boundary: BoundarySpec | None, source: str
    ) -> tuple[StageParts, formulas.StageInputs]:
        """Return what a stage consists of, and what it reads."""
        shapes = self.outline.boundaries[sum(len(hop) for hop in stage.hops)]
        stored_item = ITEM_BYTES[boundary.dtype] if boundary is not None else None
        parts = StageParts(
            path=self.outline.held_together(self._path(stage)) if how.tied else self._path(stage),
            trained=frozenset((*stage.trained, "adapter", "aux")),
            train=how.train,
            prefix=[self.outline.part(block) for hop in stage.hops for block in hop] if source == "recompute" else [],
            group_rows=boundary.group_rows if boundary is not None else 0,
            stored_item_bytes=stored_item,
            on_host=self.on_host,
            memory=how.memory,
        )
        inputs = formulas.StageInputs(
            rows=self.rows,
            elements=formulas.elements(shapes),
            item_bytes=stored_item or 4,
            reads_snapshots=source == "snapshots",
            load=formulas.NOTHING_TO_LOAD if source == "snapshots" else self.load,
        )
        return parts, inputs

    def frozen(self, parts: Sequence[PartOutline], batch_rows: int, **figures: Any) -> Estimate:
        """Predict samples going once through frozen parts; `figures` as for `formulas.frozen_estimate`."""
        streamed = self.frozen_beside is not None and not self.on_host
        predicted = formulas.frozen_estimate(
            parts, batch_rows=batch_rows, rates=self.rates, streamed=streamed, **figures
        )
        if not parts:
            return predicted
        held = self.regime.family.frozen_bytes(
            self.regime.model, self.found, parts, batch_rows, str(figures["precision"])
        )
        return predicted if held is None else formulas.with_held(predicted, held, streamed=streamed)

    def _path(self, stage: Stage) -> list[PartOutline]:
        parts: list[PartOutline] = []
        for name in stage.path:
            if name == "adapter" and stage.adapter is not None:
                parts.append(self.outline.adapter(*stage.adapter))
            elif name == "aux" and stage.aux is not None:
                parts.append(self.outline.aux(stage.aux))
            else:
                parts.append(self.outline.part(name))
        return parts
