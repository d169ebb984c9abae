"""What differs between images and text, behind one door: parts, rows, batches, losses, scores.

Stages, snapshots and evaluations are written once, against `Domain`; `domain_of` picks the one an experiment
needs. Everything here imports torch.
"""

from __future__ import annotations

from workers.domains.base import Domain
from workers.specs.experiment import Experiment
from workers.specs.language import CausalLMSpec


def domain_of(experiment: Experiment) -> Domain:
    if isinstance(experiment.model, CausalLMSpec):
        from workers.domains.text.training import TextDomain

        return TextDomain(experiment)
    from workers.domains.images.training import ImageDomain

    return ImageDomain(experiment)
