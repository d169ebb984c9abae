"""Hidden states of padded batches as rows of tokens, and back: padding is never stored."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from workers.device import to_device


def flat_rows_of(hidden: Tensor, tokens: Tensor | None) -> Tensor:
    """Hidden states (B, T, D) as rows (tokens, D). `tokens` bool (B, T), on the host: False at padding; None: none."""
    flat = hidden.flatten(0, 1)
    return flat if tokens is None else flat[to_device(_kept(tokens), flat.device)]


def padded_rows(flat: Tensor, shape: Sequence[int], tokens: Tensor | None) -> Tensor:
    """Rows (tokens, D) as (B, T, D), zeros at padding; `shape`: (B, T)."""
    whole = (*shape, flat.shape[-1])
    if tokens is None:
        return flat.view(whole)
    padded = flat.new_zeros((whole[0] * whole[1], whole[2]))
    return padded.index_copy_(0, to_device(_kept(tokens), flat.device), flat).view(whole)


def _kept(tokens: Tensor) -> Tensor:
    return tokens.flatten().nonzero()[:, 0]
