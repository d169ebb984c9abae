"""Which stages a gang runs, how large it is, and what it cannot run: pure functions of configuration and plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from orchestrator.graph import Node, Plan
from orchestrator.machines import Machine, Slots, beside_gpus, room
from orchestrator.sections import Config, GangConfig
from orchestrator.yaml_loader import KeyPath
from workers.specs.experiment import ModelSpec, TrainSpec


def runs_together(node: Node, gang: GangConfig) -> bool:
    """Whether all ranks of the gang run this node together."""
    return gang.size is not None and node.kind == "train" and node.estimate.trainable >= gang.min_parameters


def gang_nodes(plan: Plan, gang: GangConfig) -> frozenset[str]:
    """Ids of the train nodes that all ranks of the gang run together."""
    return frozenset(node.id for node in plan.nodes if runs_together(node, gang))


def settle_gang(
    machines: Iterable[Machine], *, size: int | str, slots: int | str, threads: int | str, device: str
) -> tuple[Slots, int]:
    """(slots beside the gang, ranks). Slot and rank are of one size: a device with a share of
    the cores, or `threads` CPU cores of one machine.

    What is given is kept, also when it cannot fit: the runner then says so. An `auto` size takes every device that
    slots leave; `auto` slots are what an explicit size leaves, perhaps none: the ranks then do the other work as well.
    """
    machines = list(machines)
    if device == "auto":
        device = "cuda" if any(machine.gpus >= 1 for machine in machines) else "cpu"
    gpus = 1 if device == "cuda" else 0
    beside = int(slots) if slots != "auto" else 0
    if threads != "auto":
        width = int(threads)
    elif gpus:
        width = beside_gpus(machines)
    elif size == "auto":
        width = 1
    else:
        widest = int(max((machine.cpus for machine in machines), default=1))
        width = next((width for width in range(widest, 1, -1) if room(machines, width) >= int(size) + beside), 1)
    fit = room(machines, width, gpus)
    if size == "auto":
        return Slots(beside, width, device), max(1, fit - beside)
    return Slots(beside if slots != "auto" else max(0, fit - int(size)), width, device), int(size)


def problems(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """(key, message) of what no gang of this configuration can be."""
    gang, resources = config.resources.gang, config.resources
    if gang.size is None:
        return
    at: KeyPath = ("resources", "gang")
    if resources.runner != "ray":
        yield (*at, "size"), f"{gang.size}: needs resources.runner ray, which is {resources.runner}"
    for name in config.regimes:
        regime = config.regime(name)
        if regime.pipeline == "wavefront":
            yield (
                (*at, "size"),
                f"{gang.size}: not with pipeline wavefront ({name}): its rounds are spread over devices",
            )
        if regime.snapshots.production == "overlap":
            yield (*at, "size"), f"{gang.size}: not with snapshots.production overlap ({name}); allowed: before"
    if gang.strategy == "fsdp2" and isinstance(config.model, ModelSpec):
        yield (*at, "strategy"), "fsdp2: is for language models; ResNets, with their batch normalization, take ddp"


def training_problems(gang: GangConfig, train: TrainSpec) -> Iterator[tuple[tuple[str, ...], str]]:
    """(key inside `training`, message) of what these settings ask of a gang that it cannot do."""
    if gang.size is None:
        return
    if isinstance(gang.size, int) and train.batch_size < gang.size:
        yield ("batch_size",), f"{train.batch_size}: fewer samples than the gang has ranks ({gang.size})"
    if train.compile:
        yield ("compile",), "true: not in a gang; leave resources.gang.size out, or compile"
    if gang.strategy != "fsdp2":
        return
    if train.lora is not None:
        yield ("lora",), "not with resources.gang.strategy fsdp2; allowed: ddp"
    if train.precision == "fp16":
        yield ("precision",), "fp16: not with resources.gang.strategy fsdp2; allowed there: fp32, bf16"
    if train.optimizer.name == "adamw8bit":
        yield ("optimizer", "name"), "adamw8bit: not with resources.gang.strategy fsdp2; allowed there: adamw, sgd"
    if train.frozen_weights != "full":
        yield ("frozen_weights",), f"{train.frozen_weights}: not with resources.gang.strategy fsdp2; allowed: full"
