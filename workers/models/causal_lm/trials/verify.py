"""Check one model cheaply: run a small model of its architecture as a chain and by its own forward, and compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cache_store.errors import ConfigError, first_line
from workers.models.causal_lm.errors import refuse
from workers.models.causal_lm.network.context import Frame
from workers.models.causal_lm.network.parts import Boundary, build_part, part_names, part_state_names
from workers.models.causal_lm.network.recording import accepts
from workers.models.causal_lm.network.skeleton import UNTYPED_AUTO, architecture, build_config, build_skeleton, untied
from workers.models.causal_lm.network.structure import structure
from workers.models.causal_lm.trials.shrunk import shrunk
from workers.specs.language import CausalLMSpec

#: Two rows of tokens, the second of documents that are packed together.
_LENGTH, _DOCUMENT = 12, 5
#: How much larger matrices are drawn than a training starts with.
LARGER = 4.0
#: No model of more weights is built only to try it: 8 GB.
_MOST_WEIGHTS = 2 * 10**9


def verify_chain(spec: CausalLMSpec) -> None:
    """Raise ConfigError when the chain of a task's spec gives other logits than the model's own forward, or when
    that one looks ahead.

    Both run in float32 on random weights of a shrunk config: every kind of layer, few of them, a small vocabulary,
    narrow where the config can be narrowed. Takes about a second.
    """
    part_names(spec)  # what is no chain in full is none when it is small: refused for its own reason
    refusal: ConfigError | None = None
    # What was shrunk may not go together; the full width always does. Large weights may overflow.
    for narrow, larger in ((True, LARGER), (True, 1.0), (False, LARGER), (False, 1.0)):
        try:
            small = shrunk(spec, narrow)
            part_names(small)
            model = random_model(small, larger)
            ids, positions = _sample(small)
            want = own_logits(model, ids, positions)
        except ConfigError as error:
            refusal = error
            continue
        _looks_back(model, ids, positions, want)
        _compare(small, model, ids, positions, want)
        return
    if refusal is not None:
        raise refusal


def random_model(spec: CausalLMSpec, larger: float = LARGER) -> PreTrainedModel:
    """Make transformers' own model of a spec on the host, in float32 and eval mode, with random weights, matrices
    `larger` times as large as a training starts with: what one token takes from others shows then."""
    skeleton = build_skeleton(spec)
    kernel = skeleton.config._attn_implementation
    if sum(parameter.numel() for parameter in skeleton.parameters()) > _MOST_WEIGHTS:
        raise refuse(f"{_name(spec)!r} cannot be made small enough to be tried before it is trained")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = UNTYPED_AUTO.from_config(
                build_config(untied(architecture(spec)), spec),
                dtype=torch.float32,
                attn_implementation=kernel,
                trust_remote_code=spec.trust_remote_code,
            )
    except Exception as e:  # whatever a model's constructor raises
        raise refuse(f"transformers builds no causal LM of {_name(spec)!r}: {first_line(e)}") from e
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(larger)
    return cast("PreTrainedModel", model.eval())


@torch.no_grad()
def own_logits(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """Compute logits by the model's own forward; ConfigError where it fails."""
    try:
        given = accepts(model, {"input_ids": ids, "position_ids": positions, "use_cache": False})
        logits: Tensor = model(**given).logits
    except Exception as e:
        raise refuse(f"the own forward of {model.config.model_type!r} fails on a small model: {first_line(e)}") from e
    if not bool(logits.isfinite().all()):
        raise refuse(f"the own forward of {model.config.model_type!r} gives infinite logits on a small model")
    return logits


def split_state(spec: CausalLMSpec, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split a whole model's state by part; ConfigError for weights that belong to no part."""
    names = {part: part_state_names(spec, part) for part in part_names(spec)}
    placed = {name for part in names.values() for name in part}
    left = sorted(set(state) - placed)
    if left:
        raise refuse(
            f"{_name(spec)!r} has {len(left)} weights outside embedding, layers, norm and LM head, first {left[0]}; it "
            "is no chain"
        )
    return {part: {name: state[name] for name in inside} for part, inside in names.items()}


def _sample(spec: CausalLMSpec) -> tuple[Tensor, Tensor]:
    vocabulary = int(architecture(spec)["vocab_size"])
    ids = torch.randint(vocabulary, (2, _LENGTH), generator=torch.Generator().manual_seed(0))
    return ids, torch.arange(_LENGTH) % torch.tensor([[_LENGTH], [_DOCUMENT]])


def _looks_back(model: PreTrainedModel, ids: Tensor, positions: Tensor, want: Tensor) -> None:
    """Check that another last token does not change what comes before it."""
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % int(model.config.vocab_size)
    other = own_logits(model, changed, positions)
    if not _close(other[:, :-1], want[:, :-1]):
        raise refuse(
            f"{model.config.model_type!r} looks ahead: what it says of a token depends on later ones, so next tokens "
            "cannot be learned (an encoder becomes a decoder by `is_decoder: true` in model.config)"
        )


@torch.no_grad()
def _compare(spec: CausalLMSpec, model: PreTrainedModel, ids: Tensor, positions: Tensor, want: Tensor) -> None:
    states = split_state(spec, model.state_dict())
    try:
        context = Frame(spec)(ids, positions)
        value: Any = (ids,)
        for name, state in states.items():
            part: nn.Module = build_part(spec, name).eval()
            part.load_state_dict(state)
            value = part(cast("Boundary", value), context)
        got = value.logits().view_as(want)
    except ConfigError:
        raise
    except Exception as e:  # whatever a model's code raises where it misses what its layers hand each other
        raise refuse(f"{_name(spec)!r} cannot be run part by part: {first_line(e)}{_handing(spec)}") from e
    if not _close(got, want):
        raise refuse(
            f"{_name(spec)!r} run part by part gives other logits than its own forward "
            f"(largest difference {float((got - want).abs().max()):.3g}); it cannot be trained in segments"
            f"{_handing(spec)}"
        )


def _handing(spec: CausalLMSpec) -> str:
    return "; its layers hand each other more than the hidden states" if structure(spec).hands_over else ""


def _close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def _name(spec: CausalLMSpec) -> str:
    return str(architecture(spec)["model_type"])
