"""Run one rank of a gang: take an order, execute it, report."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from cache_store.errors import Interrupted, SegpropError, TrainingDiverged
from cache_store.records.nodes import Commit
from orchestrator.runners.ray_api import actor_class
from orchestrator.runners.versions import versions
from workers.control import NOTHING, ThreadControl, Update
from workers.specs.orders import WorkOrder

#: A rank asks again after this long without an order; the driver, after this long without news.
TAKE_S = 10.0
#: A rank that gets no answer from the mailbox for this long is alone, and ends.
ALONE_S = 60.0
#: What every rank raises, or none: the gang is whole after it.
AGREED = (Interrupted, TrainingDiverged)
Json = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What became of an order on one rank. `contact`: it failed only because another rank was lost."""

    rank: int
    #: Of the order (`WorkOrder.key`).
    key: str
    #: None of a rank but the first, where all work together.
    commit: Commit | None = None
    error: BaseException | None = None
    contact: bool = False


class Mailbox:
    """Orders to ranks, reports back. Holds no state that outlives its gang."""

    def __init__(self) -> None:
        self._orders: dict[int, asyncio.Queue[WorkOrder | None]] = {}
        self._reports: list[Report] = []
        self._joined: dict[int, Any] = {}
        self._news = asyncio.Event()
        self._latest: dict[str, Update] = {}
        self._stopping = False

    async def join(self, rank: int, account: Json) -> None:
        """Note that a rank is there. `account`: its `actor`, `machine` and `versions`."""
        self._joined[rank] = account
        self._news.set()

    async def post(self, rank: int, order: WorkOrder | None) -> None:
        """Put an order into a rank's queue. `None`: there is nothing more to do."""
        await self._queue(rank).put(order)

    async def take(self, rank: int) -> tuple[bool, WorkOrder | None]:
        """Return (whether there was an order, the order)."""
        try:
            return True, await asyncio.wait_for(self._queue(rank).get(), TAKE_S)
        except TimeoutError:
            return False, None

    async def report(self, report: Report) -> None:
        self._reports.append(report)
        self._latest.pop(report.key, None)
        self._news.set()

    async def news(self) -> tuple[dict[int, Any], list[Report]]:
        """Return the ranks that are there, and the reports since the last call; at once when there are any."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), TAKE_S)
        self._news.clear()
        reports, self._reports = self._reports, []
        return dict(self._joined), reports

    async def progress(self, key: str, update: Update) -> bool:
        """Take in how far an order is; return True once everything is to stop."""
        if update != NOTHING:
            self._latest[key] = update
        return self._stopping

    async def latest(self) -> dict[str, Update]:
        return self._latest

    async def stop(self) -> None:
        self._stopping = True

    def _queue(self, rank: int) -> asyncio.Queue[WorkOrder | None]:
        return self._orders.setdefault(rank, asyncio.Queue())


mailbox_class = actor_class(Mailbox, num_cpus=0, max_restarts=0)


class RankControl(ThreadControl):
    """Progress of a rank goes to the mailbox, and with it comes whether to stop."""

    def __init__(self, mailbox: ActorHandle, order: WorkOrder, *, speaks: bool) -> None:
        super().__init__()
        self._mailbox, self._order, self._speaks = mailbox, order, speaks

    def should_stop(self) -> bool:
        if not self._speaks:
            return False  # the first rank decides for all
        stop: bool = ray.get(self._mailbox.progress.remote(self._order.key, self.latest()), timeout=ALONE_S)
        return stop


def rank_main(config: Json) -> None:
    """Execute orders until there are none: the train function of every rank. Ends when the mailbox is gone."""
    from ray.train.torch import get_device

    from workers.distributed.gang import lost_contact
    from workers.tasks.execute import execute

    mailbox = config["mailbox"]
    rank = ray.train.get_context().get_world_rank()
    actor = ray.get_runtime_context().current_actor
    account = {"actor": actor, "machine": socket.gethostname(), "versions": versions()}
    ray.get(mailbox.join.remote(rank, account), timeout=ALONE_S)
    while True:
        found, order = ray.get(mailbox.take.remote(rank), timeout=ALONE_S)
        if not found:
            continue
        if order is None:
            return
        together = order.strategy is not None
        control = RankControl(mailbox, order, speaks=rank == 0 or not together)
        report, whole = Report(rank, order.key), True
        try:
            if order.device != "cpu":
                order = dataclasses.replace(order, device=str(get_device()))
            commit = execute(order, control)
            report = dataclasses.replace(report, commit=commit if rank == 0 or not together else None)
        except Exception as error:  # noqa: BLE001 - whatever it was, the driver decides what it means
            whole = not together or isinstance(error, AGREED)
            report = dataclasses.replace(report, error=_portable(error), contact=together and lost_contact(error))
        ray.get(mailbox.report.remote(report), timeout=ALONE_S)
        if not whole:
            raise RuntimeError(f"rank {rank} left {order.node_id}") from report.error


def _portable(error: Exception) -> Exception:
    """Make an error that survives pickling; those of torch and others need not."""
    return error if isinstance(error, SegpropError) else SegpropError(f"{type(error).__name__}: {error}")
