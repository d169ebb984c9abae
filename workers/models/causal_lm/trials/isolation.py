"""Whether a model keeps packed documents apart, found by trying."""

from __future__ import annotations

import torch

from cache_store.errors import ConfigError
from workers.models.causal_lm.network.skeleton import build_skeleton
from workers.models.causal_lm.pretrained.verify import LARGER, own_logits, random_model
from workers.models.causal_lm.trials.shrunk import shrunk
from workers.specs.language import CausalLMSpec

#: Tokens of each of the two documents.
_DOCUMENT = 6
#: Differences below this share of the largest logit are rounding: other tokens go to other experts in other groups.
_ROUNDING = 1e-5
#: Planning should not need gigabytes: a model that cannot be made smaller than this does not count as isolating.
_MOST_WEIGHTS = 500_000_000


def keeps_documents_apart(spec: CausalLMSpec) -> bool:
    """Whether nothing of a packed document shows in the next one of its row, where positions restart.

    A small model of the kind is given two documents; the first changes, the second's logits must not. Masks alone do
    not say it: recurrent layers carry a state. False, too, where the model cannot run on this machine (flash
    attention).
    """
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
