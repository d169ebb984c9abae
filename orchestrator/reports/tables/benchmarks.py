"""Write scores on public benchmarks (`evaluation.judge`), for tables of runs and of sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.reports.records import Benchmarks, BenchmarkScore, Summary
from orchestrator.units import DASH
from workers.judge.judges import JUDGES

#: Behind a score of a model that was trained on some of the questions.
MARK = "*"


def title(benchmark: str) -> str:
    """Return what to call a benchmark."""
    row = JUDGES.get(benchmark)
    return row.title if row is not None and row.title else benchmark


def asked(found: Iterable[Benchmarks | None]) -> list[str]:
    """Name the benchmarks that some network has a score of, each once."""
    return list(dict.fromkeys(name for scores in found for name in scores or ()))


def asked_of(summary: Summary) -> list[str]:
    """Name the benchmarks that a run has scores of."""
    stages = [stage.judged for regime in summary.regimes.values() for stage in regime.stages]
    return asked([summary.judged, *stages])


def cell(score: BenchmarkScore | None) -> str:
    """Write `45.20 ± 0.41`: per cent, with the standard error."""
    if score is None:
        return DASH
    error = "" if score.stderr is None else f" ± {100 * score.stderr:.2f}"
    return f"{100 * score.value:.2f}{error}{MARK if score.contaminated is not None else ''}"


def cells(scores: Benchmarks | None, names: Sequence[str]) -> list[str]:
    """Return a cell for each benchmark."""
    return [cell((scores or {}).get(name)) for name in names]


def notes(found: Iterable[Benchmarks | None]) -> list[str]:
    """Say in sentences how the scores came about: questions and examples of each benchmark, and what was trained on."""
    networks = [scores for scores in found if scores]
    sentences = []
    for name in asked(networks):
        scores = [scores[name] for scores in networks if name in scores]
        numbers, shots = (dict.fromkeys(each) for each in zip(*((s.n, s.shots) for s in scores), strict=True))
        how = " or ".join(f"{shot}-shot" for shot in shots) if any(shots) else scores[0].metric
        questions = " or ".join(f"{number:,}" for number in numbers)
        sentences.append(f"{title(name)}: {how}, {questions} question{'' if set(numbers) == {1} else 's'}")
        marked = next((score.contaminated for score in scores if score.contaminated is not None), None)
        if marked is not None:
            sentences[-1] += (
                f"; {MARK} trained on {marked.same} of them and on near-duplicates (13 words in a row) of {marked.near}"
            )
    return sentences


def notes_of(summary: Summary) -> list[str]:
    """Say the same of a run, with what the errors are."""
    stages = [stage.judged for regime in summary.regimes.values() for stage in regime.stages]
    found = notes([summary.judged, *stages])
    return [f"Per cent ± standard error. {'. '.join(found)}."] if found else []
