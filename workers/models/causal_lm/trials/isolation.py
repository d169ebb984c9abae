"""Find out by trying whether a model keeps packed documents apart."""

from __future__ import annotations

import torch

from cache_store.errors import ConfigError
from workers.models.causal_lm.network.skeleton import build_skeleton, skeleton_key
from workers.models.causal_lm.trials.shrunk import shrunk
from workers.models.causal_lm.trials.verify import LARGER, own_logits, random_model
from workers.specs.language import CausalLMSpec

#: Tokens of each of the two documents.
_DOCUMENT = 6
#: Differences below this share of the largest logit are rounding: other tokens go to other experts in other groups.
_ROUNDING = 1e-5
#: Planning should not need gigabytes: a model that cannot be made smaller than this does not count as isolating.
_MOST_WEIGHTS = 500_000_000
#: Answers of this process, by what decides them.
_KNOWN: dict[str, bool] = {}


def keeps_documents_apart(spec: CausalLMSpec) -> bool:
    """Try whether nothing of a packed document shows in the next one of its row, where positions restart.

    spec: a task's, whose `config` holds the whole architecture. Gives a small model of the kind two documents; the
    first changes, the second's logits must not. Masks alone do not say it: recurrent layers carry a state. Returns
    False, too, where the model cannot run on this machine (flash attention). Takes less than 0.1 s where the
    architecture can be made narrow, up to 5 s where not (bamba, gptj, codegen). A process tries an architecture once.
    """
    key = skeleton_key(spec)
    if key not in _KNOWN:
        _KNOWN[key] = _try(spec)
    return _KNOWN[key]


def _try(spec: CausalLMSpec) -> bool:
    for narrow, larger in ((True, LARGER), (True, 1.0), (False, LARGER), (False, 1.0)):
        try:
            small = shrunk(spec, narrow)
            if sum(parameter.numel() for parameter in build_skeleton(small).parameters()) > _MOST_WEIGHTS:
                continue
            model = random_model(small, larger)
            vocabulary = int(model.config.vocab_size)
            drawn = torch.Generator().manual_seed(1)
            ids = torch.randint(vocabulary, (1, 2 * _DOCUMENT), generator=drawn)
            positions = torch.arange(2 * _DOCUMENT)[None] % _DOCUMENT
            other = ids.clone()
            other[:, :_DOCUMENT] = (ids[:, :_DOCUMENT] + 7) % vocabulary
            want, got = (own_logits(model, given, positions)[:, _DOCUMENT:] for given in (ids, other))
        except ConfigError:
            continue
        return bool((got - want).abs().max() <= _ROUNDING * want.abs().max())
    return False
