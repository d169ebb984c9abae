"""State in sentences what a run shows: ranking, gaps, noise, costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from orchestrator.reports.quality import (
    Improvement,
    Quality,
    improvements,
    loss_text,
    original_of,
    perplexity_text,
    quality_of,
)
from orchestrator.reports.records import BenchmarkScore, Metrics, RegimeSummary, Summary
from orchestrator.reports.tables.benchmarks import asked_of, title
from orchestrator.reports.words import MemoryBasis, baseline_of, titles
from orchestrator.units import bytes_text, percent_text, ratio_text, seconds_text
from workers.specs.experiment import MOST_SWALLOWED


def verdict(summary: Summary) -> list[str]:
    """Return the outcome in sentences, from the figures alone."""
    regimes = summary.regimes
    names = titles(regimes)
    memory = MemoryBasis(summary)
    quality = quality_of(summary)
    values = {
        name: value for name, regime in regimes.items() if (value := quality.value(regime.final.metrics)) is not None
    }
    ranked = quality.ranked(values)
    sentences = _incomplete(summary, [names[name] for name in regimes if name not in values])
    if not ranked:
        nothing = "No regime has a final test result yet, so there is nothing to compare."
        return [*sentences, nothing, *_rounding(regimes, names), *_data(summary)]
    best = ranked[0]
    scores = {name: _score(quality, regimes[name].final.metrics) for name in ranked}
    if len(regimes) == 1:
        regime = regimes[best]
        sentences.append(
            f"{names[best]} reached {scores[best]} after "
            f"{seconds_text(regime.seconds)} of training, with {bytes_text(memory.of(regime))} "
            f"{memory.words} in its largest stage. Only this regime was run, so nothing is compared."
        )
        return [
            *sentences,
            *_against_original(summary, quality, names),
            *_benchmarks(summary, names),
            *_overlaps(regimes, names),
            *_ended_early(regimes, names),
            *_rounding(regimes, names),
            *_notes(regimes, names),
            *_data(summary),
        ]
    if len(ranked) > 1:
        sentences += _ranking(values, ranked, names, regimes, quality)
    else:
        sentences.append(f"{names[best]} reached {scores[best]}.")
    return [
        *sentences,
        *_against_original(summary, quality, names),
        *_benchmarks(summary, names),
        *_costs(summary, names, memory),
        *_overlaps(regimes, names),
        *_ended_early(regimes, names),
        *_rounding(regimes, names),
        *_notes(regimes, names),
        *_data(summary),
    ]


def _benchmarks(summary: Summary, names: Mapping[str, str]) -> Iterator[str]:
    """Say how regimes stand against the untouched model on benchmarks, and where that may be chance."""
    for benchmark in asked_of(summary):
        original = (summary.judged or {}).get(benchmark)
        found = {
            name: regime.judged[benchmark] for name, regime in summary.regimes.items() if benchmark in regime.judged
        }
        if original is None or not found:
            continue
        against = ", ".join(f"{names[name]} {_points(score, original)}" for name, score in found.items())
        yield (
            f"On {title(benchmark)} ({original.n:,} question{'s' if original.n != 1 else ''}) the original has "
            f"{percent_text(original.value, 2)}; against that, in points: {against}."
        )


def _points(score: BenchmarkScore, original: BenchmarkScore) -> str:
    """`+1.20`, or `+0.30 (no difference shown)` where that lies within the 95% interval of two samples of questions:
    a wide one, since both were asked the same."""
    difference = score.value - original.value
    text = f"{100 * difference:+.2f}".replace("-", "−")
    if score.stderr is None or original.stderr is None:
        return text
    return (
        text if abs(difference) > 1.96 * math.hypot(score.stderr, original.stderr) else f"{text} (no difference shown)"
    )


def _score(quality: Quality, metrics: Metrics) -> str:
    """`95.50 % test accuracy`, `a test loss of 2.1034 (perplexity 8.19)`, `a test R² of 0.8123`."""
    text = quality.written(quality.value(metrics))
    if quality.metric == "accuracy":
        return f"{text} test accuracy"
    return f"a test {quality.row.title} of {text}{_beside(quality, metrics)}"


def _beside(quality: Quality, metrics: Metrics) -> str:
    """What stands in brackets behind a figure: the perplexity of a language model's loss."""
    return f" (perplexity {perplexity_text(metrics)})" if quality.perplexed else ""


def _ranking(
    values: Mapping[str, float],
    ranked: list[str],
    names: Mapping[str, str],
    regimes: Mapping[str, RegimeSummary],
    quality: Quality,
) -> list[str]:
    """Say who is best, how far the others are behind, and what of that may be chance."""
    top = values[ranked[0]]
    equal = [name for name in ranked if quality.written(values[name]) == quality.written(top)]
    behind = [name for name in ranked if name not in equal]
    superlative = "the best" if quality.metric == "accuracy" else "the highest" if quality.row.higher else "the lowest"
    finals = {name: regimes[name].final.metrics for name in ranked}
    top_text = f"{quality.written(top)}{_beside(quality, finals[ranked[0]])}"
    what = f"{superlative} test {quality.row.title}, {top_text}"
    others = [
        f"{names[name]} {quality.written(values[name])} ({_behind(quality, values[name], top, finals[name])})"
        for name in behind
    ]
    verb = "has" if len(equal) == 1 else "share"
    tail = f"; {', '.join(others)}" if others else ""
    sentences = [f"{listed([names[name] for name in equal])} {verb} {what}{tail}."]
    if quality.metric == "accuracy" and not quality.text:
        return sentences + _noise(values, ranked, names, regimes[ranked[0]].final.rows)
    if behind:
        # Neither tokens nor candidates are independent of each other, and F1 and R² are no shares of samples: how many
        # there are says nothing of the noise.
        sentences.append(
            "One seed is one seed: how much of these differences another seed would turn round was not measured."
        )
    return sentences


def _behind(quality: Quality, value: float, top: float, metrics: Metrics) -> str:
    """`−1.20 points`, `+0.0488, perplexity 8.19`, `−0.0312`."""
    if quality.row.share:
        return f"−{100 * (top - value):.2f} points"
    text = f"{value - top:+.4f}".replace("-", "−")
    return f"{text}, perplexity {perplexity_text(metrics)}" if quality.perplexed else text


def _against_original(summary: Summary, quality: Quality, names: Mapping[str, str]) -> list[str]:
    """Say what training added to the model as it came, and how much of end-to-end's gain each regime has."""
    found = improvements(summary, quality)
    if not found:
        return []
    baseline = baseline_of(summary)
    base = names[baseline] if baseline is not None else ""
    told = [f"{names[name]} is {gain_text(item, quality, base)}" for name, item in found.items()]
    before = original_of(summary)
    beside = _beside(quality, before)
    return [
        f"The model as it came has a test {quality.row.title} of {quality.written(quality.value(before))}{beside}: "
        f"{', '.join(told)}."
    ]


def gain_text(item: Improvement, quality: Quality, base: str) -> str:
    """`0.6912 better (99 % of End-to-end's improvement)`, `0.0488 worse`."""
    size = abs(item.gain)
    gain = f"{100 * size:.2f} points" if quality.row.share else f"{size:.4f}"
    if item.gain <= 0:
        return f"{gain} worse" if item.gain else "no better"
    return f"{gain} better" + (
        "" if item.share is None else f" ({percent_text(item.share, 0)} of {base}'s improvement)"
    )


def _incomplete(summary: Summary, missing: list[str]) -> list[str]:
    failed = len(summary.failures)
    if failed:
        tasks = "One task" if failed == 1 else f"{failed} tasks"
        tail = f" {listed(missing)} {'has' if len(missing) == 1 else 'have'} no final result." if missing else ""
        return [f"{tasks} failed; what follows covers what was finished.{tail}"]
    if summary.status == "stopped":
        return ["The run was stopped before its end; the same command goes on from here."]
    return [f"{listed(missing)} {'has' if len(missing) == 1 else 'have'} no final result yet."] if missing else []


def _noise(accuracy: Mapping[str, float], ranked: list[str], names: Mapping[str, str], rows: int | None) -> list[str]:
    """Say how much of the difference the size of the test set can carry (two standard errors of a difference)."""
    if not rows:
        return []
    mean = sum(accuracy.values()) / len(accuracy)
    margin = 2 * math.sqrt(2 * max(mean * (1 - mean), 1e-9) / rows)
    top = accuracy[ranked[0]]
    behind = [name for name in ranked if percent_text(accuracy[name], 2) != percent_text(top, 2)]
    close = [name for name in behind if top - accuracy[name] < margin]
    if not behind:
        return []
    text = f"with {rows:,} test samples and one seed, anything below about {100 * margin:.1f} points is noise"
    if not close:
        return [f"The differences are larger than chance alone would explain: {text}."]
    verb = "is" if len(close) == 1 else "are"
    return [f"{listed([names[name] for name in close])} {verb} within noise of the best: {text}."]


def _costs(summary: Summary, names: Mapping[str, str], memory: MemoryBasis) -> list[str]:
    """Compare peak memory and training time with the baseline's."""
    reference = baseline_of(summary)
    if reference is None:
        return []
    regimes = summary.regimes
    base = regimes[reference]
    others = {name: regime for name, regime in regimes.items() if name != reference and regime.done}
    if not others or not base.done:
        return []
    sentences = []
    peaks = [
        f"{names[name]} {percent_text(share, 0)}"
        for name, regime in others.items()
        if (share := memory.share(memory.of(regime))) is not None
    ]
    if peaks:
        sentences.append(
            f"Of {names[reference]}'s {memory.words} ({bytes_text(memory.of(base))}), the largest stage of "
            f"{'each of the others took' if len(peaks) > 1 else 'the other took'}: {', '.join(peaks)}."
        )
    times = [
        f"{names[name]} {ratio_text(regime.seconds / base.seconds)}"
        for name, regime in others.items()
        if regime.seconds and base.seconds
    ]
    if times:
        sentences.append(
            f"Training time against {names[reference]}'s {seconds_text(base.seconds)}: {', '.join(times)}."
        )
    return sentences


def _overlaps(regimes: Mapping[str, RegimeSummary], names: Mapping[str, str]) -> list[str]:
    """Say how much of a wave's work ran at the same time as more of it."""
    return [
        f"{names[name]} did {seconds_text(regime.seconds)} of training in {seconds_text(regime.wall_seconds)} on "
        f"the clock: its stages overlap ({ratio_text(regime.seconds / regime.wall_seconds)})."
        for name, regime in regimes.items()
        if regime.pipeline == "wavefront" and regime.done and regime.seconds and regime.wall_seconds
    ]


def _ended_early(regimes: Mapping[str, RegimeSummary], names: Mapping[str, str]) -> list[str]:
    words: Mapping[str, Callable[[float | None], str]] = {
        "accuracy": lambda value: percent_text(value, 2),
        "loss": loss_text,
    }
    sentences = []
    for name, regime in regimes.items():
        ended = regime.ended_early
        if ended:
            had = listed([f"{key} {words[key](value)}" for key, value in ended.reached.items()])
            asked = listed([words[key](value) for key, value in ended.target.items()])
            count = ended.stages_left_out
            left = f"the {count} stages after it were" if count > 1 else "the last stage was"
            sentences.append(
                f"{names[name]} ended early: after {ended.after} the whole network had reached validation {had} "
                f"(asked for: {asked}), so {left} left out."
            )
    return sentences


def _rounding(regimes: Mapping[str, RegimeSummary], names: Mapping[str, str]) -> list[str]:
    """Warn of stages whose weights, in bfloat16, did not move as the optimizer meant them to."""
    sentences = []
    for name, regime in regimes.items():
        lost = {stage.name: stage.swallowed for stage in regime.stages if (stage.swallowed or 0.0) > MOST_SWALLOWED}
        if lost:
            told = listed([f"{percent_text(share, 0)} in {stage}" for stage, share in lost.items()])
            sentences.append(
                f"Warning: rounding to bfloat16 took more than {percent_text(MOST_SWALLOWED, 0)} of {names[name]}'s "
                f"updates: {told}; training.optimizer.rounding stochastic or compensated loses none."
            )
    return sentences


def _notes(regimes: Mapping[str, RegimeSummary], names: Mapping[str, str]) -> list[str]:
    return [f"{names[name]}: {note}" for name, regime in regimes.items() for note in regime.notes or ()]


def _data(summary: Summary) -> list[str]:
    """Warn of what the data lost, and of what was odd in them, when they were prepared."""
    return [f"Warning: data: {warning}." for warning in (summary.data.warnings if summary.data else ())]


def listed(words: Sequence[str]) -> str:
    """Return `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
