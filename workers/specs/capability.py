"""Decide which precisions a device computes in, from what the machine says about itself.

No torch: a plan is made by the same rule as a worker warns by. A device *emulates* a precision when it has no
instructions for it: every operation then goes through float32 and back, slower than float32 and less exact.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from workers.specs.experiment import Precision

#: Precision -> flags of /proc/cpuinfo of which one is enough (x86, then Arm).
CPU_FLAGS: dict[str, frozenset[str]] = {
    "bf16": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    "fp16": frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}
#: Precision -> the least compute capability of a CUDA device.
GPU_CAPABILITY: dict[str, tuple[int, int]] = {"bf16": (8, 0), "fp16": (5, 3)}


@dataclass(frozen=True)
class Capability:
    """What is known of a device, by torch's name of its kind: the flags of a `cpu`, the compute capability of `cuda`
    (None: not known)."""

    device: Literal["cpu", "cuda"]
    flags: frozenset[str] = frozenset()
    version: tuple[int, int] | None = None

    def computes(self, precision: Precision) -> bool:
        """Tell whether the device has instructions for a precision. A GPU that nothing is known of has them all."""
        if precision not in GPU_CAPABILITY:
            return True
        if self.device == "cpu":
            return not self.flags.isdisjoint(CPU_FLAGS[precision])
        return self.version is None or self.version >= GPU_CAPABILITY[precision]

    @property
    def best(self) -> Precision:
        """The precision that `auto` stands for: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a
        CPU."""
        if self.computes("bf16"):
            return "bf16"
        return "fp16" if self.device == "cuda" else "fp32"

    @property
    def words(self) -> str:
        if self.device == "cpu":
            return "this CPU"
        return "the GPU" if self.version is None else f"the GPU (compute capability {'.'.join(map(str, self.version))})"

    def warning(self, precision: Precision) -> str | None:
        """Say that a precision is only emulated; None where it is not."""
        if self.computes(precision):
            return None
        return (
            f"training.precision {precision}: {self.words} has no instructions for it and emulates it, slower than "
            f"fp32; training.precision: auto takes {self.best} there"
        )


@cache
def cpu_capability() -> Capability:
    """Look up what this machine's CPU computes in. Without /proc/cpuinfo: nothing but float32, on Apple's Arm fp16."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        arm = platform.machine() == "arm64"
        return Capability("cpu", frozenset({"asimdhp"} if arm else ()))
    return Capability("cpu", flags_of(text))


def flags_of(cpuinfo: str) -> frozenset[str]:
    """Read the flags of the first core from the text of /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
