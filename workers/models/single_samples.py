"""Find stages whose batch normalization would be given one sample of one pixel. Pure Python.

There is nothing to normalise in a single value a channel. torch refuses it, which may be hours into a stage where only
the last batch of an epoch is so small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from workers.models.base import Finding, TrainedParts
from workers.models.counting import Shape
from workers.models.outline import ChainOutline
from workers.specs.experiment import TrainSpec

#: Part -> shapes of one sample.
Maps = Mapping[str, tuple[Shape, ...]]


def problems(stage: TrainedParts, maps: Maps, train: TrainSpec, rows: int) -> Iterator[Finding]:
    """Yield the key of `train` at which a stage is refused, and the message.

    maps: of the parts that it trains, the smallest that their batch normalization works on. rows: training samples.
    """
    samples = _batch_with_one_alone(train, rows)
    part = _one_pixel(maps) if samples is not None else None
    if part is None:
        return
    if not train.drop_last and samples == rows % train.batch_size and rows > samples:
        key, value, allowed = "drop_last", "false", "true, or a batch_size that leaves another rest"
    else:
        key, value, allowed = "batch_size", f"{train.batch_size}", "another one, or another micro_batch"
    yield (
        (key,),
        f"{value}: of a batch of {samples} samples in micro-batches of {train.micro} one sample is alone, and "
        f"{stage.name} trains batch normalization of single pixels ({part}), which needs two samples; "
        f"allowed: {allowed}",
    )


def _batch_with_one_alone(train: TrainSpec, rows: int) -> int | None:
    """Return the samples of a batch that has a micro-batch of one sample; None where there is no such batch."""
    whole, rest = divmod(rows, train.batch_size)
    sizes = [train.batch_size] if whole else []
    # The steps may end before the last batch of an epoch.
    reached = train.exit.steps is None or train.exit.steps > whole
    if rest and (not whole or (not train.drop_last and reached)):
        sizes.append(rest)
    return next((size for size in sizes if train.micro == 1 or size % train.micro == 1), None)


def _one_pixel(maps: Maps) -> str | None:
    return next((part for part, shapes in maps.items() if any(math.prod(shape[1:]) == 1 for shape in shapes)), None)


def mapped(stage: TrainedParts, chain: ChainOutline) -> Maps:
    """Return the maps of a stage's adapter and local head as published: they work on the grid that they lead to."""
    adapter = {} if stage.adapter is None else {"adapter": chain.adapter_target(stage.adapter[1])}
    aux = {"aux": chain.head_input} if stage.aux is not None and chain.aux_maps(stage.aux) else {}
    return adapter | aux
