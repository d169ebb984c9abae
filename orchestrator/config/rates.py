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
    """How fast a slot is. `flops_per_s` by precision; `threads`: cores that load raw inputs; `loads_ahead`: whether
    they do so while the device computes, as beside a GPU. `link_bytes_per_s`: between host and device, one direction;
    None: not known."""

    flops_per_s: dict[str, float]
    threads: int = 1
    loads_ahead: bool = False
    link_bytes_per_s: float | None = None

    @classmethod
    def nominal(cls, device: str, threads: int = 1) -> Rates:
        scale = threads if device == "cpu" else 1
        flops = {precision: rate * scale for (kind, precision), rate in NOMINAL_FLOPS_PER_S.items() if kind == device}
        return cls(flops, threads, device == "cuda")

    @classmethod
    def measured(cls, gflops: float, threads: int = 1, loads_ahead: bool = False) -> Rates:
        return cls(dict.fromkeys(ACTIVATION_BYTES, gflops * 1e9), threads, loads_ahead)

    def with_loading(self, computing: float, loading: float) -> float:
        """Return the seconds of steps that compute for `computing` and whose inputs one core loads in `loading`."""
        shared = loading / self.threads
        return max(computing, shared) if self.loads_ahead else computing + shared
