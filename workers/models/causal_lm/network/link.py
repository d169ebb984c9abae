"""What lies between normed hidden states and logits beside the LM head. Needs neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """From normed hidden states to logits: cap * tanh(scale * lm_head(before * hidden) / cap); no cap: without tanh."""

    before: float = 1.0
    scale: float = 1.0
    cap: float | None = None
