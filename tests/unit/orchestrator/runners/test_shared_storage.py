"""Whether machines see one store and agree about the time, and run the same program."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from cache_store.errors import SegpropError, UserError
from cache_store.storage.open import existing_storage, open_storage
from orchestrator.runners import ray as ray_runner
from orchestrator.runners import ray_cluster, shared_storage
from orchestrator.runners.ray import RayRunner, RaySettings
from orchestrator.runners.shared_storage import Answer, Question, answer, ask, clock_warnings, judge
from orchestrator.runners.versions import code_digest, differences, versions


def test_machines_that_see_the_store_are_in_order_and_nothing_of_the_probe_stays(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    question = ask(store)
    judge(question, [(name, answer(question, name, f"node-{name}")) for name in "ab"])
    assert existing_storage(store).list("") == ["store.json"]


def test_machines_that_do_not_see_it_are_named_each_with_what_it_found(tmp_path: Path) -> None:
    question = ask(str(tmp_path / "store"))
    # A mount that is missing, and one of another store.
    away = Question(str(tmp_path / "elsewhere"), question.folder, question.token)
    open_storage(str(tmp_path / "other"))
    other = Question(str(tmp_path / "other"), question.folder, question.token)
    answers = [
        ("a", answer(question, "a", "node-a")),
        ("b", answer(away, "b", "node-b")),
        ("c", answer(other, "c", "node-c")),
        # It found the token, perhaps in a copy: its own answer never got here.
        ("d", Answer("node-d", None, time.time())),
    ]
    with pytest.raises(UserError) as caught:
        judge(question, answers)
    words = caught.value.message
    assert "node-b (there is no such store)" in words
    assert "node-c (a store is there, but not this one)" in words
    assert "node-d (what it wrote is not seen here)" in words
    assert "node-a" not in words
    assert caught.value.exit_code == 2
    assert not (tmp_path / "elsewhere").exists(), "the probe creates no store"
    assert existing_storage(question.store).list("") == ["store.json"]


def test_clocks_are_compared_with_the_time_the_question_was_under_way() -> None:
    limit = shared_storage.CLOCK_WARNING_S
    answers = [
        Answer("exact", None, 105.0),
        Answer("slow", None, 100.0 - limit - 5),
        Answer("fast", None, 110.0 + limit + 7),
        Answer("tolerable", None, 110.0 + limit - 1),
    ]
    found = clock_warnings(answers, sent=100.0, received=110.0)
    assert [warning.split(";")[0] for warning in found] == [
        f"the clock of slow is {limit + 5:.0f} s behind the driver's",
        f"the clock of fast is {limit + 7:.0f} s ahead of the driver's",
    ]


def test_the_same_program_differs_in_nothing_and_a_changed_line_is_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert differences(versions(), versions()) == []
    assert {"python", "ray", "torch", "segprop"} <= set(versions())
    for package in ("orchestrator", "workers", "cache_store"):
        (tmp_path / package).mkdir()
    here = tmp_path / "orchestrator" / "runners" / "versions.py"
    monkeypatch.setattr("orchestrator.runners.versions.__file__", str(here))
    (tmp_path / "workers" / "a.py").write_text("x = 1\n")
    before = code_digest()
    (tmp_path / "workers" / "a.py").write_text("x = 2\n")
    assert code_digest() != before


def test_differences_name_both_sides_of_all_that_differs() -> None:
    here = {"python": "3.11.7", "torch": "2.15.0", "segprop": "0.1.0 (code 11111111)"}
    there = {"python": "3.11.7", "torch": "2.14.1", "segprop": "0.1.0 (code 22222222)"}
    assert differences(here, there) == [
        "torch 2.15.0 here, 2.14.1 there",
        "segprop 0.1.0 (code 11111111) here, 0.1.0 (code 22222222) there",
    ]
    assert differences(here, {key: value for key, value in here.items() if key != "torch"}) == [
        "torch 2.15.0 here, absent there"
    ]
    assert differences({"segprop": "0.1.0 (code 1)"}, {"segprop": "? (code 1)"}) == []


def test_a_worker_of_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = RayRunner(RaySettings(slots=1, threads=1, device="cpu"))
    other = {**versions(), "torch": "1.0"}
    monkeypatch.setattr(ray, "get", lambda ref: {"machine": "node-b", "versions": other})
    slot: Any = ray_runner._Slot(actor=None, ping="answered", since=time.monotonic())
    runner._slots = [slot]
    with pytest.raises(UserError, match=r"the worker on node-b does not run the driver's program .*torch .* here, 1.0"):
        runner._check_start(slot, answered=True)


def test_a_cluster_of_another_version_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.50.0\n    Python: 3.12.1")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError, match=r"(?s)does not fit the cluster at 192\.0\.2\.1:6379.*Ray: 2\.50\.0"):
        RayRunner(RaySettings(slots=1, threads=1, device="cpu", address="192.0.2.1:6379")).start()


@pytest.mark.parametrize("raised", [AuthenticationError("no authentication token was found"), ConnectionError("no")])
def test_a_cluster_that_asks_for_a_token_which_is_not_there_is_bad_input(
    raised: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError, match=r"no Ray cluster lets us in at 192\.0\.2\.1:6379 .*RAY_AUTH_MODE=token set"):
        ray_cluster.connect("192.0.2.1:6379", 1)
    monkeypatch.setattr(ray_cluster, "secure_token", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SegpropError, match="Ray does not start on this machine: no"):
        ray_cluster.connect(None, 1)


def test_a_ray_that_does_not_come_up_in_its_own_time_is_started_again_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[dict[str, Any]] = []
    good = 3

    def start(**options: Any) -> None:
        tries.append(options)
        if len(tries) < good:
            raise Exception("The current node timed out during startup.\nMore words.")  # as Ray does

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    ray_cluster.init({"address": "local"}, attempts=3)
    assert tries == [{"address": "local"}] * 3
    tries.clear()
    good = 9
    with pytest.raises(SegpropError, match="Ray does not start on this machine: The current node timed out"):
        ray_cluster.init({"address": "local"}, attempts=3)
    assert len(tries) == 3
