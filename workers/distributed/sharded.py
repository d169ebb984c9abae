"""Split parameters over the ranks of a gang by FSDP2 or ZeRO-3, gather them and put them back. Plain tensors pass
through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from workers.device import with_values
from workers.distributed import partitions
from workers.distributed.gang import Gang
from workers.distributed.partitions import is_partitioned


def mesh_of(gang: Gang, device: torch.device) -> Any:
    """Return the ranks as torch's device mesh; None where nothing is shared by FSDP2."""
    if not gang.shards or gang.partitions:
        return None
    # Imported here and below: seconds that a single device need not spend.
    from torch.distributed.device_mesh import init_device_mesh

    # A mesh is a tensor of ranks with values, also where a stage is traced without any.
    with with_values():
        return init_device_mesh(device.type, (gang.size,))


def shard(module: nn.Module, mesh: Any, *, keep_gathered: bool = False) -> None:
    """Split a module's parameters over the ranks of a mesh (None: leave them whole), in place; they are gathered
    whenever it runs. `keep_gathered`: until its backward pass is through, for what is used outside the module's own
    forward (the LM head, by the loss)."""
    if mesh is None:
        return
    from torch.distributed.fsdp import fully_shard

    for each in [*_apart(module), module]:
        fully_shard(each, mesh=mesh, reshard_after_forward=not keep_gathered)


def _apart(module: nn.Module) -> list[nn.Module]:
    """List modules to be split before the whole, children first: FSDP2 gathers weights of one type together, and some
    models keep a few in float32 whatever the others are in."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in _whole(module.parameters()):
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    if len(sizes) < 2:
        return []
    most = max(sizes, key=lambda dtype: sizes[dtype])
    found: dict[int, nn.Module] = {}
    for inner in reversed(list(module.modules())[1:]):
        if any(parameter.dtype != most for parameter in _whole(inner.parameters(recurse=False))):
            # Its children hold what is of the other type, so each goes first, by itself.
            children = [child for child in inner.children() if _whole(child.parameters())]
            found |= {id(each): each for each in (*children, inner) if id(each) not in found}
    return list(found.values())


def _whole(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return those that are not split yet: parts of a chain are split before the chain is."""
    return [parameter for parameter in parameters if not is_sharded(parameter)]


def release(module: nn.Module) -> None:
    """Let go of gathered parameters, so that the module holds its own part only."""
    for each in module.modules():
        let_go = getattr(each, "reshard", None)
        if callable(let_go):
            let_go()


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def numel(parameter: Tensor) -> int:
    """Count the elements of the whole parameter."""
    return partitions.numel(parameter) if is_partitioned(parameter) else parameter.numel()


def held(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor, without a graph. Of one that ZeRO-3 splits it is a copy."""
    if is_partitioned(tensor):
        return partitions.own(tensor)
    own = tensor.detach()
    return cast("Tensor", cast("Any", own).to_local()) if is_sharded(own) else own


def on_host(tensor: Tensor) -> Tensor:
    """Copy to the host, contiguously, what this rank has of a tensor."""
    return held(tensor).to("cpu", copy=True).contiguous()


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole tensor: itself where it is not sharded. Of a sharded one all ranks must ask, and only the
    first gets a contiguous copy on the host: the others have an empty tensor."""
    if is_partitioned(tensor):
        return partitions.whole(tensor, partitions.own(tensor))
    if not is_sharded(tensor):
        return tensor.detach()
    full = cast("Any", tensor.detach()).full_tensor()
    if torch.distributed.get_rank() != 0:
        return torch.empty(0, dtype=tensor.dtype)
    return cast("Tensor", full).to("cpu", copy=True).contiguous()


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """Split a whole value, the same on all ranks, as `parameter` is."""
    if is_partitioned(parameter):
        return partitions.part(parameter, value)
    if not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    split = cast("Any", parameter)
    # src_data_rank=None: every rank takes its part of what it has, nothing is sent.
    made: Tensor = distribute_tensor(value.to(split.device), split.device_mesh, split.placements, src_data_rank=None)
    return made


def assembled(parameter: Tensor, local: Tensor) -> Tensor:
    """Put what `held` gave of a parameter on every rank together, as `gathered` does."""
    if is_partitioned(parameter):
        return partitions.whole(parameter, local)
    return gathered(_rejoined(parameter, local))


def put_back(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module back what `held` gave of tensors of its own, by name."""
    expected = module.state_dict(keep_vars=True)
    for name in [name for name in state if is_partitioned(expected[name])]:
        partitions.put(expected[name], state[name])
    plain = {name: value for name, value in state.items() if not is_partitioned(expected[name])}
    module.load_state_dict({name: _rejoined(expected[name], value) for name, value in plain.items()}, strict=False)


def _rejoined(parameter: Tensor, local: Tensor) -> Tensor:
    """Return what `held` gave of a parameter as the sharded tensor again."""
    if not is_sharded(parameter):
        return local
    from torch.distributed.tensor import DTensor

    split = cast("Any", parameter)
    made: Tensor = DTensor.from_local(
        local.to(split.device),
        split.device_mesh,
        split.placements,
        run_check=False,
        shape=split.shape,
        stride=split.stride(),
    )
    return made
