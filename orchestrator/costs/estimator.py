"""What the tasks of one regime take: `estimate` for any network, `language_memory` where parts say more than shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from cache_store.formats.dtypes import ITEM_BYTES
from orchestrator.config.rates import Rates
from orchestrator.costs import formulas
from orchestrator.costs.formulas import Estimate, SplitRows
from orchestrator.regimes.stages import Stage
from workers.models.causal_lm import memory as language_memory
from workers.specs.experiment import TrainSpec
from workers.specs.language import CausalLMSpec
from workers.specs.tasks import BoundarySpec

if TYPE_CHECKING:
    from orchestrator.config.schema import Regime
    from workers.models.causal_lm.outline import LMOutline, LMPartOutline
    from workers.models.outline import ChainOutline, PartOutline


@dataclasses.dataclass(frozen=True)
class Estimator:
    """Predicts seconds and bytes of a regime's tasks. `language`: the checkpoint of a language model; `on_host`:
    workers train on the CPU."""

    regime: Regime
    outline: ChainOutline
    rows: SplitRows
    rates: Rates
    language: LMOutline | None
    on_host: bool

    def stage(self, stage: Stage, train: TrainSpec, boundary: BoundarySpec | None, source: str) -> Estimate:
        """A stage over its whole schedule. `boundary`: where it starts (None: at the raw inputs); `source`: how it gets
        there."""
        parts: list[PartOutline] = []
        for name in stage.path:
            if name == "adapter" and stage.adapter is not None:
                parts.append(self.outline.adapter(*stage.adapter))
            elif name == "aux" and stage.aux is not None:
                parts.append(self.outline.aux(stage.aux))
            else:
                parts.append(self.outline.part(name))
        trained = frozenset((*stage.trained, "adapter", "aux"))
        shapes = self.outline.boundaries[sum(len(hop) for hop in stage.hops)]
        prefix = [self.outline.part(block) for hop in stage.hops for block in hop] if source == "recompute" else []
        group_rows = boundary.group_rows if boundary is not None else 0
        predicted = formulas.train_estimate(
            parts,
            trained,
            train,
            rows=self.rows,
            rates=self.rates,
            input_elements=formulas.elements(shapes),
            input_item_bytes=ITEM_BYTES[boundary.dtype] if boundary is not None else 4,
            reads_snapshots=source == "snapshots",
            prefix=prefix,
            group_rows=group_rows,
        )
        if self.language is None:
            return predicted
        memory = language_memory.stage_memory(
            cast("Sequence[LMPartOutline]", parts),
            trained,
            train,
            master=self._master,
            prefix=cast("Sequence[LMPartOutline]", prefix),
            group_rows=group_rows,
            stored_item_bytes=ITEM_BYTES[boundary.dtype] if boundary is not None else None,
            on_host=self.on_host,
        )
        return formulas.with_memory(predicted, memory)

    def frozen(self, parts: Sequence[PartOutline], batch_rows: int, **figures: Any) -> Estimate:
        """Samples once through frozen parts; `figures` as for `estimate.frozen_estimate`."""
        predicted = formulas.frozen_estimate(parts, batch_rows=batch_rows, rates=self.rates, **figures)
        if self.language is None or not parts:
            return predicted
        peak = language_memory.frozen_bytes(
            cast("Sequence[LMPartOutline]", parts), batch_rows, master=self._master, precision=figures["precision"]
        )
        return dataclasses.replace(predicted, peak_bytes=peak)

    @property
    def _master(self) -> str:
        """The type of the weights, which `auto` leaves to the checkpoint."""
        model = self.regime.model
        assert isinstance(model, CausalLMSpec)
        assert self.language is not None
        return model.master if model.master != "auto" else str(self.language.config["dtype"])
