"""Random weights of one part, by the model's own rules, from a seed of the part's own."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.network.parts import assemble
from workers.models.causal_lm.network.skeleton import build_skeleton, initialize
from workers.seeds import derive_seed
from workers.specs.language import CausalLMSpec


def random_state(spec: CausalLMSpec, name: str, seed: int) -> dict[str, Tensor]:
    """The initial state of a part on the host, in the types the model holds it in: a function of spec, name, seed.

    Drawn in float32 with the model class's own `_init_weights`; the global generators are left as they were.
    ConfigError when that leaves something unset.
    """
    model, part = build_skeleton(spec), assemble(spec, name)
    dtypes = {key: tensor.dtype for key, tensor in part.state_dict().items()}
    part = part.float().to_empty(device="cpu")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "part", name))
        for tensor in [*part.parameters(), *part.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        for module in part.modules():
            initialize(model, module)
    state = {key: tensor.detach().to(dtypes[key]).contiguous() for key, tensor in part.state_dict().items()}
    unset = [key for key, tensor in state.items() if tensor.isnan().any()]
    if unset:
        raise refuse(f"{model.config.model_type!r} has no rule for initial values of {unset[0]!r}; give model.path")
    return state
