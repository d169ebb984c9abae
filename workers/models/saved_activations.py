"""How a path keeps what its parts need again in the backward pass: on the device, on the host, or not at all.

Every way gives the same bits: what is computed again is computed from the same inputs, by the same kernels and with the
same random numbers, and copies are copies.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from workers.distributed.partitions import is_partitioned
from workers.distributed.sharded import is_sharded
from workers.specs.memory import Activations
from workers.transfers import Copy, Transfers

Boundary = tuple[Tensor, ...]
#: Makes the contexts of a forward pass and of its repetition.
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]

#: Does what a run of a part needs.
Prepare = Callable[[], None]

#: Smaller storages stay on the device: a copy of them costs more time than they take memory.
LEAST_BYTES = 1 << 18

#: What selective recomputing keeps: results of matrix products, convolutions and attention, where nearly all work is.
_aten = torch.ops.aten
KEPT_OPS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.linear.default,
        _aten._grouped_mm.default,
        _aten.convolution.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)


def nothing() -> None:
    """Prepare nothing."""


class Keeping(ABC):
    """Runs the parts of a path in training. One object a path."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        """`parts`: of the path, in order."""
        self._parts = parts

    def begin(self, boundary: Boundary, context: Any) -> None:  # noqa: B027  most have nothing to prepare
        """Prepare for a forward pass over this boundary."""

    @abstractmethod
    def run(self, part: nn.Module, value: Boundary, beside: tuple[Any, ...]) -> Any:
        """Run a part whose backward pass will come. `beside`: the context, or nothing."""

    def run_again(self, part: nn.Module, value: Boundary, beside: tuple[Any, ...], prepare: Prepare = nothing) -> Any:
        """Run a part that must run once more in the backward pass. `prepare` is called before each of its runs."""
        return _recomputed(part, value, beside, _plain_contexts, prepare)

    def end(self) -> None:  # noqa: B027  as above
        """Forget what only the forward pass needs."""


class Kept(Keeping):
    """All activations stay on the device."""

    def run(self, part: nn.Module, value: Boundary, beside: tuple[Any, ...]) -> Any:
        return part(value, *beside)


class Recomputed(Keeping):
    """Of every part only its input stays; the part runs once more in the backward pass."""

    def run(self, part: nn.Module, value: Boundary, beside: tuple[Any, ...]) -> Any:
        return self.run_again(part, value, beside)


class Selective(Keeping):
    """As `Recomputed`, but results of `KEPT_OPS` stay: what runs once more is cheap."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__(parts)
        for part in parts:
            # What is kept may not change afterwards; nor in parts whose weights are elsewhere.
            for module in getattr(part, "held", part).modules():
                if getattr(module, "inplace", False) is True:
                    module.inplace = False

    def run(self, part: nn.Module, value: Boundary, beside: tuple[Any, ...]) -> Any:
        return self.run_again(part, value, beside)

    def run_again(self, part: nn.Module, value: Boundary, beside: tuple[Any, ...], prepare: Prepare = nothing) -> Any:
        return _recomputed(part, value, beside, _selective_contexts, prepare)


class OnHost(Keeping):
    """Activations go to the host as soon as a part is through, and come back a part ahead of the backward pass: on the
    device are those of two parts at a time. Of the last two parts they stay, since their backward passes come first."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__(parts)
        self._last = frozenset(id(part) for part in parts[-2:])
        self._staying: frozenset[int] = frozenset()
        self._shares = False
        self._transfers: Transfers | None = None
        #: Storages that have left in this pass, by address, version and type: most are saved more than once.
        self._left: dict[tuple[int, int, torch.dtype], _Left] = {}
        self._latest: _Group | None = None

    def begin(self, boundary: Boundary, context: Any) -> None:
        self.end()
        weights = [tensor for part in self._parts for tensor in (*part.parameters(), *part.buffers())]
        # Of weights that ranks share out, the whole is elsewhere: it is found while its part runs (`weight_in`).
        lying = [tensor for tensor in weights if not _is_shared_out(tensor)]
        self._shares = len(lying) < len(weights)
        self._staying = frozenset(_address(tensor) for tensor in (*lying, *tensors_in((boundary, context))))

    def run(self, part: nn.Module, value: Boundary, beside: tuple[Any, ...]) -> Any:
        return self._saving(part, lambda: part(value, *beside))

    def run_again(self, part: nn.Module, value: Boundary, beside: tuple[Any, ...], prepare: Prepare = nothing) -> Any:
        return self._saving(part, lambda: super(OnHost, self).run_again(part, value, beside, prepare))

    def _saving(self, part: nn.Module, forward: Callable[[], Any]) -> Any:
        group = _Group(self, self._latest, part, stays=id(part) in self._last)
        with saved_tensors_hooks(group.pack, group.unpack):
            made = forward()
        if self._latest is not None:
            self._latest.let_go()
        self._latest = group
        return made

    def end(self) -> None:
        self._left, self._latest = {}, None

    def leaves(self, tensor: Tensor) -> bool:
        """Tell whether a tensor that autograd saves goes to the host."""
        if tensor.untyped_storage().nbytes() < LEAST_BYTES:
            return False
        return _address(tensor) not in self._staying

    def weight_in(self, part: nn.Module, tensor: Tensor) -> nn.Parameter | None:
        """Find the weight of a running part that ranks share out, and whose gathered values a tensor is."""
        if not self._shares:
            return None
        address = _address(tensor)
        whole = (each for each in part.parameters() if not is_sharded(each) and each.data.numel())
        return next((each for each in whole if _address(each.data) == address), None)

    def left(self, tensor: Tensor) -> tuple[_Left, bool]:
        """Give the copy of a tensor's storage, and whether it is new."""
        key = (_address(tensor), tensor._version, tensor.dtype)
        found = self._left.get(key)
        if found is not None:
            return found, False
        if self._transfers is None:
            self._transfers = Transfers(tensor.device)
        self._left[key] = _Left(tensor, self._transfers)
        return self._left[key], True


class _Left:
    """One storage on its way to the host, there, or on its way back."""

    def __init__(self, tensor: Tensor, transfers: Transfers) -> None:
        storage = tensor.untyped_storage()
        # While somebody refers to it, even weakly, no other storage has this address.
        reference: Any = StorageWeakRef
        self._reference = reference(storage)
        self._transfers = transfers
        whole = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
        self._device: Tensor | None = whole
        self._out = transfers.to_host([whole])
        self._back: Copy | None = None

    def let_go(self) -> None:
        """Leave the device."""
        self._out.settle()
        self._device = self._back = None

    def come(self) -> None:
        """Begin to come back."""
        if self._device is None and self._back is None:
            self._back = self._transfers.to_device(self._out.result())

    def whole(self) -> Tensor:
        """Give the storage's elements on the device."""
        self.come()
        if self._back is not None:
            (self._device,) = self._back.result()
            self._back = None
        if self._device is None:
            raise RuntimeError("a storage is neither on the device nor on its way")
        return self._device


@dataclasses.dataclass(frozen=True)
class _Packed:
    """What stands for a saved tensor: a view of a storage that left."""

    left: _Left
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class _Weight:
    """What stands for a saved weight that DeepSpeed shares out: a view of what is gathered again for the backward pass.
    Whoever kept the gathered values would keep the whole model."""

    weight: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Group:
    """What one part saves."""

    def __init__(self, owner: OnHost, before: _Group | None, part: nn.Module, *, stays: bool) -> None:
        """`stays`: on the device, all of it."""
        self._owner, self._before, self._part, self._stays = owner, before, part, stays
        self._left: list[_Left] = []
        self._after: _Group | None = None
        self._asked = False

    def pack(self, tensor: Tensor) -> Tensor | _Packed | _Weight:
        weight = self._owner.weight_in(self._part, tensor)
        if weight is not None:
            # FSDP2 gathers into the same storage again, so a tensor of it may be kept; DeepSpeed gathers into another.
            view = tensor.size(), tensor.stride(), int(tensor.storage_offset())
            return _Weight(weight, *view) if is_partitioned(weight) else tensor
        if self._stays or not self._owner.leaves(tensor):
            return tensor
        with torch.no_grad():
            left, new = self._owner.left(tensor)
        if new:
            self._left.append(left)
        return _Packed(left, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, packed: Tensor | _Packed | _Weight) -> Tensor:
        if not self._asked:
            self._begin_backward()
        if isinstance(packed, _Weight):
            return packed.weight.data.as_strided(packed.size, packed.stride, packed.offset)
        if not isinstance(packed, _Packed):
            return packed
        return packed.left.whole().as_strided(packed.size, packed.stride, packed.offset)

    def _begin_backward(self) -> None:
        """What a later part had is used; what the part before needs begins to come, behind what is needed now."""
        self._asked = True
        if self._after is not None:
            self._after.let_go()
            self._after = None
        for left in reversed(self._left):
            left.come()
        if self._before is not None:
            self._before._after = self
            for left in reversed(self._before._left):
                left.come()
            self._before = None

    def let_go(self) -> None:
        """Take everything off the device."""
        for left in self._left:
            left.let_go()


#: How `memory.activations` calls them.
KEEPING: Mapping[Activations, type[Keeping]] = {
    "keep": Kept,
    "recompute": Recomputed,
    "selective": Selective,
    "host": OnHost,
}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def _is_shared_out(tensor: Tensor) -> bool:
    """Tell whether each rank has a part of a tensor only."""
    return is_sharded(tensor) or is_partitioned(tensor)


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputed(part: nn.Module, value: Boundary, beside: tuple[Any, ...], contexts: Contexts, prepare: Prepare) -> Any:
    def forward(*tensors: Tensor) -> Any:
        return part(tensors, *beside)

    def both() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, again = contexts()
        return first, _again(part, prepare, again)

    prepare()
    # Non-re-entrant: the re-entrant kind silently drops gradients when its inputs are frozen.
    return checkpoint(forward, *value, use_reentrant=False, context_fn=both)


def _plain_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), nullcontext()


def _selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    made: Any = create_selective_checkpoint_contexts
    first, again = made(_policy)
    return first, again


@contextmanager
def _again(part: nn.Module, prepare: Prepare, inner: AbstractContextManager[Any]) -> Iterator[None]:
    """What surrounds a part's second run: `inner`, which counts operations, only what is the same in both."""
    prepare()
    with _batch_norm_held(part), inner:
        yield


@contextmanager
def _batch_norm_held(part: nn.Module) -> Iterator[None]:
    """Recomputing a forward pass must not update BatchNorm's running statistics a second time."""
    norms = [m for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
