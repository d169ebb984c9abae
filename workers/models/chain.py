"""Parts run in order, some of them frozen; and the bytes and digests of their states."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cache_store.records.nodes import Attempt
from workers import tensor_files
from workers.distributed.sharded import gathered, held
from workers.models.host_blocks import HostBlock, HostBlocks, carries_gradient
from workers.models.saved_activations import KEEPING
from workers.specs.memory import Activations
from workers.specs.results import PartRecord

Boundary = tuple[Tensor, ...]
State = dict[str, Tensor]
#: Runs a path (first argument) and uses what it gave (second), whose weights are there until then.
Within = Callable[[Callable[[], Any], Callable[[Any], Any]], Any]


def at_once(run: Callable[[], Any], use: Callable[[Any], Any]) -> Any:
    """Return `use(run())`: all that is needed where weights stay."""
    return use(run())


class ModulePath(nn.Module):
    """Parts applied one after the other: blocks map a boundary to a boundary, the last part gives the output (images:
    logits (B, classes)). A `context`, where there is one, goes to every part beside its input.

    Parts outside `trained` are frozen: no gradient, and in eval mode whatever mode the path is in, so that a
    frozen BatchNorm never moves (`requires_grad=False` alone would not stop its running statistics).
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        trained: Collection[str],
        *,
        activations: Activations = "keep",
        on_host: HostBlocks | None = None,
    ) -> None:
        """`on_host`: the parts whose weights lie on the host, where there are some; all of them frozen."""
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.trained = frozenset(trained)
        self._on_host = on_host
        self._keeping = KEEPING[activations](list(parts.values()))
        for name, part in self.parts.items():
            for parameter in part.parameters():
                # Packed matrices are integers.
                parameter.requires_grad_(name in self.trained and parameter.is_floating_point())
        self.train(False)

    def train(self, mode: bool = True) -> ModulePath:
        super().train(mode)
        for name, part in self.parts.items():
            if name not in self.trained:
                part.train(False)
        return self

    def forward(self, boundary: Boundary, context: Any = None) -> Any:
        beside = () if context is None else (context,)
        if self._on_host is not None:
            self._on_host.begin()
        if not (self.training and torch.is_grad_enabled()):
            value: Any = boundary
            for part in self.parts.values():
                value = part(value, *beside)
            return value
        return self._forward_for_backward(boundary, context, beside)

    def _forward_for_backward(self, boundary: Boundary, context: Any, beside: tuple[Any, ...]) -> Any:
        value: Any = boundary
        self._keeping.begin(boundary, context)
        for part in self.parts.values():
            if isinstance(part, HostBlock) and carries_gradient(value):
                # Its weights are not kept until the backward pass.
                value = self._keeping.run_again(part, value, beside, part.bring_for_both)
            else:
                value = self._keeping.run(part, value, beside)
        self._keeping.end()
        return value

    def tensors_on_host(self) -> list[Tensor]:
        """List the weights and buffers of frozen parts that lie on the host."""
        return [] if self._on_host is None else self._on_host.tensors()

    def trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(part/name, parameter) of everything that is updated, in forward order; what parts share once."""
        firsts: dict[int, tuple[str, nn.Parameter]] = {}
        for name, parameter in self._trained():
            firsts.setdefault(id(parameter), (name, parameter))
        return list(firsts.values())

    def shared_names(self) -> dict[str, str]:
        """Later name -> first name, of everything that is updated and that parts share."""
        firsts = {id(parameter): name for name, parameter in self.trained_parameters()}
        return {name: firsts[id(parameter)] for name, parameter in self._trained() if name != firsts[id(parameter)]}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{name}/{key}", parameter)
            for name, part in self.parts.items()
            if name in self.trained
            for key, parameter in part.named_parameters()
            if parameter.requires_grad
        ]


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 (32 hex characters) over names, dtypes, shapes and bytes: equal exactly when the state is equal."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        for piece in tensor_files.pieces_of(tensor):
            total.update(piece)
    return total.hexdigest()[:32]


def whole_state(module: nn.Module) -> State:
    """The module's state as it is, to be written before it changes; of sharded parameters as `gathered` gives it."""
    return {name: gathered(tensor) for name, tensor in module.state_dict(keep_vars=True).items()}


def write_part(attempt: Attempt, part: str, state: State) -> PartRecord:
    """Write a part's state as a file of its own, to be published with the attempt's commit."""
    file = f"{part}.safetensors"
    record = attempt.write(file, tensor_files.TensorStream(state))
    return PartRecord(file=file, digest=state_digest(state), bytes=record.bytes)


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers the module holds; of sharded ones this rank's part."""
    return sum(held(t).numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
