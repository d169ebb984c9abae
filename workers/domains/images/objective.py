"""What a configuration may say of a loss and its targets, and what tasks are told of it. Loads no torch at import."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cache_store.errors import ConfigError
from workers import user_code
from workers.data.images.targets import CLASSES, OWN_LOSS, TARGETS, takes
from workers.models.base import Finding
from workers.specs.experiment import ImageSpec, LossSpec, TrainSpec

if TYPE_CHECKING:
    from workers.data.images.outline import DataOutline

_CROSS_ENTROPY = LossSpec()
#: Settings of a loss, and the losses that have them.
_SETTINGS = {"delta": "huber", "build": OWN_LOSS, "args": OWN_LOSS, "path": OWN_LOSS, "code": OWN_LOSS}


def problems(data: ImageSpec, train: TrainSpec) -> Iterator[Finding]:
    """See `workers.domains.planning.DomainPlanning.loss_refusals`."""
    loss = train.loss or _CROSS_ENTROPY
    kind = data.targets or "classes"
    if not takes(loss.name, kind):
        fitting = ", ".join((*TARGETS[kind].losses, OWN_LOSS))
        if data.name == "python":
            message = f"{kind}: {loss.name} does not take them; allowed with them: training.loss.name {fitting}"
            yield ("data", "targets"), message
        else:
            yield (
                ("training", "loss", "name"),
                f"{loss.name}: the targets of {data.name} are classes; allowed: {fitting}, or data of your own "
                "(data.name python)",
            )
    for key, owner in _SETTINGS.items():
        if getattr(loss, key) is not None and loss.name != owner:
            yield ("training", "loss", key), f"is for training.loss.name {owner}, this is {loss.name}"
    if train.label_smoothing and loss != _CROSS_ENTROPY:
        yield (
            ("training", "label_smoothing"),
            f"{train.label_smoothing:g}: is for cross_entropy, the loss is {loss.name}; allowed: 0",
        )
    if train.exit.target is not None and TARGETS[kind].metrics[0] == "loss":
        yield (
            ("training", "exit", "target"),
            f"{train.exit.target:g}: targets that are taken as they are have no score but the loss; allowed: null, or "
            "data.targets: classes, labels, numbers",
        )
    yield from _own_function(loss)


def _own_function(loss: LossSpec) -> Iterator[Finding]:
    if loss.name != OWN_LOSS:
        return
    if loss.build is None:
        yield ("training", "loss", "build"), "none given for python; allowed: module:function"
        return
    try:
        settled(loss)
    except ConfigError as error:
        where = str(error.details["where"])
        yield tuple(where.split(".")), error.message.removeprefix(f"{where}: ")


def settled(loss: LossSpec | None) -> LossSpec | None:
    """Return a loss as tasks name it: the digest of the user's code in it; None for plain cross-entropy.

    ConfigError where the code is not found, or is not what `code` says."""
    if loss is None or loss == _CROSS_ENTROPY:
        return None
    if loss.name != OWN_LOSS:
        return loss
    code = user_code.find(str(loss.build), loss.path, "training.loss.build")
    if loss.code not in (None, code.digest):
        raise user_code.other_source("training.loss.code", str(loss.code), code)
    return replace(loss, path=code.travelling(), code=code.digest)


def output_problems(outline: DataOutline, train: TrainSpec, outputs: int) -> Iterator[Finding]:
    """See `workers.domains.planning.DomainPlanning.output_problems`."""
    target, loss = outline.target, train.loss or _CROSS_ENTROPY
    if target.row.sized and outputs != outline.classes:
        yield (
            ("model",),
            f"the head gives {outputs} outputs, a target has {outline.classes} {target.row.parts}; allowed: as many",
        )
    elif target != CLASSES and outputs != outline.classes:
        yield ("data", "classes"), f"{outline.classes}: the head gives {outputs} outputs; allowed: {outputs}"
    elif loss.name == OWN_LOSS:
        from workers.domains.images.losses import try_loss

        first = 0 if target.first is None else target.first
        try:
            try_loss(loss, outputs, [first, first], target.dtype)
        except ConfigError as error:
            where = str(error.details["where"])
            yield tuple(where.split(".")), error.message.removeprefix(f"{where}: ")
