"""What one boundary costs in seconds: to make, to read, to compute again. Pure.

`Costs` hold seconds a sample, measured by a `measure` node on a slot of this run, or from nominal speeds. The plan
turns them into a `Prediction` for every boundary; with `snapshots.costs: measured` they also decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.costs import formulas
from workers.domains.planning import SplitRows
from workers.specs.results import BlockCosts, MeasuredCosts

if TYPE_CHECKING:
    from orchestrator.config.rates import Rates
    from workers.models.outline import ChainOutline, PartOutline


@dataclass(frozen=True)
class Costs:
    """`basis`: measured or nominal. `load_group`, `load_batch`: raw inputs (for images, augmented), a sample."""

    basis: str
    load_group: float
    load_batch: float
    blocks: Mapping[str, BlockCosts]

    @classmethod
    def measured(cls, figures: MeasuredCosts, outline: ChainOutline) -> Costs:
        """The result of a `measure` node, every block of the chain by the one that stands for it."""
        known, load = figures.blocks, figures.load
        blocks = {name: known[alike] for name, alike in alike_blocks(outline).items() if alike in known}
        return cls("measured", load.group, load.batch, blocks)

    @classmethod
    def nominal(cls, outline: ChainOutline, rates: Rates, precision: str, row_bytes: Sequence[int]) -> Costs:
        """From operations and bytes. `row_bytes[i]`: stored bytes of a sample behind block i."""
        rate = rates.flops_per_s[precision]
        blocks = {}
        for block, size in zip(outline.blocks, row_bytes, strict=True):
            forward, read = block.flops / rate, size / formulas.STORE_READ_BYTES_PER_S
            blocks[block.name] = BlockCosts(0.0, forward, forward, size / formulas.STORE_WRITE_BYTES_PER_S, read, read)
        return cls("nominal", 0.0, 0.0, blocks)

    def flops_per_s(self, outline: ChainOutline) -> float:
        """Forward speed over training batches, all blocks that are known together."""
        known = [block for block in outline.blocks if block.name in self.blocks]
        return sum(block.flops for block in known) / max(sum(self.blocks[block.name].batch for block in known), 1e-12)


@dataclass(frozen=True)
class BoundaryCosts:
    """Seconds of one boundary in the whole run."""

    make_from_start: float
    make_from_previous: float
    #: Every pass of every stage that reads it; the first over each set costs more.
    read: float
    #: Raw inputs and prefix in every pass, where nothing is stored.
    recompute: float


def make_seconds(costs: Costs, hops: Sequence[Sequence[str]], samples: int, *, rolled: bool) -> float:
    """Making one set of `samples`: from the set of the boundary before (`rolled`), or from the raw inputs. `hops`:
    blocks before the boundary, as `BoundarySpec.hops`."""
    run = [costs.blocks[block] for hop in (hops[-1:] if rolled else hops) for block in hop]
    first = costs.blocks[hops[-2][-1]].open if rolled else costs.load_group
    each = first + sum(block.group for block in run) + costs.blocks[hops[-1][-1]].write
    return sum(block.build for block in run) + samples * each


def boundary_costs(
    costs: Costs, hops: Sequence[Sequence[str]], rows: SplitRows, *, views: int, passes: int, versions: int = 1
) -> BoundaryCosts:
    """`views`: sets of train; `versions`: sets of validation; `passes`: epochs of the stages that start from this
    boundary."""
    here = costs.blocks[hops[-1][-1]]
    stored, seen = views * rows.train + versions * rows.validation, passes * (rows.train + rows.validation)

    def make(rolled: bool) -> float:
        train = make_seconds(costs, hops, rows.train, rolled=rolled)
        return views * train + versions * make_seconds(costs, hops, rows.validation, rolled=rolled)

    from_start = make(rolled=False)
    prefix = sum(costs.blocks[block].batch for hop in hops for block in hop)
    return BoundaryCosts(
        make_from_start=from_start,
        make_from_previous=make(rolled=True) if len(hops) > 1 else from_start,
        read=stored * here.open + max(0, seen - stored) * here.read,
        recompute=seen * (costs.load_batch + prefix),
    )


@dataclass(frozen=True)
class Prediction:
    """One boundary of one regime: what was decided, on what grounds, and where its outcome will be found."""

    label: str
    source: str
    reason: str
    #: `measured` or `nominal`: where the seconds come from.
    basis: str
    bytes: int
    #: As decided for the boundary before: rolled forward from its sets, or made from the start.
    make_seconds: float
    read_seconds: float
    recompute_seconds: float
    #: Of every sample, in its sets or, where it is computed again, over the epochs; None where samples have no views.
    views: int | None
    #: Materialize nodes of its sets, and the train nodes that start from it.
    sets: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def alike_blocks(outline: ChainOutline) -> dict[str, str]:
    """Block -> the first block of the chain that does the same work: decoder layers, repeated residual blocks."""
    first: dict[tuple[Any, ...], str] = {}
    return {block.name: first.setdefault(_work(block), block.name) for block in outline.blocks}


def _work(block: PartOutline) -> tuple[Any, ...]:
    return block.inputs, block.outputs, block.parameters, block.flops, block.saved_elements
