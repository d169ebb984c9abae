"""Frozen blocks on the host: the same bits forward and backward, two of them at a time beside the path."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from workers.models.chain import ModulePath
from workers.models.host_blocks import HostBlocks

CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block with a norm that has buffers, dropout, and an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm, self.narrow = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)
        self.norm.running_mean.normal_()
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.2)

    def forward(self, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (value,) = boundary
        return (value + self.drop(self.narrow(self.act(self.norm(self.wide(value))))),)


class Head(nn.Linear):
    def forward(self, boundary: tuple[Tensor, ...]) -> Tensor:
        return super().forward(boundary[0])


def path(on_host: bool, blocks: int = 6, trained: tuple[str, ...] = ("b1", "b5")) -> ModulePath:
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {f"b{index}": Block() for index in range(blocks)}
    parts["head"] = Head(16, 3)
    held = HostBlocks(CPU) if on_host else None
    if held is not None:
        parts |= {name: held.add(part) for name, part in parts.items() if name not in (*trained, "head")}
    return ModulePath(parts, {*trained, "head"}, on_host=held).train()


def gradients(module: ModulePath) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    output: Tensor = module((torch.randn(8, 16),))
    output.square().sum().backward()
    found = [parameter.grad for _, parameter in module.trained_parameters()]
    assert all(gradient is not None for gradient in found)
    return output, [gradient for gradient in found if gradient is not None]


def test_outputs_and_gradients_have_the_bits_of_blocks_on_the_device() -> None:
    (output, found), (expected, others) = gradients(path(on_host=True)), gradients(path(on_host=False))
    assert torch.equal(output, expected)
    assert all(torch.equal(mine, other) for mine, other in zip(found, others, strict=True))


def test_weights_come_in_the_order_of_the_pass_each_while_the_one_before_it_computes() -> None:
    module = path(on_host=True)
    asked: list[tuple[int, list[int]]] = []
    blocks = module._on_host
    assert blocks is not None
    give = blocks.weights

    def noted(number: int, *, returning: bool) -> tuple[Tensor, ...]:
        weights = give(number, returning=returning)
        asked.append((number, sorted(blocks._coming)))
        return weights

    blocks.weights = noted  # type: ignore[method-assign]
    gradients(module)
    # b0 lies before what trains, so the backward pass does not come back to it.
    assert asked == [(0, [1]), (1, [2]), (2, [3]), (3, []), (3, [2]), (2, [1]), (1, [])]
    assert not blocks._coming


def test_nothing_keeps_weights_on_the_device_between_passes() -> None:
    module = path(on_host=True)
    blocks = module._on_host
    assert blocks is not None
    give = blocks.weights
    references: list[StorageWeakRef] = []

    def noted(number: int, *, returning: bool) -> tuple[Tensor, ...]:
        weights = give(number, returning=returning)
        references.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in weights)  # type: ignore[no-untyped-call]
        return weights

    blocks.weights = noted  # type: ignore[method-assign]
    gradients(module)
    gc.collect()
    assert references
    assert all(reference.expired() for reference in references)


def test_blocks_have_no_parameters_in_the_path_and_stay_where_they_are() -> None:
    module = path(on_host=True).double()
    blocks = module._on_host
    assert blocks is not None
    assert {name.split(".")[1] for name, _ in module.named_parameters()} == {"b1", "b5", "head"}
    assert all(tensor.dtype != torch.float64 for tensor in blocks.tensors())
    one = sum(tensor.nbytes for tensor in Block().state_dict().values())
    assert sum(tensor.nbytes for tensor in blocks.tensors()) == 4 * one


def test_tied_weights_inside_a_block_stay_one() -> None:
    class Tied(Block):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(16, 32, bias=False)
            self.again.weight = self.wide.weight

        def forward(self, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (value,) = super().forward(boundary)
            return (value + self.again(value)[:, :16],)

    torch.manual_seed(0)
    part = Tied().eval()
    given = (torch.randn(4, 16),)
    expected = part(given)[0].detach()
    blocks = HostBlocks(CPU)
    block = blocks.add(part)
    blocks.begin()
    assert torch.equal(block(given)[0], expected)
