"""The measures, a row each: what the features of one boundary say of inputs, targets and another network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.nn import functional as F

from workers.measures.cka import aligned, cka
from workers.measures.errors import error_of_mean, error_of_share, jackknife_error
from workers.measures.nhsic import nhsic, smoother
from workers.measures.probe import probe_accuracy
from workers.measures.spectrum import effective_rank, singular_values, singular_values_without
from workers.specs.results import MeasuredValue
from workers.specs.tasks import MEASURED_BLOCK, Bandwidth, Measure

#: Blocks that there are at least, however few the samples are.
LEAST_BLOCKS = 4
#: Groups of which one is left out at a time, for the error of the effective rank.
GROUPS = 5


def block_size(samples: int) -> int:
    """Return how many samples a block has, of so many."""
    return min(MEASURED_BLOCK, samples // LEAST_BLOCKS)


@dataclass(frozen=True)
class Known:
    """What is known of the samples beside a boundary. Samples are in random order, those of `held_out` apart."""

    #: Features (n, d) of the inputs.
    inputs: Tensor
    #: int64 (n,) and (k,).
    targets: Tensor
    held_out: Tensor
    classes: int
    #: Where each block begins and ends.
    cuts: Sequence[slice]
    bandwidth: Bandwidth = "fixed"

    @classmethod
    def of(
        cls, inputs: Tensor, targets: Tensor, held_out: Tensor, classes: int, bandwidth: Bandwidth = "fixed"
    ) -> Known:
        """Cut the samples into blocks of equal size; those left over are in none."""
        size = block_size(len(inputs))
        cuts = [slice(start, start + size) for start in range(0, len(inputs) - size + 1, size)]
        return cls(inputs, targets, held_out, classes, cuts, bandwidth)

    @cached_property
    def one_hot(self) -> Tensor:
        """The targets as float32 (n, classes)."""
        return F.one_hot(self.targets, self.classes).float()

    @cached_property
    def input_smoothers(self) -> list[Tensor]:
        return [smoother(self.inputs[cut], self.bandwidth) for cut in self.cuts]

    @cached_property
    def target_smoothers(self) -> list[Tensor]:
        return [smoother(self.one_hot[cut], self.bandwidth) for cut in self.cuts]


@dataclass(frozen=True)
class Seen:
    """Features of one boundary: (n, d) of the samples, (k, d) of those held out, and (n, e) of the same samples at the
    same boundary of the network that it is compared with; None where there is none."""

    samples: Tensor
    held_out: Tensor
    reference: Tensor | None = None


def _nhsic(seen: Seen, known: Known) -> Iterator[tuple[str, MeasuredValue]]:
    values: dict[str, list[float]] = {"nhsic_inputs": [], "nhsic_targets": []}
    for cut, inputs, targets in zip(known.cuts, known.input_smoothers, known.target_smoothers, strict=True):
        own = smoother(seen.samples[cut], known.bandwidth)
        values["nhsic_inputs"].append(nhsic(own, inputs))
        values["nhsic_targets"].append(nhsic(own, targets))
    for name, found in values.items():
        yield name, MeasuredValue(value=sum(found) / len(found), error=error_of_mean(found))


def _cka(seen: Seen, known: Known) -> Iterator[tuple[str, MeasuredValue]]:
    if seen.reference is None:
        return
    blocks = [aligned(seen.samples[cut], seen.reference[cut]) for cut in known.cuts]
    without = [cka(blocks[:index] + blocks[index + 1 :]) for index in range(len(blocks))]
    yield "cka", MeasuredValue(value=cka(blocks), error=jackknife_error(without))


def _probe(seen: Seen, known: Known) -> Iterator[tuple[str, MeasuredValue]]:
    share = probe_accuracy(seen.samples, known.one_hot, seen.held_out, known.held_out)
    yield "probe", MeasuredValue(value=share, error=error_of_share(share, len(known.held_out)))


def _effective_rank(seen: Seen, known: Known) -> Iterator[tuple[str, MeasuredValue]]:
    value = effective_rank(singular_values(seen.samples))
    without = [effective_rank(found) for found in singular_values_without(seen.samples, GROUPS)]
    yield "effective_rank", MeasuredValue(value=value, error=jackknife_error(without))


#: Name in the configuration -> its figures, by name.
MEASURES: Mapping[Measure, Callable[[Seen, Known], Iterator[tuple[str, MeasuredValue]]]] = {
    "nhsic": _nhsic,
    "cka": _cka,
    "probe": _probe,
    "effective_rank": _effective_rank,
}


def measure(seen: Seen, known: Known, measures: Sequence[Measure]) -> dict[str, MeasuredValue]:
    """Return what the measures say of a boundary; figures that are not finite are left out."""
    found = [item for name in measures for item in MEASURES[name](seen, known)]
    return {name: value for name, value in found if value.finite}
