"""What a split's documents and samples are like, before anything is trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from workers.data.text.corpora.findings import NAMED, Findings
from workers.data.text.formats import TEXT_FORMATS, packing_of
from workers.specs.data_results import LengthFigures, SplitStatistics
from workers.specs.language import TextSpec

#: Shares of the samples that are at most this long.
PERCENTILES = (5, 50, 95, 99)
#: Shares of the samples that lost something: above the first it is said, above the second refused.
_WORTH_SAYING, _TOO_MANY = 0.01, 0.5


def lengths_of(lengths: np.ndarray) -> LengthFigures:
    """Compute count, min, max, mean and percentiles of lengths in tokens; of none, only the count."""
    if not len(lengths):
        return LengthFigures(count=0)
    # "lower": a length that is really there, and an integer.
    percentiles = np.percentile(lengths, PERCENTILES, method="lower")
    return LengthFigures(
        count=len(lengths),
        min=int(lengths.min()),
        max=int(lengths.max()),
        mean=float(lengths.mean()),
        **{f"p{share}": int(value) for share, value in zip(PERCENTILES, percentiles, strict=True)},
    )


def split_statistics(
    documents: np.ndarray, lengths: np.ndarray, targets: np.ndarray, counts: Mapping[str, int], findings: Findings
) -> SplitStatistics:
    """Describe a split. `documents`: lengths in tokens before anything was cut; `lengths` and `targets`: of the samples
    stored; `counts`: rows skipped; sequences truncated, dropped, empty; samples left out because nothing in them
    counts; `findings`: what was odd in the records."""
    return SplitStatistics(
        documents=lengths_of(documents),
        samples=lengths_of(lengths),
        tokens=int(lengths.sum()),
        targets=int(targets.sum()),
        truncated=counts["truncated"],
        dropped=counts["dropped"],
        empty=counts["empty"],
        without_targets=counts["without_targets"],
        skipped=counts["skipped"] or None,
        findings=findings.found(),
    )


@dataclass(frozen=True)
class Loss:
    """One way in which samples lost something: how many of how many, what became of them, and what to do about it."""

    count: int
    total: int
    what: str
    setting: str
    remedy: str
    #: Of most samples, it is no longer the data that were meant.
    spoils: bool = True

    @property
    def share(self) -> float:
        """Return the share of the samples, 0..1."""
        return self.count / max(self.total, 1)

    @property
    def words(self) -> str:
        return f"{self.count} of {self.total} samples ({100 * self.share:.1f} %) {self.what}"


def losses_of(data: TextSpec, statistics: Mapping[str, SplitStatistics]) -> list[Loss]:
    """Say what samples lost on their way, of all splits together; running text that is packed loses nothing."""
    if packing_of(data) == "cut":
        return []
    parts = statistics.values()
    total = sum(part.documents.count for part in parts)
    without_targets = sum(part.without_targets for part in parts)
    truncated, dropped = sum(part.truncated for part in parts), sum(part.dropped for part in parts)
    longest = max((part.documents.max or 0 for part in parts), default=0)
    larger = f"a larger data.sequence_length (the longest sample takes {longest} tokens)"
    longer = f"are longer than data.sequence_length {data.sequence_length} and were"
    where, remedy = ("sequence_length", larger) if truncated else ("path", "samples in which something is learned")
    return [
        Loss(without_targets, total, "have no targets and are left out", where, remedy),
        # Running text goes on to teach as far as it goes; a conversation or a question loses its answer.
        Loss(truncated, total, f"{longer} cut", "sequence_length", larger, not TEXT_FORMATS[data.name].running),
        Loss(dropped, total, f"{longer} dropped", "sequence_length", larger),
    ]


def refusals_of(data: TextSpec, statistics: Mapping[str, SplitStatistics]) -> list[tuple[str, str]]:
    """List what is too much to go on with, as (setting of the section `data`, message): more than half of the samples
    lost something, and `allow_loss` is off."""
    return [
        (loss.setting, f"{loss.words}; allowed: {loss.remedy}, or data.allow_loss: true to go on with what is left")
        for loss in losses_of(data, statistics)
        if loss.spoils and loss.share > _TOO_MANY and not data.allow_loss
    ]


def warnings_of(data: TextSpec, statistics: Mapping[str, SplitStatistics]) -> list[str]:
    """Word what a user should know: samples that were cut, dropped or left without targets, above 1 %, and all
    findings."""
    said = [loss.words for loss in losses_of(data, statistics) if loss.share > _WORTH_SAYING]
    return said + _findings_in_words(statistics)


def _findings_in_words(statistics: Mapping[str, SplitStatistics]) -> list[str]:
    counts: dict[str, int] = {}
    first: dict[str, list[str]] = {}
    for part in statistics.values():
        for what, found in (part.findings or {}).items():
            counts[what] = counts.get(what, 0) + found.count
            first.setdefault(what, []).extend(found.first)
    said = []
    for what in sorted(counts):
        more = ", …" if counts[what] > len(first[what][:NAMED]) else ""
        said.append(f"{counts[what]} times: {what} ({', '.join(first[what][:NAMED])}{more})")
    return said
