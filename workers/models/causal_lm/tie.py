"""Whether a model's embedding and its LM head, one matrix in its checkpoint, stay one while stages train it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from workers.models.base import Ties, TrainedParts
from workers.specs.experiment import TrainSpec

#: Parts that hold the matrix, in forward order.
EMBEDDING, HEAD = "embed", "head"


def changed(trained: Sequence[str], train: TrainSpec) -> tuple[bool, bool]:
    """Tell whether a stage changes the (embedding, LM head) of a model in which they are one.

    Adapters are never put on the embedding. `training.lm_head: frozen` leaves the matrix alone, wherever it is used.
    """
    embedding = EMBEDDING in trained and train.lora is None and train.lm_head != "frozen"
    head = HEAD in trained and train.lm_head == ("train" if train.lora is None else "lora")
    return embedding, head


def ties(stages: Sequence[tuple[TrainedParts, TrainSpec]], elements: int, *, in_turn: bool) -> Ties:
    """Decide for every stage whether the two are one matrix in it: up to the first stage that changes one of them
    without the other, which holds them apart, as all later ones do. `elements`: of the matrix.

    in_turn: false where stages overlap. Each then works on a copy of the head, so any change parts the two, from the
    first stage on.
    """
    held: list[bool] = []
    note = None
    for stage, train in stages:
        embedding, head = changed(stage.trained, train)
        if note is None and (embedding != head or (embedding and not in_turn)):
            note = _words(stage.name, embedding, head, elements)
        held.append(note is None)
    if not in_turn and not all(held):
        held = [False] * len(held)
    return Ties(start=True, held=tuple(held), note=note)


def _words(stage: str, embedding: bool, head: bool, elements: int) -> str:
    what = "trains the embedding without the LM head" if embedding else "trains the LM head without the embedding"
    if embedding and head:
        what = "trains both while other stages hold copies of the LM head"
    return (
        f"The model's embedding and LM head are one matrix, but {stage} {what}: from there on they are two, and the "
        f"export has {elements:,} parameters more. training.lm_head: frozen keeps them one: in all stages, where the "
        "matrix then stays as it is, or (regimes.<name>.stages) in those alone that train one of the two."
    )
