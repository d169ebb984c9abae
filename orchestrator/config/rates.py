"""The speeds that predictions start from, where nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass

from cache_store.formats.dtypes import ITEM_BYTES
from workers.specs.experiment import COMPUTED

ACTIVATION_BYTES = {precision: ITEM_BYTES[name] for precision, name in COMPUTED.items()}
#: Sustained floating-point operations a second and slot, convolutions at common batch sizes: one core of a
#: recent server CPU, one recent data centre GPU. Rough on purpose: `resources.gflops` takes a measured one.
NOMINAL_FLOPS_PER_S = {
    ("cpu", "fp32"): 60e9,
    ("cpu", "bf16"): 200e9,
    ("cpu", "fp16"): 60e9,
    ("cuda", "fp32"): 15e12,
    ("cuda", "bf16"): 60e12,
    ("cuda", "fp16"): 60e12,
}


@dataclass(frozen=True)
class Rates:
    """How fast a slot is. `flops_per_s` by precision."""

    flops_per_s: dict[str, float]

    @classmethod
    def nominal(cls, device: str, threads: int = 1) -> Rates:
        scale = threads if device == "cpu" else 1
        return cls(
            {precision: rate * scale for (kind, precision), rate in NOMINAL_FLOPS_PER_S.items() if kind == device}
        )

    @classmethod
    def measured(cls, gflops: float) -> Rates:
        return cls(dict.fromkeys(ACTIVATION_BYTES, gflops * 1e9))
