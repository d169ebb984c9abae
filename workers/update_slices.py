"""How many numbers an update rule for narrow weights changes at one time. Pure: predictions need it without torch."""

from __future__ import annotations

#: By kind of device. The float32 copies of so many numbers stay in a core's cache; a GPU wants more of them, so that a
#: kernel runs longer than its launch takes. A dozen such copies are there meanwhile.
SLICE = {"cpu": 1 << 16, "cuda": 1 << 22}
#: Copies beside those of moments at the worst moment, when what rounding took is measured: the weight before, as
#: computed and as stored, the gradient or what was meant, what arrived, and two on the way to their sums. The random
#: bits of stochastic rounding, three copies, are gone by then.
WORKING = 7
#: Float32 copies of a whole tensor at the worst moment of torchao's 4-bit update, by kind of device: a CPU runs it
#: operation by operation, and codes are searched as numbers of 64 bits. Measured: 13.3 for float32 weights, 14.3 for
#: bfloat16. A GPU runs one kernel.
FOUR_BIT_WORKING = {"cpu": 14}


def slice_size(kind: str) -> int:
    """Numbers of a slice on a kind of device."""
    return SLICE.get(kind, SLICE["cuda"])
