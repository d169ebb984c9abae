"""One driver a run: refused beside a living one, at once after a dead one, within a bound where nobody can tell."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache_store.errors import RunTaken, StorageFull
from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage
from orchestrator.execution import run_lease as module
from orchestrator.execution.beat import Beat, RunningTask
from orchestrator.execution.run_lease import Claim, Held, Identity, LeaseTiming, RunLease, read_held
from workers.control import Update

TIMES = ("stale_s", "beat_s", "sleep")
PLAN = "0123456789abcdef"


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}")


def acquire(storage: Storage, digest: str = PLAN, **options: Any) -> RunLease:
    timing = LeaseTiming(**{"beat_s": 60.0, **{name: options.pop(name) for name in TIMES if name in options}})
    say = {"say": options.pop("say")} if "say" in options else {}
    return RunLease.acquire(storage, Claim(digest, "quickstart", "/runs/quickstart", **options), timing, **say)


def held(storage: Storage) -> Held:
    found = read_held(storage, PLAN)
    assert found is not None
    return found


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every identity made meanwhile is of another machine."""
    own = Identity.own()
    monkeypatch.setattr(Identity, "own", classmethod(lambda cls: replace(own, host="node-b", boot="another")))


def test_a_second_driver_is_refused_and_told_who_where_since_when_and_what_to_do(storage: Storage) -> None:
    first = acquire(storage)
    with pytest.raises(RunTaken) as caught:
        acquire(storage)
    words = caught.value.message
    for part in ("quickstart", f"driver {os.getpid()} on ", "since 20", "segprop status", "--take-over", "Nothing was"):
        assert part in words
    assert caught.value.exit_code == 1
    first.release("done")
    second = acquire(storage)
    assert held(storage).number == 2
    second.release("failed")
    assert held(storage).state == "failed"


def test_a_killed_driver_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    folder = str(tmp_path / "store")
    code = (
        "import os, signal\n"
        "from cache_store.storage.open import open_storage\n"
        "from orchestrator.execution.run_lease import Claim, RunLease\n"
        f"RunLease.acquire(open_storage({folder!r}), Claim({PLAN!r}, 'quickstart', '/runs/quickstart'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[4], check=False).returncode == -9

    def sleep(seconds: float) -> None:
        raise AssertionError("there is nothing to wait for")

    acquire(open_storage(folder), sleep=sleep).release("done")


def test_a_pid_that_belongs_to_somebody_else_by_now_is_no_driver() -> None:
    own = Identity.own()
    assert own.is_alive() is True
    assert own.born is not None
    assert replace(own, born=own.born - 1).is_alive() is False
    assert replace(own, host="node-b").is_alive() is None
    assert replace(own, boot="before the restart").is_alive() is None
    assert replace(own, namespace="pid:[1]").is_alive() is None


@pytest.mark.usefixtures("elsewhere")
def test_a_silent_driver_of_another_machine_is_waited_for_no_longer_than_the_bound(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire(storage)
    now = held(storage).seen
    slept: list[float] = []
    monkeypatch.setattr(type(storage), "now", lambda self: now + sum(slept))
    said: list[str] = []
    acquire(storage, stale_s=10.0, sleep=slept.append, say=said.append).release("done")
    assert sum(slept) == pytest.approx(10.0, abs=module.LOOK_S)
    assert len(said) == 1
    assert "node-b" in said[0]


@pytest.mark.usefixtures("elsewhere")
def test_a_driver_of_another_machine_that_gives_a_sign_of_life_keeps_its_run(storage: Storage) -> None:
    first = acquire(storage)

    def sleep(seconds: float) -> None:
        threading.Event().wait(0.02)  # file times have a resolution
        first._beat("running")

    with pytest.raises(RunTaken, match="sign of life"):
        acquire(storage, sleep=sleep)
    assert held(storage).number == 1


def test_a_driver_that_was_taken_over_notices_and_leaves_the_last_word_to_the_other(storage: Storage) -> None:
    first = acquire(storage, beat_s=0.02)
    second = acquire(storage, take_over=True)
    assert first._thread is not None
    first._thread.join(timeout=20)
    assert first.superseded
    assert not second.superseded
    first.release("stopped")
    assert held(storage).number == 2
    assert held(storage).state == "running"
    second.release("done")
    assert [name for name in storage.list(f"runs/{PLAN}") if "000001" in name and name.startswith("holder")] == []


def test_of_many_that_want_a_run_at_once_one_gets_it(storage: Storage) -> None:
    for _ in range(10):  # each time after the one before has let it go
        taken: list[RunLease] = []
        refused: list[RunTaken] = []
        barrier = threading.Barrier(8)

        def want(
            barrier: threading.Barrier = barrier, taken: list[RunLease] = taken, refused: list[RunTaken] = refused
        ) -> None:
            barrier.wait()
            try:
                taken.append(acquire(storage))
            except RunTaken as error:
                refused.append(error)

        threads = [threading.Thread(target=want) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1
        assert len(refused) == 7
        taken[0].release("done")


def test_what_a_driver_reports_is_there_for_everybody_and_after_its_end(storage: Storage) -> None:
    lease = acquire(storage)
    beat = Beat(running={"n1": RunningTask(2, "node-b", 5.0, Update(epoch=1))}, failed={"n2": "full"})
    lease.report(beat)
    lease._beat("running")
    assert held(storage).beat == beat
    lease.release("stopped")
    assert held(storage).ended
    assert held(storage).beat == beat


def test_a_run_directory_in_use_with_other_settings_is_refused(storage: Storage) -> None:
    first = acquire(storage, "fewer-regimes")
    with pytest.raises(RunTaken, match="with other settings"):
        acquire(storage, before="fewer-regimes")
    first.release("done")
    acquire(storage, before="fewer-regimes").release("done")


def test_a_store_that_takes_no_sign_of_life_does_not_end_the_run(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lease = acquire(storage)

    def full(*arguments: Any, **options: Any) -> int:
        raise StorageFull("no space left")

    monkeypatch.setattr(storage, "write", full)
    with caplog.at_level("WARNING", logger="segprop"):
        lease._beat("running")
        lease._beat("running")
    assert [record.getMessage() for record in caplog.records] == [
        "no sign of life can be left in the store: no space left"
    ]
    lease.release("failed")


def test_damaged_records_do_not_block_a_run(storage: Storage) -> None:
    storage.write(f"runs/{PLAN}/holder-000004.json", b"{not json")
    storage.write(f"runs/{PLAN}/beat-000004.json", b'{"state": 7}')
    lease = acquire(storage)
    assert held(storage).number == 5
    lease.release("done")
