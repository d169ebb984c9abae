"""Known accelerators in figures, so that any machine can ask what fits on which.

As the vendors' data sheets give them, written down without the sheets at hand, so check a row before you rely on its
speeds: memory; dense tensor-core speed in bfloat16 with sums in float32 and plain speed in
float32, in 10^12 operations a second; memory bandwidth and one direction of the link to the host, in 10^9 bytes a
second.

NVIDIA's data sheets of L4, L40S, A100 (SXM), H100 (SXM) and H200 (SXM; of the first two and the last two half of the
speed given with sparsity), NVIDIA's and AWS' data sheet of A10G, the white papers "NVIDIA Ampere GA102 GPU
Architecture" (RTX 3090) and "NVIDIA Ada GPU Architecture" (RTX 4070 Ti, 4090). PCIe 4.0 x16: 32, 5.0 x16: 64.
"""

from __future__ import annotations

from dataclasses import dataclass

from cache_store.errors import UserError
from cache_store.suggest import did_you_mean
from orchestrator.config.rates import Rates

GIB = 1 << 30
#: Share of a data sheet's speed that a stage sustains: 42 to 45% with Llama-3.1-8B's shape at 4,096 tokens a
#: micro-batch on an H200, updates included (benchmarks/results/lm_memory-cuda-micro4.md).
SUSTAINED = 0.4
#: What cannot be used for tensors: the device's context and error correction, and gaps that the allocator leaves. In
#: the same results memory was reserved for 1.04 to 1.06 of what was allocated at most (more where less than 15 GiB
#: were).
CONTEXT_BYTES = GIB
GAPS = 0.06


@dataclass(frozen=True)
class Device:
    """One kind of accelerator. `accelerators`: what Ray calls it."""

    words: str
    gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gbytes_per_s: float
    link_gbytes_per_s: float
    accelerators: tuple[str, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """All of it."""
        return int(self.gib * GIB)

    @property
    def usable_bytes(self) -> int:
        """What a stage's tensors may take at most."""
        return usable(self.memory_bytes)

    def rates(self, threads: int) -> Rates:
        """How fast a stage is on it, about; `threads`: cores that load beside it."""
        low, full = (1e12 * SUSTAINED * rate for rate in (self.bf16_tflops, self.fp32_tflops))
        flops = {"bf16": low, "fp16": low, "fp32": full}
        return Rates(flops, threads, loads_ahead=True, link_bytes_per_s=1e9 * self.link_gbytes_per_s)


DEVICES: dict[str, Device] = {
    "rtx3090": Device("NVIDIA GeForce RTX 3090", 24, 71, 35.6, 936, 32),
    "rtx4070ti": Device("NVIDIA GeForce RTX 4070 Ti", 12, 80.2, 40.1, 504, 32),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", 24, 165.2, 82.6, 1008, 32),
    "l4": Device("NVIDIA L4", 24, 121, 30.3, 300, 32, ("L4",)),
    "a10g": Device("NVIDIA A10G", 24, 70, 31.5, 600, 32, ("A10G",)),
    "l40s": Device("NVIDIA L40S", 48, 362, 91.6, 864, 32, ("L40S",)),
    "a100-40": Device("NVIDIA A100 40 GB", 40, 312, 19.5, 1555, 32, ("A100", "A100-40G")),
    "a100-80": Device("NVIDIA A100 80 GB", 80, 312, 19.5, 2039, 32, ("A100-80G",)),
    "h100": Device("NVIDIA H100 80 GB", 80, 989, 67, 3350, 64, ("H100",)),
    "h200": Device("NVIDIA H200", 141, 989, 67, 4800, 64, ("H200",)),
}


def device_called(name: str) -> Device:
    """The row of a name, in any case. UserError, with the nearest name, for another one."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise UserError(
            f"--device: {name} is not known{did_you_mean(name.lower(), DEVICES)}; known: {', '.join(DEVICES)}"
        )
    return found


def device_of_accelerator(name: str | None) -> Device | None:
    """The row that Ray's name of an accelerator means (of A100 the smaller one); None where there is none."""
    return next((device for device in DEVICES.values() if name in device.accelerators), None)


def usable(memory_bytes: int) -> int:
    """What tensors may take at most on a device with so much memory."""
    return max(0, int((memory_bytes - CONTEXT_BYTES) * (1 - GAPS)))
