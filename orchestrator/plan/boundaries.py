"""Count the boundaries of a regime: which there are, and how much of each is made, read and alive at one time.

Counts alone, no nodes: the plan decides and builds with them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.costs import formulas, snapshot_policy
from orchestrator.costs.boundary_costs import BoundaryCosts, Costs, boundary_costs
from orchestrator.regimes import wavefront
from orchestrator.regimes.stages import Stage
from workers.domains.planning import SplitRows
from workers.specs.experiment import COMPUTED, TrainSpec
from workers.specs.tasks import BoundarySpec

if TYPE_CHECKING:
    from orchestrator.config.schema import Regime
    from workers.models.outline import ChainOutline

#: The blocks before a boundary, hop by hop.
Hops = tuple[tuple[str, ...], ...]


class Boundaries:
    """The distinct boundaries that stages read, from the raw inputs on. Each is the one before plus one hop.
    Top down, stages read them in the opposite order."""

    def __init__(
        self,
        regime: Regime,
        outline: ChainOutline,
        stages: Sequence[Stage],
        training: Mapping[str, TrainSpec],
        rows: SplitRows,
        *,
        views: int | None,
        wave: Sequence[wavefront.Step],
    ) -> None:
        """`training`: stage name -> its settings; `views`: those of the data, None where samples have no views."""
        self._regime, self._outline, self._rows, self._wave = regime, outline, rows, wave
        self._stages = stages
        self._epochs = {stage.name: formulas.epochs_to_run(training[stage.name], rows.train) for stage in stages}
        self._views = self._views_by_stage(views)
        self._trained = {part for stage in stages for part in stage.trained}
        self.order: list[Hops] = sorted({stage.hops for stage in stages if stage.hops}, key=len)
        self.specs = {hops: self._spec(hops) for hops in self.order}

    def __len__(self) -> int:
        return len(self.order)

    def with_views(self, views: int) -> Boundaries:
        """Return the same boundaries stored in other views."""
        other = copy.copy(self)
        other._views = self._views_by_stage(views)
        return other

    def _views_by_stage(self, views: int | None) -> dict[str, int]:
        if views is None:
            return dict.fromkeys(self._epochs, 1)
        return {name: formulas.views_used(views, epochs) for name, epochs in self._epochs.items()}

    # -- what one is ----------------------------------------------------------------------------------------

    def shapes(self, hops: Hops) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of one sample there, without the batch dimension."""
        return self._outline.boundaries[sum(len(hop) for hop in hops)]

    def row_bytes(self, hops: Hops) -> int:
        """Return the stored bytes of one sample at the boundary after `hops`."""
        spec = self.specs[hops]
        return formulas.row_bytes(self.shapes(hops), spec.dtype, spec.encoding)

    def bytes_behind(self, block: int) -> int:
        """Return the stored bytes of one sample behind a block, were its boundary stored."""
        return formulas.row_bytes(self._outline.boundaries[block + 1], self._dtype(), self._regime.snapshots.encoding)

    def moves(self, hops: Hops) -> bool:
        """Tell whether a boundary changes while a wave goes on: not where no block before it is trained."""
        return bool(self._wave) and any(block in self._trained for hop in hops for block in hop)

    def _spec(self, hops: Hops) -> BoundarySpec:
        settings, training = self._regime.snapshots, self._regime.training
        return BoundarySpec(
            hops=hops,
            precision=training.precision,
            dtype=self._dtype(),
            group_rows=self._regime.group_rows,
            shard_bytes=settings.shard_bytes,
            channels_last=training.channels_last,
            encoding=settings.encoding,
        )

    def _dtype(self) -> Any:
        dtype = self._regime.snapshots.dtype
        return COMPUTED[self._regime.training.precision] if dtype == "auto" else dtype

    # -- how often it is made and read ----------------------------------------------------------------------

    def epochs(self, stage: Stage) -> int:
        """Return the epochs that a stage reaches."""
        return self._epochs[stage.name]

    @property
    def most_epochs(self) -> int:
        """The most epochs of a stage that starts from a boundary; 0 where none does."""
        return max((self._epochs[stage.name] for stage in self._stages if stage.hops), default=0)

    def views_read(self, stage: Stage, epochs: tuple[int, int] | None) -> Sequence[int]:
        """Return the views that a stage, or these epochs of it, reads, in the order in which it asks for them."""
        views = self._views[stage.name]
        return range(views) if epochs is None else list(dict.fromkeys(epoch % views for epoch in range(*epochs)))

    def sets_made(self, hops: Hops) -> tuple[int, int]:
        """Count the sets of train and of validation that a boundary has, over all of its versions."""
        if not self.moves(hops):
            return max(self._views[stage.name] for stage in self._stages if stage.hops == hops), 1
        each = self._views_by_round(hops)
        return sum(each), len(each)

    def rows_made(self, hops: Hops) -> int:
        """Count the samples of all its sets."""
        views, versions = self.sets_made(hops)
        return views * self._rows.train + versions * self._rows.validation

    def rows_alive(self, hops: Hops) -> int:
        """Count the samples stored at one time, at most. While one round's version is read, that of the round before is
        rolled forward."""
        _, versions = self.sets_made(hops)
        if versions == 1 or self._regime.snapshots.retention == "keep":
            return self.rows_made(hops)
        return 2 * (max(self._views_by_round(hops)) * self._rows.train + self._rows.validation)

    def set_bytes(self, hops: Hops) -> int:
        """Count the bytes of its sets that are stored at one time, at most."""
        return self.rows_alive(hops) * self.row_bytes(hops)

    def passes(self, hops: Hops) -> int:
        """Count the epochs of all stages that start from this boundary."""
        return sum(self._epochs[stage.name] for stage in self._stages if stage.hops == hops)

    def _views_by_round(self, hops: Hops) -> list[int]:
        return [
            len(self.views_read(step.stage, step.epochs))
            for step in self._wave
            if isinstance(step, wavefront.Round) and step.stage.hops == hops
        ]

    # -- what it costs --------------------------------------------------------------------------------------

    def costs(self, hops: Hops, costs: Costs) -> BoundaryCosts:
        """Return the seconds to make all its sets, to read them as often as they are read, and to do without."""
        views, versions = self.sets_made(hops)
        return boundary_costs(costs, hops, self._rows, views=views, versions=versions, passes=self.passes(hops))

    def facts(self, hops: Hops, costs: Costs) -> snapshot_policy.BoundaryPrice:
        """Return what deciding between snapshots and recomputing needs: in seconds where they were measured, else in
        operations."""
        label, set_bytes = hops[-1][-1], self.set_bytes(hops)
        if costs.basis == "measured":
            measured = self.costs(hops, costs)
            return snapshot_policy.BoundaryPrice(
                label=label,
                set_bytes=set_bytes,
                make_from_images=measured.make_from_start,
                make_from_previous=measured.make_from_previous,
                recompute=measured.recompute,
                read=measured.read,
                in_seconds=True,
            )
        prefix = formulas.prefix_flops(self._outline, [block for hop in hops for block in hop])
        rolled = formulas.prefix_flops(self._outline, hops[-1]) if hops != self.order[0] else prefix
        return snapshot_policy.BoundaryPrice(
            label=label,
            set_bytes=set_bytes,
            make_from_images=self.rows_made(hops) * prefix,
            make_from_previous=self.rows_made(hops) * rolled,
            recompute=self.passes(hops) * (self._rows.train + self._rows.validation) * prefix,
        )
