"""Write figures as people read them.

Measured figures have about three digits and `*_text` names; None is a dash: not measured. Predictions, which are rough,
have fixed digits and `human_*` names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from workers.domains.metrics import METRICS, leading

DASH = "–"
#: How times may be written.
TIMES = "90s, 12h or 7d"
_TIME = re.compile(r"(\d{1,9}(?:\.\d+)?)\s*([smhdw])")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def seconds_of(text: str) -> float | None:
    """Read a time such as 90m or 7d as seconds; None when it is none."""
    match = _TIME.fullmatch(text)
    return None if match is None else float(match.group(1)) * _SECONDS[match.group(2)]


def bytes_text(value: float | None) -> str:
    """Write bytes in decimal units, as `snapshots.budget` takes them: 1.5 GB, 375 MB."""
    if value is None:
        return DASH
    size = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return _three(size, unit)
        size /= 1000
    return _three(size, "TB")


def count_text(value: float | None) -> str:
    """Write a count: 11.2 M, 4.1 k, 37."""
    if value is None:
        return DASH
    size = float(value)
    for unit in ("", "k", "M", "G"):
        if abs(size) < 999.5:
            return _three(size, unit).rstrip()
        size /= 1000
    return _three(size, "T")


def seconds_text(value: float | None) -> str:
    """Write a time: 0.42 s, 8.1 s, 3 min 20 s, 2 h 05 min."""
    if value is None:
        return DASH
    seconds = float(value)
    if seconds == 0:
        return "0 s"
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds < 0.95 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest:02d} min" if rest else f"{hours} h"


def percent_text(value: float | None, digits: int = 1) -> str:
    """Write a share of one: 97.3 %."""
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def rate_text(value: float) -> str:
    """Write how many a second: 1,234, and below ten with two digits: 0.42."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


def metric_text(metric: str, value: float | None) -> str:
    """Write a metric: a share of one as 97.30 %, anything else with four decimals."""
    if value is None:
        return DASH
    return percent_text(value, 2) if METRICS[metric].share else f"{value:.4f}".replace("-", "−")


def score_text(metrics: Mapping[str, float], *, named: bool = False) -> str:
    """Write what a network was scored: its accuracy or what its targets have in the place of it, of language its loss;
    empty without either.

    `named` puts the word before it, for where no heading has it; what is neither accuracy nor loss is always named."""
    metric = "loss" if "perplexity" in metrics else leading(metrics)
    value = metrics.get(metric)
    if value is None:
        return ""
    row, text = METRICS[metric], metric_text(metric, value)
    if named:
        return f"{row.title} {text}"
    return text if metric in ("accuracy", "loss") else f"{row.short} {text}"


def source_words(source: str | None, *, text: bool) -> str:
    """Name where a stage's input comes from. Tasks call the raw input `images`, whatever it is."""
    return "text" if text and source == "images" else source or ""


def ratio_text(value: float | None) -> str:
    """Write a ratio: 1.25×."""
    return DASH if value is None else f"{value:.2f}×"


def _three(size: float, unit: str) -> str:
    """Write about three digits, no decimals on whole numbers."""
    if size == int(size) or abs(size) >= 100:
        return f"{size:.0f} {unit}"
    return f"{size:.1f} {unit}" if abs(size) >= 10 else f"{size:.2f} {unit}"


def human_bytes(count: float) -> str:
    """Write predicted bytes with one decimal: `1.5 GB`, in decimal units, as budgets are written."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: int) -> str:
    """Write a predicted count with two decimals: `11.20 M`, `8.03 G`; empty for zero."""
    if not count:
        return ""
    if count < 1000:
        return f"{count:.0f}"
    size = count / 1000
    for unit in ("k", "M"):
        if size < 1000:
            return f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} G"


def human_flops(count: float) -> str:
    """Write floating point operations: `3.2 T`; empty for zero."""
    if not count:
        return ""
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} E"


def human_seconds(seconds: float) -> str:
    """Write a predicted time, days too: `45 s`, `12 min 30 s`, `3 h 05 min`, `12 d 4 h`."""
    whole = round(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def human_age(seconds: float) -> str:
    """Write an age in its largest fitting unit: 45 s, 12 m, 3 h, 9 d."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("m", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"
