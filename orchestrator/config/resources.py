"""The `resources` section: runner, slots, devices, gangs, attempts, deadlines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.config.values import Bytes, NonBlank, OneOf, Seconds, Section
from workers.specs.orders import CHECKPOINT_MEMORY, INTERRUPTIONS_EVERY_S
from workers.specs.ranks import Ranks, Strategy, Zero3Spec

#: Most CPU threads of a slot with a GPU that nobody gave a number: they load and augment beside the device's steps.
GPU_THREADS = 8
#: Bounds that no cluster reaches: what is beyond them is a slip, and more than Ray and clocks can count.
MOST_DEVICES, MOST_THREADS, LONGEST_S = 100_000, 4096, 1e7


@dataclass(frozen=True)
class RunnerKind:
    """One row of `RUNNERS`."""

    #: `module:function` that makes the runner of a `orchestrator.runners.base.RunnerRequest`. By name: planning loads
    #: no runner.
    factory: str
    #: Works on the machines of a Ray cluster: can choose among them, run gangs, and have Ray Tune stop trials.
    on_ray: bool = False


#: What `resources.runner` may be.
RUNNERS: dict[str, RunnerKind] = {
    "ray": RunnerKind("orchestrator.runners.factory:ray_runner", on_ray=True),
    "local": RunnerKind("orchestrator.runners.factory:local_runner"),
}


class Zero3Config(Section):
    """Where the ranks of a gang with strategy zero3 keep their parts. See docs/cluster.md."""

    parameters: Literal["device", "host", "disk"] = Field(
        default="device",
        description="host: weights come to the device when they are used, the next ones on their way. disk: "
        "they are read from files when they are used, not ahead of it.",
    )
    optimizer: Literal["device", "host", "disk"] = Field(
        default="device",
        description="Optimizer states, float32 weights and gradients. host: updates are computed there. disk: the same "
        "of what is read from files, 100 million numbers at a time.",
    )
    disk: NonBlank | None = Field(
        default=None,
        description="Folder for the files of what is on disk, on every machine that trains; best on an NVMe disk of "
        "its own. They go when the stage ends; what a killed process left goes when the next one comes.",
    )

    def spec(self) -> Zero3Spec:
        """Return what workers are told."""
        return Zero3Spec(self.parameters, self.optimizer, self.disk)


class GangConfig(Section):
    """Stages over several devices at once, one process (rank) each: a Ray Train gang. See docs/cluster.md."""

    size: Literal["auto"] | Annotated[int, Field(ge=2, le=MOST_DEVICES)] | None = Field(
        default=None,
        description="Devices of a stage. None: one, no gang. auto: every device that is there. On CPUs a device is "
        "resources.threads cores.",
    )
    strategy: Strategy = Field(
        default="ddp",
        description="ddp: every rank holds the whole stage. fsdp2: parameters, gradients and optimizer states are "
        "shared out (language models). zero3: the same by DeepSpeed, which can keep them beside the device.",
    )
    zero3: Zero3Config = Field(default_factory=Zero3Config)
    min_parameters: int = Field(
        default=0, ge=0, description="Stages that train fewer parameters than this stay on one device."
    )
    timeout_s: float = Field(
        default=600.0,
        ge=1,
        le=LONGEST_S,
        description="A rank that keeps the others waiting longer than this (seconds) counts as lost.",
    )

    @property
    def shares(self) -> bool:
        """Whether each rank of a gang holds a part of a stage only."""
        return self.size is not None and self.strategy != "ddp"

    def ranks(self, devices: int | None) -> Ranks:
        """Return what a plan counts with. `devices`: what size auto comes to, where that is known; else one."""
        size = devices or 1 if self.size == "auto" else self.size or 1
        return Ranks(size, self.strategy, self.zero3.spec())


class ResourceConfig(Section):
    """Where the work runs. Nothing here changes a result by more than rounding, so a run may go on with other
    resources."""

    runner: Annotated[str, OneOf(RUNNERS)] = Field(
        default="ray", description="local: in this process, one task at a time."
    )
    address: NonBlank | None = Field(
        default=None, description="Address of a running Ray cluster; None: start one here."
    )
    slots: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_DEVICES)] = Field(
        default="auto",
        description="Tasks at one time; auto: one per GPU, or one per CPU core where there is none.",
    )
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_THREADS)] = Field(
        default="auto",
        description="CPU threads of a task; auto: the cores divided by the slots, at most 8 beside a GPU.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one.")
    gang: GangConfig = Field(default_factory=GangConfig)
    labels: dict[str, str] = Field(
        default_factory=dict, description="Only machines of the cluster with these labels (`ray start --labels`)."
    )
    accelerator: NonBlank | None = Field(
        default=None, description="Only machines with this kind of accelerator, as Ray names it: H100, A100, L4."
    )
    device_memory: Bytes | None = Field(
        default=None,
        description="Memory of one device, e.g. 24GB, for training.micro_batch and memory: auto. None: that of the "
        "accelerator named above, else of this machine's GPU; without one a slot's share of this machine's memory.",
    )
    host_memory: Bytes | None = Field(
        default=None,
        description="Memory that a stage may take of its machine beside the process, e.g. 48GB, for memory: auto. "
        "None: nine tenths of a slot's share of this machine's, where its own GPU trains; else not bounded.",
    )
    worker_deadline_s: float = Field(
        default=180.0,
        gt=0,
        le=LONGEST_S,
        description="When no worker has come, or come back, for so many seconds, the run ends with the reason. "
        "SEGPROP_WAIT_FOR_WORKERS_S goes before it.",
    )
    store_deadline_s: float = Field(
        default=600.0,
        ge=0,
        le=LONGEST_S,
        description="When the store cannot be reached, the driver waits so many seconds for it to come back; attempts "
        "of tasks that met the outage do not count.",
    )
    snapshot_memory: Bytes | None = Field(
        default=None,
        description="Most bytes of snapshot shards a task holds at a time, mapped or in memory. None: all that lie in "
        "a local folder, mapped; 1 GiB of others.",
    )
    interruptions_every: Seconds = Field(
        default=INTERRUPTIONS_EVERY_S,
        description="How often a slot is interrupted, on average (spot machines: 2h). What "
        "`training.checkpoint_every_s: auto` weighs against the cost of a checkpoint.",
    )
    checkpoint_memory: Bytes = Field(
        default=CHECKPOINT_MEMORY,
        description="Most bytes of a stage's tensors that are copied so that its steps need not wait for a checkpoint "
        "that is being written; beyond that they wait. As much as the state: they never do.",
    )
    max_attempts: int = Field(default=3, ge=1, le=1000, description="Attempts of a task before it counts as failed.")
    gflops: Literal["auto"] | Annotated[float, Field(ge=1e-3, le=1e9)] = Field(
        default="auto",
        description="Measured speed of one slot in GFLOP/s, for predicted times; auto: nominal figures.",
    )

    @model_validator(mode="after")
    def _labels_need_ray(self) -> ResourceConfig:
        if not self.on_ray and (self.labels or self.accelerator):
            raise ValueError(f"labels and accelerator choose machines of a cluster; the {self.runner} runner has none")
        return self

    @property
    def on_ray(self) -> bool:
        """Whether the runner works on the machines of a Ray cluster."""
        return RUNNERS[self.runner].on_ray
