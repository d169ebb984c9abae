"""Activations on the host and computed again: the bits of those that stay, and what is on the device meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_host_blocks import Block, Head
from torch import Tensor, nn

from workers.models import saved_activations
from workers.models.chain import ModulePath
from workers.models.saved_activations import OnHost
from workers.specs.memory import Activations
from workers.transfers import Transfers


@pytest.fixture(autouse=True)
def _small_ones_leave_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_activations, "LEAST_BYTES", 0)


def path(activations: Activations, block: Callable[[], nn.Module] = Block) -> ModulePath:
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {f"b{index}": block() for index in range(5)}
    parts["head"] = Head(16, 3)
    return ModulePath(parts, parts, activations=activations).train()


def stepped(module: ModulePath, steps: int = 2) -> list[Tensor]:
    """Gradients of two micro-batches and the state afterwards, running statistics included."""
    torch.manual_seed(1)
    for _ in range(steps):
        module((torch.randn(8, 16),)).square().sum().backward()
    found = [parameter.grad for _, parameter in module.trained_parameters()]
    return [*(gradient for gradient in found if gradient is not None), *module.state_dict().values()]


class Views(nn.Module):
    """Saves one storage as several views, some of them with gaps, and a result that is changed in place before."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (value,) = boundary
        left, right = self.both(value).chunk(2, dim=-1)
        mixed = (left.t() @ right) * left.mean(0, keepdim=True).expand(16, -1)
        return (value + self.out(right.sigmoid() * left) @ mixed.tanh(),)


@pytest.mark.parametrize("block", [Block, Views])
@pytest.mark.parametrize("activations", ["recompute", "selective", "host"])
def test_gradients_and_running_statistics_have_the_bits_of_activations_that_stay(
    activations: Activations, block: type[nn.Module]
) -> None:
    found, expected = stepped(path(activations, block)), stepped(path("keep", block))
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


def test_of_two_blocks_at_a_time_activations_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    module = path("host")
    keeping = module._keeping
    assert isinstance(keeping, OnHost)
    groups: list[saved_activations._Group] = []
    made = saved_activations._Group.__init__

    def noted(self: saved_activations._Group, *args: object, **more: object) -> None:
        made(self, *args, **more)  # type: ignore[arg-type]
        groups.append(self)

    monkeypatch.setattr(saved_activations._Group, "__init__", noted)
    output = module((torch.randn(8, 16),))

    def present() -> list[bool]:
        return [any(left._device is not None or left._back is not None for left in group._left) for group in groups]

    assert [len(group._left) > 0 for group in groups] == [True, True, True, True, False, False]
    assert present() == [False] * 6, "all that leaves has left before the loss"
    seen = []
    for index, part in enumerate(module.parts.values()):
        part.register_full_backward_pre_hook(lambda *_, index=index: seen.append((index, present())))  # type: ignore[misc]
    output.square().sum().backward()
    assert all(sum(there) <= 2 for _, there in seen)


def test_a_storage_that_is_saved_more_than_once_leaves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_left = 0
    to_host = Transfers.to_host

    def noted(self: Transfers, tensors: list[Tensor]) -> object:
        nonlocal bytes_left
        bytes_left += sum(tensor.nbytes for tensor in tensors)
        return to_host(self, tensors)

    monkeypatch.setattr(Transfers, "to_host", noted)
    stepped(path("host", Views), steps=1)
    # Of each block but the last: its input (of the first it stays), both halves in one, the sum over the batch, the
    # product of both halves, its factor, tanh's result, sigmoid's, and what the linear layers read.
    storages = {"input": 8 * 16, "both": 8 * 32, "wide": 4 * 16 * 16, "narrow": 3 * 8 * 16 + 16}
    assert bytes_left <= 4 * 4 * sum(storages.values())


def test_weights_and_the_batch_stay() -> None:
    module = path("host")
    batch = (torch.randn(8, 16),)
    keeping = module._keeping
    assert isinstance(keeping, OnHost)
    module(batch)
    assert not keeping.leaves(batch[0])
    assert not any(keeping.leaves(parameter) for parameter in module.parameters())
    assert keeping.leaves(torch.randn(8, 16))


def test_selective_recomputing_runs_no_product_again() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.products += func in saved_activations.KEPT_OPS
            return func(*args, **(kwargs or {}))

    counts = {}
    kinds: tuple[Activations, ...] = ("keep", "selective", "recompute")
    for activations in kinds:
        with Counted() as counted:
            stepped(path(activations), steps=1)
        counts[activations] = counted.products
    assert counts["selective"] == counts["keep"]
    assert counts["recompute"] > counts["keep"]
