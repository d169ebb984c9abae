"""What a split's documents and samples are like, before anything is trained on them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cache_store.errors import DataError
from workers.data.text.corpora.findings import NAMED, Findings
from workers.data.text.formats import TEXT_FORMATS, data_is_packed
from workers.specs.data_results import LengthFigures, SplitStatistics
from workers.specs.language import TextSpec

#: Shares of the samples that are at most this long.
PERCENTILES = (5, 50, 95, 99)
#: Shares of the samples that lost targets: above the first it is said, above the second refused.
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
    stored; `counts`: sequences truncated, dropped, empty, and samples left out because nothing in them counts;
    `findings`: what was odd in the records."""
    return SplitStatistics(
        documents=lengths_of(documents),
        samples=lengths_of(lengths),
        tokens=int(lengths.sum()),
        targets=int(targets.sum()),
        truncated=counts["truncated"],
        dropped=counts["dropped"],
        empty=counts["empty"],
        without_targets=counts["without_targets"],
        findings=findings.found(),
    )


def warnings_of(data: TextSpec, statistics: Mapping[str, SplitStatistics]) -> list[str]:
    """Word what a user should know: samples that were cut, dropped or left without targets, above 1 % of a data set
    that is not packed, and all findings.

    DataError: more than half of the samples have no targets; more than half were cut, in a format where the end of a
    sample must be learned.
    """
    parts = statistics.values()
    total = sum(part.documents.count for part in parts)
    longest = max((part.documents.max or 0 for part in parts), default=0)
    allowed = f"allowed: a larger data.sequence_length (the longest sample takes {longest} tokens)"
    ends = TEXT_FORMATS[data.name].ends
    without_targets = sum(part.without_targets for part in parts)
    truncated, dropped = sum(part.truncated for part in parts), sum(part.dropped for part in parts)
    said: list[str] = []
    for key, count, what, refused in (
        ("without_targets", without_targets, "have no targets and are left out", True),
        ("truncated", truncated, f"are longer than data.sequence_length {data.sequence_length} and were cut", ends),
        ("dropped", dropped, f"are longer than data.sequence_length {data.sequence_length} and were dropped", False),
    ):
        found = 0 if data_is_packed(data) else count
        text = f"{found} of {total} samples ({100 * found / max(total, 1):.1f} %) {what}"
        if refused and found > _TOO_MANY * total:
            raise DataError(f"data: {text}; {allowed}", **{key: found, "samples": total})
        if found > _WORTH_SAYING * total:
            said.append(text)
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
