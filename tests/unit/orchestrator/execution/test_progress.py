"""`orchestrator.progress`: what people see while a run goes on, and at its end."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_run import make_summary
from summaries import read

from orchestrator.environment import describe_environment
from orchestrator.progress import Progress, completed, describe
from orchestrator.reports.tables.result_table import print_table
from workers.control import Update


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


FIELDS: dict[str, Any] = {
    "phase": "train",
    "epoch": 3,
    "epochs": 8,
    "step": 5,
    "steps": 20,
    "rate": 1234.0,
    "seconds_left": 75.0,
    "loss": 0.4321,
    "accuracy": 0.871,
    "hits": 40,
    "misses": 2,
}


def test_a_line_names_everything_the_worker_sent() -> None:
    assert describe(Update(**FIELDS)) == (
        "epoch 3/8, step 5/20, loss 0.4321, accuracy 87.1 %, 1,234/s, cache 40 hits, 2 misses, 1 min 15 s left"
    )


def test_every_field_may_be_missing() -> None:
    assert describe(Update()) == "working"
    for key in FIELDS:
        assert describe(Update(**{name: value for name, value in FIELDS.items() if name != key}))
        assert describe(Update(**{key: FIELDS[key]}))
    assert describe(Update(**dict.fromkeys(FIELDS))) == "working"


def test_share_done_counts_epochs_steps_or_samples() -> None:
    assert completed(Update(epoch=3, epochs=8, step=5, steps=20)) == (2 + 0.25) / 8
    assert completed(Update(done=50, total=200)) == 0.25
    assert completed(Update(loss=1.0)) is None


def test_plain_output_speaks_at_most_every_ten_seconds_a_task() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(2, stream=stream, clock=clock) as progress:
        progress.started("a")
        for _ in range(95):
            clock.now += 0.5
            progress.update("a", Update(**FIELDS))
        progress.finished("a", 47.5, reused=False)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "a: started"
    assert lines[-1] == "a: done in 48 s (1/2)"
    assert len(lines) == 2 + 4
    assert all(line.startswith("a: epoch 3/8") for line in lines[1:-1])


def test_plain_output_has_no_control_codes_and_no_wrapping() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(1, stream=stream, clock=clock) as progress:
        progress.started("x" * 300)
        progress.failed("x" * 300, "[red]no[/red] space " + "y" * 300)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "[red]no[/red]" in text
    assert len(text.splitlines()) == 2


def test_quiet_leaves_failures_and_notes() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(3, stream=stream, quiet=True, clock=clock) as progress:
        progress.started("a")
        clock.now += 60
        progress.update("a", Update(**FIELDS))
        progress.finished("a", 1.0, reused=False)
        progress.note("worker lost, trying again")
        progress.failed("b", "broken")
    assert stream.getvalue().splitlines() == ["worker lost, trying again", "b: failed: broken"]


def test_a_terminal_gets_a_live_table_that_is_gone_afterwards() -> None:
    stream = Terminal()
    with Progress(4, 1, stream=stream) as progress:
        progress.started("segprop/stage2-seg2")
        progress.update("segprop/stage2-seg2", Update(**FIELDS))
        progress.finished("e2e/e2e", 3.0, reused=True)
    text = stream.getvalue()
    assert "epoch 3/8" in text
    assert "2 of 4 tasks" in text
    assert "e2e/e2e: reused" in text
    progress.close()


def test_the_final_table_has_one_aligned_row_a_regime(tmp_path: Path) -> None:
    stream = io.StringIO()
    print_table(read(make_summary(tmp_path, epochs=2)), stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("regime")
    assert [line.split()[0] for line in lines[1:]] == ["End-to-end", "Layer-wise", "SegProp"]
    column = lines[0].index("test acc.") + len("test acc.")
    assert all(line[column - 2 : column] == " %" for line in lines[1:])


def test_the_final_table_is_boxed_in_a_terminal(tmp_path: Path) -> None:
    stream = Terminal()
    print_table(read(make_summary(tmp_path, epochs=2)), stream)
    assert "│" in stream.getvalue()


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_final_table_is_whole_in_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream, plain = Terminal(), io.StringIO()
    print_table(read(make_summary(tmp_path, epochs=2)), stream)
    print_table(read(make_summary(tmp_path, epochs=2)), plain)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert max(map(len, shown.splitlines())) <= columns
    assert "…" not in shown
    cells = {cell for line in plain.getvalue().splitlines() for cell in re.split(r"  +", line.strip())}
    boxed = {cell.strip() for cell in re.split(r"[│┃]", shown.replace("\n", "│"))}
    assert cells <= boxed


def test_a_done_line_says_what_it_came_to() -> None:
    stream = io.StringIO()
    with Progress(3, stream=stream) as progress:
        progress.finished("e2e/e2e", 3.0, reused=False, score="accuracy 81.25 %")
        progress.finished("data", 3.0, reused=False)
    assert stream.getvalue().splitlines() == [
        "e2e/e2e: done in 3.0 s, accuracy 81.25 % (1/3)",
        "data: done in 3.0 s (2/3)",
    ]


def test_a_language_model_reports_tokens_and_slow_samples_are_no_zero() -> None:
    assert describe(Update(rate=0.42, tokens_rate=53.7)) == "54 tokens/s"
    assert describe(Update(rate=0.42)) == "0.42/s"


def test_environment_holds_versions_and_hardware_but_no_paths() -> None:
    environment = describe_environment()
    assert environment.packages["numpy"]
    assert (environment.cores or 0) >= 1
    assert (environment.memory_bytes or 0) > 1 << 28
    assert sys.prefix not in str(environment)
    assert str(Path.home()) not in str(environment)
