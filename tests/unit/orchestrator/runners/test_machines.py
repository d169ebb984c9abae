"""What `auto` slots mean on a cluster: every slot fits into one machine."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from cache_store.errors import SegpropError, UserError
from orchestrator.runners import ray as ray_runner
from orchestrator.runners.base import Failed
from orchestrator.runners.machines import Machine, Slots, matching, room, settle, unmatched
from orchestrator.runners.ray import RayRunner, RaySettings
from workers.specs.orders import WorkOrder

CPU_HEAD = Machine(0)
MACHINES = st.lists(
    st.builds(Machine, st.integers(0, 64).map(float), st.integers(0, 8).map(float)), min_size=1, max_size=12
)


@pytest.mark.parametrize(
    ("machines", "asked", "expected"),
    [
        # A head that takes no work, two workers of one core: the smoke test of deploy/.
        ([CPU_HEAD, Machine(1), Machine(1)], {"chains": 3}, Slots(2, 1, "cpu")),
        # One regime alone gets one slot, as wide as a machine and not as wide as two.
        ([CPU_HEAD, Machine(4), Machine(4)], {"chains": 1}, Slots(1, 4, "cpu")),
        ([CPU_HEAD, Machine(4), Machine(4)], {"chains": 3}, Slots(3, 2, "cpu")),
        ([Machine(4), Machine(2)], {"threads": 2}, Slots(3, 2, "cpu")),
        ([Machine(4), Machine(2)], {"slots": 3}, Slots(3, 2, "cpu")),
        # The driver's machine has no GPU, the workers do.
        ([CPU_HEAD, Machine(8, 4), Machine(8, 4)], {}, Slots(8, 1, "cuda")),
        ([CPU_HEAD, Machine(8, 4), Machine(8, 4)], {"device": "cpu", "chains": 2}, Slots(2, 8, "cpu")),
        # Cores are shared out among the GPUs, but for one; no GPU goes without, none gets more than it can use.
        ([CPU_HEAD, Machine(32, 4)], {}, Slots(4, 7, "cuda")),
        ([Machine(64, 1), Machine(16, 4)], {}, Slots(5, 3, "cuda")),
        ([Machine(64, 1)], {}, Slots(1, 8, "cuda")),
        ([Machine(4, 8)], {}, Slots(4, 1, "cuda")),
        # A head that has no core at all takes none from the others.
        ([CPU_HEAD, Machine(8, 1)], {}, Slots(1, 7, "cuda")),
        ([CPU_HEAD, Machine(1, 1)], {}, Slots(1, 1, "cuda")),
        ([Machine(4, 8)], {"threads": 2}, Slots(2, 2, "cuda")),
        # What is given stays as it is, fit or not.
        ([Machine(2)], {"slots": 3, "threads": 4}, Slots(3, 4, "cpu")),
    ],
)
def test_auto_is_settled_from_the_machines(
    machines: list[Machine], asked: dict[str, int | str], expected: Slots
) -> None:
    options = {"slots": "auto", "threads": "auto", "device": "auto", "chains": 3, **asked}
    assert settle(machines, **options) == expected  # type: ignore[arg-type]


@given(MACHINES, st.integers(1, 5), st.sampled_from(["auto", "cpu", "cuda"]))
def test_automatic_slots_fit_wherever_anything_fits(machines: list[Machine], chains: int, device: str) -> None:
    slots = settle(machines, slots="auto", threads="auto", device=device, chains=chains)
    assert slots.count >= 1
    assert slots.threads >= 1
    gpus = 1 if slots.device == "cuda" else 0
    if room(machines, 1, gpus):
        assert room(machines, slots.threads, gpus) >= slots.count


def test_a_slot_does_not_span_machines() -> None:
    assert room([Machine(2), Machine(2)], 3) == 0
    assert room([Machine(8, 1), Machine(2, 4)], 2, 1) == 2


BIG = Machine(8, 4, {"pool": "big", "zone": "a", "ray.io/node-id": "1"}, ("H100",))
SMALL = Machine(4, 1, {"pool": "small", "zone": "a", "ray.io/node-id": "2"}, ("L4",))


@pytest.mark.parametrize(
    ("labels", "accelerator", "expected"),
    [
        ({}, None, [BIG, SMALL]),
        ({"zone": "a"}, None, [BIG, SMALL]),
        ({"pool": "big", "zone": "a"}, None, [BIG]),
        ({}, "L4", [SMALL]),
        ({"pool": "big"}, "L4", []),
        ({"pool": "none"}, None, []),
    ],
)
def test_labels_and_accelerator_choose_machines(
    labels: dict[str, str], accelerator: str | None, expected: list[Machine]
) -> None:
    assert matching([BIG, SMALL], labels, accelerator) == expected


def test_what_no_machine_has_is_said_with_what_there_is() -> None:
    machines = [BIG, SMALL]
    assert unmatched(machines, {"pool": "huge"}, None) == (
        "resources.labels: no machine of the cluster has pool: huge; there is pool: big, small"
    )
    assert unmatched(machines, {"rack": "7"}, "A100").splitlines() == [
        "resources.labels: no machine of the cluster has rack: 7; labels there are: pool, zone",
        "resources.accelerator: no machine of the cluster has A100; there is: H100, L4",
    ]
    assert unmatched(machines, {"pool": "big"}, "L4") == (
        "resources: no machine of the cluster has pool: big and L4 at once"
    )
    assert unmatched([Machine(2)], {"pool": "big"}, "L4").count("none") == 2


def node(name: str, **resources: float) -> dict[str, Any]:
    labels = {"zone": "a", "ray.io/node-id": name}
    return {"Alive": True, "NodeID": name * 8, "NodeManagerHostname": name, "Resources": resources, "Labels": labels}


def test_a_cluster_without_such_machines_is_refused_before_anything_is_asked_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [node("x", CPU=4.0, GPU=1.0, **{"accelerator_type:L4": 1.0}), node("y", CPU=4.0)]
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    runner = RayRunner(
        RaySettings(slots="auto", threads="auto", device="auto", address="head:6379", accelerator="H100")
    )
    with pytest.raises(UserError, match="no machine of the cluster has H100; there is: L4"):
        runner.start()
    # And of those that match, only these count: the other four CPUs are not for us.
    runner = RayRunner(RaySettings(slots=2, threads=4, device="cpu", address="head:6379", accelerator="L4"))
    with pytest.raises(UserError, match="2 slots need 8 CPU, the cluster has 4"):
        runner.start()


def test_a_slot_asks_ray_for_the_labels_and_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class Actor:
        @classmethod
        def options(cls, **options: Any) -> Any:
            asked.append(options)
            raise StopIteration

    monkeypatch.setattr(ray_runner, "worker_class", Actor)
    runner = RayRunner(RaySettings(slots=1, threads=2, device="cuda", labels={"zone": "a"}, accelerator="H100"))
    with pytest.raises(StopIteration):
        runner._new_slot()
    assert asked == [{"num_cpus": 2, "num_gpus": 1, "label_selector": {"zone": "a"}, "accelerator_type": "H100"}]


def test_when_no_worker_comes_back_in_time_it_is_said_what_is_needed_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [node("x", CPU=1.0), {**node("y", CPU=8.0), "Alive": False}])
    runner = RayRunner(RaySettings(slots=2, threads=2, device="cpu", deadline_s=10))
    now = time.monotonic()
    lost, busy = (ray_runner._Slot(actor=None, ping="ping", since=now - 11) for _ in range(2))  # type: ignore[arg-type]
    busy.ping = None
    runner._slots = [lost, busy]
    runner._check_start(lost, answered=False)  # one is left: the run goes on
    busy.ping, busy.since = "ping", now - 9
    runner._check_start(lost, answered=False)  # the other may still come
    busy.since = now - 11
    with pytest.raises(SegpropError) as caught:
        runner._check_start(lost, answered=False)
    for words in (
        "within 10 s",
        "needs 2 CPU on one machine",
        "1 machines with 1 CPU",
        "room for 0",
        "the same command",
    ):
        assert words in caught.value.message
    assert caught.value.exit_code == 1


def test_the_machine_of_an_order_is_known_until_its_slot_has_another(monkeypatch: pytest.MonkeyPatch) -> None:
    class Remote:
        def __getattr__(self, name: str) -> Any:
            return self

        def remote(self, *arguments: Any) -> str:
            return "ref"

    def lost(ref: Any) -> Any:
        raise ray.exceptions.ActorDiedError

    monkeypatch.setattr(ray, "get", lost)
    monkeypatch.setattr(ray, "wait", lambda refs, **options: (list(refs), []))
    runner = RayRunner(RaySettings(slots=1, threads=1, device="cpu"))
    slot = ray_runner._Slot(actor=Remote(), ping=None, since=0.0, machine="node-b")  # type: ignore[arg-type]
    runner._slots = [slot]
    order = WorkOrder("n1", "train", {}, {}, "store", "cpu", 1)
    runner.submit(order)
    (event,) = runner.wait(1.0)
    assert isinstance(event, Failed)
    assert event.lost
    assert runner.machine("n1") == "node-b"
    slot.ping = None
    runner.submit(dataclasses.replace(order, node_id="n2"))
    assert runner.machine("n1") is None
