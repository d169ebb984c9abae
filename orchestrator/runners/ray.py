"""Run nodes on Ray: a pool of worker actors, one per device slot, torch imported once in each.

Actors restart themselves (`max_restarts=-1`)
but tasks are never retried by Ray: retries, attempt ids and backoff belong to the driver.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.metrics import Gauge

from cache_store.errors import SegpropError, UserError, first_line
from orchestrator.runners import metrics
from orchestrator.runners.base import Event, Failed, Succeeded
from orchestrator.runners.machines import Machine, matching, room, settle, unmatched
from orchestrator.runners.ray_cluster import Process, connect, disconnect, living_nodes, machine_of, probe_store
from orchestrator.runners.ray_worker import worker_class
from orchestrator.runners.versions import differences, versions
from workers.control import NOTHING, Update
from workers.specs.orders import WorkOrder

#: An actor that has not answered its first call by then will not (import of torch included).
START_DEADLINE_S = 180.0
#: Replaces that deadline where machines come and go: so long an autoscaler may take to bring one. Where it is set,
#: what the cluster lacks at the start is waited for instead of refused.
PATIENCE = "SEGPROP_WAIT_FOR_WORKERS_S"
POLL_EVERY_S = 1.0
#: With many slots each is asked less often, so that asking stays a small part of the driver's work.
POLLS_A_SECOND = 200


@dataclass
class _Slot:
    actor: ActorHandle
    #: Outstanding `ready()` call: the slot takes no order until it is answered.
    ping: Any | None
    since: float
    order: WorkOrder | None = None
    result: Any | None = None
    #: Where it answered from, and the latest node it was given.
    machine: str | None = None
    last: str = ""


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """What a `RayRunner` is asked for. On a running cluster `slots`, `threads` and `device` may be `auto`: settled by
    `start` from its machines and `chains`. A cluster of our own needs numbers."""

    slots: int | str
    threads: int | str
    device: str
    #: A running cluster, else RAY_ADDRESS, else a cluster of our own.
    address: str | None = None
    #: Ray is connected already (tests, sweeps) and stays connected on `close`.
    started: bool = False
    #: Stages that can run side by side.
    chains: int = 1
    #: Slots' worth of resources that a gang takes beside them.
    ranks: int = 0
    #: What all machines of a running cluster have to see.
    store: str | None = None
    #: Only machines with these.
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerator: str | None = None
    #: When no worker has come (back) for so many seconds, the run ends.
    deadline_s: float = START_DEADLINE_S


class RayRunner:
    """Runs each order on a slot: an actor with its own threads and device."""

    def __init__(self, settings: RaySettings) -> None:
        self._settings = settings
        self.threads = settings.threads if isinstance(settings.threads, int) else 1
        self.device = settings.device
        self._slots_wanted = settings.slots if isinstance(settings.slots, int) else 1
        self._ranks_wanted = settings.ranks
        self._patience = _seconds(PATIENCE)
        self._deadline_s = self._patience if self._patience is not None else settings.deadline_s
        self._by_node: dict[str, _Slot] = {}
        self._waiting = 0
        self._versions = versions()
        self._slots: list[_Slot] = []
        self._started: frozenset[Process] = frozenset()
        self._latest: dict[str, Update] = {}
        self._polls: dict[str, Any] = {}
        self._polled = 0.0
        self._gauges: dict[str, Gauge] = {}

    @property
    def slots(self) -> int:
        return len(self._slots)

    def start(self) -> None:
        wanted = self._settings
        if not wanted.started:
            self._started = connect(wanted.address, (self._slots_wanted + self._ranks_wanted) * self.threads)
        nodes = living_nodes()
        every = [machine_of(node) for node in nodes]
        machines = matching(every, wanted.labels, wanted.accelerator)
        if not machines and self._patience is None:
            raise UserError(unmatched(every, wanted.labels, wanted.accelerator))
        self._take_stock(machines)
        if self._patience is None:
            self._require_resources(machines)
        if wanted.store is not None and len(nodes) > 1:
            probe_store(wanted.store, nodes)
        self._slots = [self._new_slot() for _ in range(self._slots_wanted)]
        self._gauges = {name: Gauge(name, meaning, ("slot",)) for name, meaning in metrics.MEANINGS.items()}

    def _take_stock(self, machines: list[Machine]) -> None:
        wanted = self._settings
        settled = settle(
            machines, slots=wanted.slots, threads=wanted.threads, device=wanted.device, chains=wanted.chains
        )
        self._slots_wanted, self.threads, self.device = settled.count, settled.threads, settled.device

    def _require_resources(self, machines: list[Machine]) -> None:
        """Raise UserError that says what is missing, before anything is asked for: Ray lets an infeasible actor wait
        without a word."""
        have = {"CPU": sum(machine.cpus for machine in machines), "GPU": sum(machine.gpus for machine in machines)}
        request = self._request()
        count, asked = self._slots_wanted + self._ranks_wanted, f"{self._slots_wanted} slots"
        lower = "lower resources.slots or resources.threads, or add machines"
        if self._ranks_wanted:
            asked += f" and a gang of {self._ranks_wanted}"
            lower = "lower resources.slots, resources.gang.size or resources.threads, or add machines"
        for resource, each in request.items():
            total = each * count
            if have[resource] < total:
                raise UserError(
                    f"resources: {asked} need {total:g} {resource}, the cluster has {have[resource]:g}; {lower}"
                )
        fit = room(machines, request["CPU"], request.get("GPU", 0))
        if fit < count:
            size = " and ".join(f"{each:g} {resource}" for resource, each in request.items())
            raise UserError(
                f"resources: {asked} of {size} each, but only {fit} fit into the cluster's "
                f"{len(machines)} machines; {lower}"
            )

    def _request(self) -> dict[str, float]:
        request: dict[str, float] = {"CPU": self.threads}
        if self.device == "cuda":
            request["GPU"] = 1
        return request

    def _new_slot(self) -> _Slot:
        request = self._request()
        options: dict[str, Any] = {"num_cpus": request["CPU"], "num_gpus": request.get("GPU", 0)}
        if self._settings.labels:
            options["label_selector"] = dict(self._settings.labels)
        if self._settings.accelerator is not None:
            options["accelerator_type"] = self._settings.accelerator
        actor = worker_class.options(**options).remote()
        return _Slot(actor, actor.ready.remote(), time.monotonic())

    def free(self, *, together: bool = False) -> int:
        return 0 if together else sum(slot.order is None and slot.ping is None for slot in self._slots)

    def submit(self, order: WorkOrder) -> None:
        slot = next(slot for slot in self._slots if slot.order is None and slot.ping is None)
        slot.order = order
        # Known until the slot's next order: whoever hears of an order's end asks where it was.
        self._by_node.pop(slot.last, None)
        self._by_node[order.key], slot.last = slot, order.key
        slot.result = slot.actor.run.remote(order)

    def wait(self, timeout_s: float) -> list[Event]:
        return self._wait(timeout_s)

    def _wait(self, timeout_s: float, beside: Sequence[Any] = ()) -> list[Event]:
        """Wait as `wait` does; end early, too, when one of the object references `beside` is there."""
        outstanding = [*beside]
        outstanding += [slot.result for slot in self._slots if slot.result is not None]
        outstanding += [slot.ping for slot in self._slots if slot.ping is not None]
        if not outstanding:
            time.sleep(timeout_s)
            return []
        done, _ = ray.wait(outstanding, num_returns=1, timeout=timeout_s)
        if done:
            done, _ = ray.wait(outstanding, num_returns=len(outstanding), timeout=0)
        events: list[Event] = []
        for slot in self._slots:
            if slot.ping is not None:
                self._check_start(slot, slot.ping in done)
            elif slot.order is not None and slot.result in done:
                events.append(self._finish(slot, slot.order))
        return events

    def _finish(self, slot: _Slot, order: WorkOrder) -> Event:
        result = slot.result
        slot.order = slot.result = None
        self._latest.pop(order.key, None)
        self._polls.pop(order.key, None)
        try:
            return Succeeded(order.key, ray.get(result))
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            return Failed(order.key, cause)
        except RayError as error:
            # Killed, out of memory, machine gone. The actor restarts by itself; calls during that fail at once,
            # so the slot takes orders again only when it has answered.
            slot.ping, slot.since = slot.actor.ready.remote(), time.monotonic()
            return Failed(order.key, SegpropError(f"worker lost: {first_line(error)}"), lost=True)

    def _check_start(self, slot: _Slot, answered: bool) -> None:
        deadline = self._deadline_s
        # A machine may have gone for good. As long as one slot is there the run goes on, and the others may come late.
        now = time.monotonic()
        late = all(other.ping is not None and now - other.since > deadline for other in self._slots)
        if answered:
            try:
                found = ray.get(slot.ping)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            except RayError as error:
                if late:
                    raise SegpropError(self._nobody_left(first_line(error))) from error
                time.sleep(0.1)  # restarting: calls fail instead of waiting
                slot.ping = slot.actor.ready.remote()
                return
            slot.ping, slot.machine = None, found["machine"]
            self._compare(found)
        elif late:
            raise SegpropError(self._nobody_left("is the cluster busy with other jobs?"))

    def _compare(self, found: Mapping[str, Any]) -> None:
        """Raise UserError when a worker, by its own account, runs something else than the driver."""
        different = differences(self._versions, found["versions"])
        if different:
            raise UserError(
                f"the worker on {found['machine']} does not run the driver's program ({socket.gethostname()}): "
                f"{'; '.join(different)}. Numbers and formats are the same only with the same versions: install "
                "one environment on all machines, or submit with --working-dir"
            )

    def _machines(self) -> list[Machine]:
        """Return the cluster's machines, as they are now, of those that are asked for."""
        every = [machine_of(node) for node in living_nodes()]
        return matching(every, self._settings.labels, self._settings.accelerator)

    def _nobody_left(self, why: str) -> str:
        """Say what there is, beside what is needed, when no worker has come (back) in time."""
        machines = self._machines()
        request = self._request()
        size = " and ".join(f"{each:g} {resource}" for resource, each in request.items())
        have = (
            f"{sum(machine.cpus for machine in machines):g} CPU and {sum(machine.gpus for machine in machines):g} GPU"
        )
        fit = room(machines, request["CPU"], request.get("GPU", 0))
        return (
            f"no worker has come (back) within {self._deadline_s:g} s ({why}). A worker needs {size} on one machine; "
            f"{len(machines)} machines with {have} are left, room for {fit}. Finished work and checkpoints are kept: "
            "add machines and run the same command to go on"
        )

    def progress(self) -> dict[str, Update]:
        """Return the latest progress. Answers lag by at most one poll; a worker being lost keeps its last one."""
        now = time.monotonic()
        for node_id, poll in list(self._polls.items()):
            try:
                self._latest[node_id] = ray.get(poll, timeout=0)
            except GetTimeoutError:
                continue
            except RayActorError:
                self._latest.pop(node_id, None)
            del self._polls[node_id]
        if now - self._polled >= max(POLL_EVERY_S, len(self._slots) / POLLS_A_SECOND):
            self._polled = now
            self._gauges[metrics.QUEUE].set(self._waiting, {"slot": "0"})
            for index, slot in enumerate(self._slots):
                update = None
                if slot.order is not None:
                    if slot.order.key not in self._polls:
                        self._polls[slot.order.key] = slot.actor.poll.remote()
                    update = self._latest.get(slot.order.key, NOTHING)
                for name, value in metrics.values(update).items():
                    self._gauges[name].set(value, {"slot": str(index)})
        return self._latest

    def waiting(self, tasks: int) -> None:
        self._waiting = tasks

    def machine(self, node_id: str) -> str | None:
        slot = self._by_node.get(node_id)
        return None if slot is None else slot.machine

    def stop(self) -> None:
        for slot in self._slots:
            if slot.order is not None:
                slot.actor.stop.remote()

    def close(self) -> None:
        for slot in self._slots:
            ray.kill(slot.actor)
        self._slots = []
        if not self._settings.started:
            disconnect(self._started)
            self._started = frozenset()


def _seconds(variable: str) -> float | None:
    """Read a duration from the environment, None where it is not set; UserError when it is not one."""
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UserError(f"{variable}: {text!r}; allowed: seconds, above 0")
    return value
