"""How many rows of logits are made at once. Pure: predictions need it without torch."""

from __future__ import annotations

#: Float32 logits of one piece take about this much where they are scored, or go through torch's own loss; there are
#: two or three such buffers.
PIECE_BYTES = 64 * 2**20
#: Logits of one piece of our own loss, in the type they are computed in; there is one such buffer. Twice as much:
#: the LM head's gradient is added up once a piece, which costs as much as several hundred rows of it.
LOSS_BYTES = 128 * 2**20
#: Where that gradient is large, a piece takes one part in so many of it, up to so many bytes: little beside what is
#: held anyhow, and the fewer pieces, the fewer passes over the gradient.
GRADIENT_PART, MOST_LOSS_BYTES = 4, 512 * 2**20
#: Float32 logits that are turned into a gradient at once: few enough to stay in a processor's cache.
BLOCK_BYTES = 2 * 2**20
#: On a device: there every block is a row of kernels to launch, and a large vocabulary would make it one of a few rows.
DEVICE_BLOCK_BYTES = 32 * 2**20


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits that are scored at once, or given to torch's own loss."""
    return max(1, PIECE_BYTES // (4 * vocabulary))


def loss_rows(vocabulary: int, item_bytes: int, gradient_bytes: int = 0) -> int:
    """Rows of logits of `item_bytes` an element that a loss makes at once; `gradient_bytes`: of the LM head's gradient
    that it adds up in float32."""
    size = max(LOSS_BYTES, min(MOST_LOSS_BYTES, gradient_bytes // GRADIENT_PART))
    return max(1, size // (item_bytes * vocabulary))


def in_one_piece(rows: int, vocabulary: int, width: int, item_bytes: int) -> bool:
    """Whether the gradient of all logits is kept until the backward pass, for the LM head's to be made of it: where it
    is no larger than that, or than one piece."""
    return rows * vocabulary * item_bytes <= max(LOSS_BYTES, width * vocabulary * item_bytes)


def block_rows(vocabulary: int, device: str = "cpu") -> int:
    """Rows of a piece whose softmax is taken at once, in float32; `device`: its type."""
    return max(1, (BLOCK_BYTES if device == "cpu" else DEVICE_BLOCK_BYTES) // (4 * vocabulary))
