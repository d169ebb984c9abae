"""Train a stage over several devices: one process (rank) a device, together one gang. No Ray here.

Whoever starts the processes also makes torch's default process group: Ray Train in a run, plain spawned processes with
gloo in tests. Everything in this module is a no-op for `ALONE`, the gang of one that every other task runs in.

A gang computes what one device computes: every rank takes its part of each micro-batch and weighs its loss by its
part of the step's targets, so that the summed gradient is that of the whole step. What is decided from a clock or a
file is decided by the first rank (`agree`), since ranks that part ways wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cache_store.errors import SegpropError
from workers.specs.ranks import ON_DEVICE, Strategy, Zero3Spec

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Say what a rank computes of some rows. `copies`: how many ranks compute these very rows; `counts`: whether this
    is the one whose figures go into sums."""

    rows: slice
    copies: int = 1
    counts: bool = True


@dataclass(frozen=True)
class Gang:
    """Stand for this process among the `size` that run a task together. All ranks must call the methods that talk, in
    the same order; a rank that does not come is an error of the process group when its time is up."""

    rank: int = 0
    size: int = 1
    strategy: Strategy = "ddp"
    zero3: Zero3Spec = ON_DEVICE

    @classmethod
    def joined(cls, strategy: Strategy, zero3: Zero3Spec = ON_DEVICE) -> Gang:
        """Take this process's place in torch's default process group. SegpropError when there is none."""
        if not dist.is_initialized():
            raise SegpropError("a task for a gang reached a process that belongs to none")
        return cls(dist.get_rank(), dist.get_world_size(), strategy, zero3)

    @property
    def leads(self) -> bool:
        """Return whether this rank is the one that writes, reports and decides."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Return whether each rank holds only a part of every parameter."""
        return self.strategy != "ddp" and self.size > 1

    @property
    def partitions(self) -> bool:
        """Return whether that part is DeepSpeed's to keep."""
        return self.strategy == "zero3" and self.size > 1

    @property
    def loss_scale(self) -> int:
        """Return the factor of the loss: FSDP2 and ZeRO-3 average gradients over ranks, and weighted losses need their
        sum."""
        return self.size if self.shards else 1

    def part(self, start: int, stop: int) -> Part:
        """Choose this rank's rows of start..stop-1, in order and as equal as can be. Where there are fewer rows than
        ranks, every rank takes them all, because every rank must enter every collective."""
        rows = stop - start
        if self.size == 1:
            return Part(slice(start, stop))
        if rows < self.size:
            return Part(slice(start, stop), copies=self.size, counts=self.leads)
        first, last = (start + rows * rank // self.size for rank in (self.rank, self.rank + 1))
        return Part(slice(first, last))

    # -- talking ------------------------------------------------------------------------------------------

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, with the same bits on all of them; the rank's own tensor is not changed."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def least(self, tensor: Tensor) -> Tensor:
        """Return the smallest value over ranks."""
        return self._reduced(tensor, dist.ReduceOp.MIN)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        result = tensor.clone()
        dist.all_reduce(result, operation)
        return result

    def agree(self, value: T) -> T:
        """Return the first rank's value on every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [value if self.leads else None]
        dist.broadcast_object_list(box, src=0)
        agreed: T = box[0]
        return agreed

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = Gang()


def add_counts(counts: list[dict[str, int]]) -> dict[str, int]:
    """Add up counts by key; keys stay in the order in which they first appear."""
    total: dict[str, int] = {}
    for each in counts:
        for key, value in each.items():
            total[key] = total.get(key, 0) + value
    return total


def lost_contact(error: BaseException) -> bool:
    """Return whether an error says that another rank went away or did not come in time; it says nothing
    about the work itself."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo/", "Gloo", "NCCL", "ProcessGroup"))


# -- gradients of replicated parameters ---------------------------------------------------------------------

#: Bytes of gradients that travel together.
BUCKET_BYTES = 25 << 20


class GradientSum:
    """Add up the gradients of all ranks while the backward pass still runs.

    What torch's DistributedDataParallel does, except that its buckets never change: DDP regroups them after its first
    step, so a stage that goes on from a checkpoint would add three or more ranks in another order, and end with other
    bits. Gradients of different lengths of sums also need no division here.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], bucket_bytes: int = BUCKET_BYTES) -> None:
        self._buckets = _buckets(parameters, bucket_bytes)
        self._place = {id(parameter): index for index, bucket in enumerate(self._buckets) for parameter in bucket}
        self._missing: list[int] = []
        self._sent: list[tuple[Tensor, Any]] = []
        self._hooks = [
            cast("Any", parameter).register_post_accumulate_grad_hook(self._arrived) for parameter in parameters
        ]

    def begin(self) -> None:
        """Send what the next backward pass completes: it is the last of its step."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent = []

    def _arrived(self, parameter: Tensor) -> None:
        if not self._missing:
            return  # an earlier micro-batch of the step: gradients stay here and grow
        self._missing[self._place[id(parameter)]] -= 1
        self._send(lambda index: self._missing[index] == 0)

    def _send(self, due: Callable[[int], bool]) -> None:
        # In order, on every rank: whichever bucket is full first.
        while len(self._sent) < len(self._buckets) and due(len(self._sent)):
            bucket = self._buckets[len(self._sent)]
            flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in bucket])
            self._sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Wait for the sums, and put them where the optimizer looks."""
        self._send(lambda index: True)
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            pieces = cast("Any", flat).split([parameter.numel() for parameter in bucket])
            for parameter, piece in zip(bucket, pieces, strict=True):
                _gradient(parameter).copy_(piece.view(parameter.shape))
        self._missing, self._sent = [], []

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _buckets(parameters: list[torch.nn.Parameter], limit: int) -> list[list[torch.nn.Parameter]]:
    """Group parameters in the order in which their gradients come, roughly: last first; one type a bucket."""
    buckets: list[list[torch.nn.Parameter]] = []
    held = 0
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        if not buckets or held + size > limit or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            held = 0
        buckets[-1].append(parameter)
        held += size
    return buckets


def _gradient(parameter: Tensor) -> Tensor:
    """Return the gradient; zeros where this rank's rows gave none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
