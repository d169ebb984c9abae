"""What families of torchvision's image networks have in common. Loads no torch until weights are asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from workers.file_digests import digest_of_setting
from workers.models.base import Finding, ModelFamily, Start, Written
from workers.specs.experiment import ResNetSpec, VGGSpec, ViTSpec
from workers.specs.results import INITIAL_STATE

if TYPE_CHECKING:
    from torch import Tensor

    from cache_store.records.nodes import Attempt
    from workers.control import Control
    from workers.models.counting import Shape
    from workers.models.outline import ChainOutline

NetworkT = TypeVar("NetworkT", ResNetSpec, VGGSpec, ViTSpec)
#: Networks of convolutions, of which the head takes the last few.
ConvNetworkT = TypeVar("ConvNetworkT", ResNetSpec, VGGSpec)


class TorchvisionFamily(ModelFamily[NetworkT, None]):
    """A family whose spec has `weights`, a torchvision state dict to start from; all parts' states make one."""

    domain = "images"

    def architecture(self, model: NetworkT, found: None) -> NetworkT:
        return replace(model, weights=None)

    def weights_digest(self, model: NetworkT, found: None) -> str | None:
        return digest_of_setting(model.weights, "model.weights")

    def pretrained(self, model: NetworkT) -> bool:
        return model.weights is not None

    def fit_problems(self, model: NetworkT, chain: ChainOutline, sample: Shape) -> Iterator[Finding]:
        if chain.boundaries[0] != (sample,):
            (takes,) = chain.boundaries[0]
            yield ("data", "build"), f"gives samples of shape {sample}; {self.traits.noun} takes RGB images, {takes}"

    def write_start(self, start: Start, attempt: Attempt, control: Control) -> Written:
        from workers import tensor_files
        from workers.models.chain import state_digest

        state = self.initial_state(start)
        attempt.write(INITIAL_STATE, tensor_files.TensorStream(state))
        return Written(digest=state_digest(state))

    @abstractmethod
    def initial_state(self, start: Start) -> dict[str, Tensor]:
        """Return the whole network's state dict training starts from, on the CPU, made from `start` alone."""


class ConvFamily(TorchvisionFamily[ConvNetworkT]):
    """A family of networks of convolutions, cut into `segments`, with `head_convs` of them in the head."""

    def start(self, model: ConvNetworkT, found: None) -> ConvNetworkT:
        # How the chain is cut, or computes, later does not change the weights it starts from.
        return replace(model, segments="stages", head_convs=1, dropout=type(model).dropout)

    def with_head_convs(self, model: ConvNetworkT, head_convs: int | None) -> ConvNetworkT:
        return model if head_convs is None else replace(model, head_convs=head_convs)

    def regime_settings(self, model: ConvNetworkT) -> Mapping[str, int]:
        return {"head_convs": model.head_convs}
