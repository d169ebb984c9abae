"""A loss that gives no gradient to a trained part is named after the first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cache_store.errors import ConfigError
from workers.training.updates.reached import check_loss, check_reached


def test_parts_without_any_gradient_are_named() -> None:
    parts = {name: nn.Linear(2, 2) for name in ("a", "b", "head")}
    active = [(f"{part}/{name}", p) for part, module in parts.items() for name, p in module.named_parameters()]
    x = torch.randn(3, 2)
    parts["head"](parts["b"](parts["a"](x)).detach()).sum().backward()
    with pytest.raises(ConfigError, match="stage2: the loss gives no gradient to a, b: "):
        check_reached("stage2", active)
    parts["b"].bias.grad = torch.zeros(2)  # some of a part is enough: not all of it is used by every batch
    with pytest.raises(ConfigError, match="no gradient to a: "):
        check_reached("stage2", active)
    parts["a"].weight.grad = torch.zeros(2, 2)
    check_reached("stage2", active)


def test_a_loss_without_a_gradient_is_refused() -> None:
    with pytest.raises(ConfigError, match="e2e: the loss gives no gradient"):
        check_loss("e2e", torch.zeros(()))
    check_loss("e2e", torch.zeros((), requires_grad=True))
