"""`segprop.Chain`: a network as its blocks in order and its head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

#: Names of parts that are not a network's own, and names that a dictionary of modules cannot hold.
TAKEN = {"head", "adapter", "aux"}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class Chain(nn.Module):
    """A network whose forward is its blocks one after the other and then its head.

    blocks: modules, in a list (they are called block1, block2, …) or in a mapping by name. Each takes the tensor that
    the one before it gives. head: the global head, a module or several that run one after the other; it gives one row
    of scores for every sample.
    """

    def __init__(
        self, blocks: Iterable[nn.Module] | Mapping[str, nn.Module], head: nn.Module | Iterable[nn.Module]
    ) -> None:
        super().__init__()
        if not isinstance(blocks, Mapping):
            blocks = {f"block{number}": block for number, block in enumerate(blocks, start=1)}
        if not blocks:
            raise ValueError("a Chain needs at least one block before its head")
        for name in blocks:
            if not _NAME.fullmatch(name) or is_taken(name):
                raise ValueError(f"{name!r} cannot be the name of a block: letters, digits and _, not {sorted(TAKEN)}")
        self.blocks = nn.ModuleDict(blocks)
        self.head = head if isinstance(head, nn.Module) else nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        scores: Tensor = self.head(x)
        return scores


def is_taken(name: str) -> bool:
    """Tell whether a part cannot be called so."""
    return name in TAKEN or hasattr(nn.ModuleDict, name)
