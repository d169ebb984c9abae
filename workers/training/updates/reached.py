"""Check that the loss of a stage reaches what is trained: a part without gradients would stay what it is, unseen."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cache_store.errors import ConfigError


def check_loss(stage: str, loss: Tensor) -> None:
    """ConfigError where no gradient at all can be taken of a loss."""
    if not loss.requires_grad:
        raise ConfigError(f"{stage}: the loss gives no gradient to what is trained{_CAUSES}")


def check_reached(stage: str, active: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Check the gradients of a first step. `active`: what is trained, by `<part>/<name>`. ConfigError naming the parts
    that got none at all. Looks at no values, so nothing waits for the device."""
    reached: dict[str, bool] = {}
    for name, parameter in active:
        part = name.partition("/")[0]
        reached[part] = reached.get(part, False) or parameter.grad is not None
    missed = [part for part, found in reached.items() if not found]
    if missed:
        raise ConfigError(f"{stage}: the loss gives no gradient to {', '.join(missed)}{_CAUSES}")


_CAUSES = (
    ": between them and the loss something cannot be differentiated, or is not used (detach, no_grad, argmax, round)"
)
