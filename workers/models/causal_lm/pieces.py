"""How many rows of logits are made at once. Pure: predictions need it without torch."""

from __future__ import annotations

#: Float32 logits of one piece take about this much; there are two or three such buffers at a time.
PIECE_BYTES = 64 * 2**20


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits made at once."""
    return max(1, PIECE_BYTES // (4 * vocabulary))
