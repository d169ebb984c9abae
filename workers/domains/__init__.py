"""What differs between images and text, behind one door: parts, rows, batches, losses, scores.

Stages, snapshots and evaluations are written once, against `Domain`; `domain_of` picks the one an experiment
needs. Everything here imports torch.
"""

from __future__ import annotations

from workers.domains.base import Batch, Domain, Rows, Scorer, Source
from workers.lm_specs import CausalLMSpec
from workers.specs import Experiment

__all__ = ["Batch", "Domain", "Rows", "Scorer", "Source", "domain_of"]


def domain_of(experiment: Experiment) -> Domain:
    if isinstance(experiment.model, CausalLMSpec):
        from workers.domains.text import TextDomain

        return TextDomain(experiment)
    from workers.domains.images import ImageDomain

    return ImageDomain(experiment)
