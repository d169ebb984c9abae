"""Run stages on all ranks of a Ray Train gang, and everything else on the slots beside it.

One `TorchTrainer.fit()` costs half a minute, so it is called once: the train function of each rank is a loop over
orders that the driver puts into a mailbox actor, and the gang serves stage after stage. Where there are no slots beside
it (a device is either a rank's or a slot's), idle ranks do the work of slots.

A gang with a lost rank is of no use: Ray Train takes it down, its order has failed as `lost`, and a new one is started,
of the size that still fits where the size is `auto`.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cache_store.errors import SegpropError
from orchestrator.runners import metrics
from orchestrator.runners.base import Event, Failed, Succeeded
from orchestrator.runners.gang_rank import AGREED, Report, mailbox_class, rank_main
from orchestrator.runners.gang_size import settle_gang
from orchestrator.runners.machines import Machine, room
from orchestrator.runners.ray import RayRunner, RaySettings
from workers.control import NOTHING, Update
from workers.specs.orders import WorkOrder

#: A gang that has lost a rank, or was told to end, is killed when it has not ended by itself after this long.
END_S = 30.0
#: Gangs that ended without having finished anything, one after the other, before the run gives up.
MAX_LOST = 3


@dataclass
class _Gang:
    """One gang, from `fit()` to its end."""

    size: int
    mailbox: ActorHandle
    since: float = field(default_factory=time.monotonic)
    thread: threading.Thread | None = None
    #: Why it ended; set by the thread.
    ended: BaseException | None = None
    #: Rank -> what it says of itself, once it is there.
    ranks: dict[int, Any] = field(default_factory=dict)
    #: Outstanding `news()` call.
    news: Any | None = None
    #: Orders of single ranks.
    single: dict[int, WorkOrder] = field(default_factory=dict)
    #: The order of all ranks, and whether they have it already: they get it when none has another.
    order: WorkOrder | None = None
    sent: bool = False
    #: When it was found broken, or told to end.
    ending: float | None = None
    worked: bool = False

    @property
    def whole(self) -> bool:
        return self.ending is None and len(self.ranks) == self.size and self.alive

    @property
    def alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def kill(self) -> None:
        for account in self.ranks.values():
            ray.kill(account["actor"])


@dataclass(frozen=True, kw_only=True)
class GangSettings:
    """What a gang is asked for."""

    #: Ranks. On a running cluster it may be `auto`: every device that slots leave.
    size: int | str
    #: A rank that keeps the others waiting for so many seconds counts as lost.
    timeout_s: float


class GangRunner(RayRunner):
    """A `RayRunner` with a gang beside its slots. Longer than most classes: the gang's life, from launch to loss, and
    the runner's methods touch the same few fields at every step."""

    def __init__(self, settings: RaySettings, gang: GangSettings) -> None:
        size = gang.size
        super().__init__(dataclasses.replace(settings, ranks=size if isinstance(size, int) else 0))
        self._size, self._timeout_s = size, gang.timeout_s
        self._gang: _Gang | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="segprop-gang-", ignore_cleanup_errors=True)
        self._news_of_progress: Any | None = None
        self._together: dict[str, Update] = {}
        self._asked_progress = 0.0
        self._lost = 0
        self._stopping = False

    def _take_stock(self, machines: list[Machine]) -> None:
        wanted = self._settings
        settled, self._ranks_wanted = settle_gang(
            machines, size=self._size, slots=wanted.slots, threads=wanted.threads, device=wanted.device
        )
        self._slots_wanted, self.threads, self.device = settled.count, settled.threads, settled.device

    def start(self) -> None:
        super().start()
        self._launch()

    # -- the gang -------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        # Ray Train reads these from the environment alone. Ranks stay where relative paths mean what they say.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(self._deadline_s)
        gang = _Gang(self._ranks_wanted, mailbox_class.remote())
        request = self._request()
        trainer = TorchTrainer(
            rank_main,
            train_loop_config={"mailbox": gang.mailbox},
            scaling_config=ScalingConfig(
                num_workers=gang.size,
                use_gpu="GPU" in request,
                resources_per_worker=dict(request),
                label_selector=dict(self._settings.labels) or None,
                accelerator_type=self._settings.accelerator,
            ),
            run_config=RunConfig(
                name=f"gang-{time.monotonic_ns()}",
                storage_path=self._scratch.name,
                # Who tries what again is the driver's business.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
            torch_config=TorchConfig(
                backend="cpu:gloo,cuda:nccl" if "GPU" in request else "gloo", timeout_s=max(1, int(self._timeout_s))
            ),
        )

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # noqa: BLE001 - looked at in the driver's thread
                gang.ended = error

        gang.thread = threading.Thread(target=fit, name="segprop-gang", daemon=True)
        gang.thread.start()
        self._gang = gang

    def _relaunch(self, cause: str) -> None:
        """Start a new gang. With `size: auto` it uses the devices that remain."""
        if self._size == "auto":
            request = self._request()
            left = room(self._machines(), request["CPU"], request.get("GPU", 0)) - self._slots_wanted
            self._ranks_wanted = max(1, min(self._ranks_wanted, left))
        self._lost = 0 if self._gang is not None and self._gang.worked else self._lost + 1
        if self._lost >= MAX_LOST:
            raise SegpropError(f"{self._lost} gangs in a row were lost before they had finished a task: {cause}")
        self._launch()

    # -- the runner -----------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Count the slots. Where there are none beside the gang, its ranks do their work."""
        return super().slots or self._ranks_wanted

    def free(self, *, together: bool = False) -> int:
        gang = self._gang
        if together:
            return 1 if gang is not None and gang.whole and gang.order is None else 0
        count = super().free()
        if self._slots_wanted == 0 and gang is not None and gang.whole and gang.order is None:
            count += gang.size - len(gang.single)
        return count

    def submit(self, order: WorkOrder) -> None:
        gang = self._gang
        if gang is None or (order.strategy is None and super().free()):
            super().submit(order)
        elif order.strategy is not None:
            gang.order = order
            self._send(gang)
        else:
            rank = next(rank for rank in range(gang.size) if rank not in gang.single)
            gang.single[rank] = order
            gang.mailbox.post.remote(rank, order)

    def _send(self, gang: _Gang) -> None:
        """Give all ranks their order, as soon as none has one of its own: they would wait for it."""
        if gang.order is not None and not gang.sent and not gang.single:
            gang.sent = True
            for rank in range(gang.size):
                gang.mailbox.post.remote(rank, gang.order)

    def wait(self, timeout_s: float) -> list[Event]:
        gang = self._gang
        if gang is None:
            return super().wait(timeout_s)
        if gang.news is None:
            gang.news = gang.mailbox.news.remote()
        events = self._wait(timeout_s, [gang.news])
        events += self._read(gang)
        events += self._watch(gang)
        return events

    def _read(self, gang: _Gang) -> list[Event]:
        """Take in what the ranks have reported."""
        try:
            joined, reports = ray.get(gang.news, timeout=0)
        except GetTimeoutError:
            return []
        except RayError:
            gang.news = None
            self._break(gang)  # the mailbox is gone: its machine, or its process
            return []
        gang.news = None
        for rank in joined.keys() - gang.ranks.keys():
            gang.ranks[rank] = joined[rank]
            self._compare(joined[rank])
        events: list[Event] = []
        for report in reports:
            single = gang.single.get(report.rank)
            if single is not None and single.key == report.key:
                del gang.single[report.rank]
                events.append(_event(report))
            elif gang.order is not None and gang.order.key == report.key:
                events += self._read_together(gang, report)
        gang.worked |= any(isinstance(event, Succeeded) for event in events)
        self._send(gang)
        return events

    def _read_together(self, gang: _Gang, report: Report) -> list[Event]:
        if report.error is None or isinstance(report.error, AGREED):
            if report.rank != 0:
                return []
        else:
            self._break(gang)
            if report.contact:
                return []  # a consequence: whoever was first says why, or nobody who could
        gang.order, gang.sent = None, False
        return [_event(report)]

    def _break(self, gang: _Gang) -> None:
        if gang.ending is None:
            gang.ending = time.monotonic()

    def _watch(self, gang: _Gang) -> list[Event]:
        """Notice what no rank reports: a gang that does not come, that ended, or that does not end."""
        now = time.monotonic()
        if gang.alive:
            if gang.ending is not None and now - gang.ending > END_S:
                gang.kill()
            elif not gang.ranks and now - gang.since > self._deadline_s + END_S:
                raise SegpropError(self._missing(gang))
            return []
        if gang.ended is None and gang.ending is None:
            gang.ended = SegpropError("its ranks ended")
        cause = _last_line(gang.ended)
        if not gang.ranks:
            raise SegpropError(f"{self._missing(gang)} ({cause})")
        lost = [*gang.single.values(), *([gang.order] if gang.order is not None else [])]
        events: list[Event] = [
            Failed(order.key, SegpropError(f"worker lost, a rank of the gang: {cause}"), lost=True) for order in lost
        ]
        ray.kill(gang.mailbox)
        if not self._stopping:
            self._relaunch(cause)
        else:
            self._gang = dataclasses.replace(gang, single={}, order=None)
        return events

    def _missing(self, gang: _Gang) -> str:
        size = " and ".join(f"{each:g} {resource}" for resource, each in self._request().items())
        return (
            f"resources.gang: {gang.size} ranks of {size} each did not start within {self._deadline_s:g} s; "
            f"the cluster's machines have room for "
            f"{room(self._machines(), self._request()['CPU'], self._request().get('GPU', 0))} in all. "
            f"Free now: {ray.available_resources()}"
        )

    def progress(self) -> dict[str, Update]:
        """Return the latest progress. Answers lag by at most one poll, as those of slots do."""
        gang, now = self._gang, time.monotonic()
        latest = dict(super().progress())
        if self._news_of_progress is not None:
            try:
                self._together = ray.get(self._news_of_progress, timeout=0)
                self._news_of_progress = None
            except GetTimeoutError:
                pass
            except RayActorError:
                self._together, self._news_of_progress = {}, None
        if gang is None:
            return latest
        if now - self._asked_progress >= 1.0 and self._news_of_progress is None:
            self._asked_progress = now
            self._news_of_progress = gang.mailbox.latest.remote()
            update = self._together.get(gang.order.key, NOTHING) if gang.order is not None else None
            for name, value in metrics.values(update).items():
                self._gauges[name].set(value, {"slot": "gang"})
        running = {order.key for order in (*gang.single.values(), *([gang.order] if gang.order else []))}
        return latest | {key: update for key, update in self._together.items() if key in running}

    def machine(self, node_id: str) -> str | None:
        gang = self._gang
        if gang is not None:
            for rank, order in gang.single.items():
                if order.key == node_id:
                    return str(gang.ranks[rank]["machine"])
            if gang.order is not None and gang.order.key == node_id and 0 in gang.ranks:
                return str(gang.ranks[0]["machine"])
        return super().machine(node_id)

    def stop(self) -> None:
        super().stop()
        self._stopping = True
        if self._gang is not None:
            self._gang.mailbox.stop.remote()

    def close(self) -> None:
        gang = self._gang
        if gang is not None and gang.thread is not None:
            idle = gang.order is None and not gang.single and gang.whole
            if idle:
                for rank in range(gang.size):
                    gang.mailbox.post.remote(rank, None)
                gang.thread.join(timeout=END_S)
            gang.kill()
            gang.thread.join(timeout=END_S)
            ray.kill(gang.mailbox)
            self._gang = None
        super().close()
        self._scratch.cleanup()


def _event(report: Report) -> Event:
    if report.error is not None:
        return Failed(report.key, report.error)
    return Succeeded(report.key, report.commit)


def _last_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
