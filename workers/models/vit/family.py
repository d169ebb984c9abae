"""torchvision's Vision Transformers as a model family. Loads no torch until parts or weights are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from workers.models.base import Capabilities, Export, Parts, Start, Traits
from workers.models.outline import ChainOutline
from workers.models.torchvision_family import TorchvisionFamily
from workers.models.vit.outline import sizes_of, vit_outline
from workers.specs.experiment import ViTSpec
from workers.specs.model import expect

if TYPE_CHECKING:
    from torch import Tensor

    from workers.models.counting import Shape

_LOADING = '''"""Rebuild this model with torchvision alone: `model = load()`."""

from pathlib import Path

from safetensors.torch import load_file
from torchvision.models import VisionTransformer


def load():
    here = Path(__file__).parent
    model = VisionTransformer(
        image_size={size},
        patch_size={sizes.patch},
        num_layers={sizes.layers},
        num_heads={sizes.heads},
        hidden_dim={sizes.hidden},
        mlp_dim={sizes.mlp},
        num_classes={classes},
    )
    model.load_state_dict(load_file(here / "model.safetensors"), strict=True)
    return model.eval()
'''


class ViTFamily(TorchvisionFamily[ViTSpec]):
    """See `workers.models.base.ModelFamily`."""

    name = "vit"
    spec = ViTSpec
    traits = Traits(
        noun="a ViT",
        stem=1,
        adapters=False,
        alike_layers=True,
        sized_weights=True,
        can=Capabilities(
            channels_last="is for networks of convolutions",
            sharding="is for language models; ViTs take ddp",
        ),
    )

    def outline(self, model: ViTSpec, found: None, sample: Shape, classes: int) -> ChainOutline:
        return vit_outline(model, sample[-1], classes)

    def start(self, model: ViTSpec, found: None) -> ViTSpec:
        # Dropout has no weights.
        return replace(model, dropout=ViTSpec.dropout)

    def words(self, model: ViTSpec, found: None) -> str:
        sizes = sizes_of(model)
        own = replace(model, weights=None, dropout=ViTSpec.dropout) != ViTSpec(name=model.name)
        return model.name if not own else f"a ViT of {sizes.layers} layers, width {sizes.hidden}, patch {sizes.patch},"

    def parts(self, model: ViTSpec, sample: Shape, classes: int) -> Parts:
        from workers.models.vit.parts import ViTParts

        return ViTParts(model, sample[-1], classes)

    def initial_state(self, start: Start) -> dict[str, Tensor]:
        from workers.models.vit.parts import initial_state

        if start.sample is None:
            raise TypeError("positions of a ViT depend on the size of its images, which is not given")
        return initial_state(expect(ViTSpec, start.model), start.sample[-1], start.classes, start.seed)

    def export(self, export: Export, target: Path) -> None:
        from workers.models.torchvision_folder import write_folder

        model = expect(ViTSpec, export.model)
        size = export.data["preprocessing"]["center_crop"]
        loading = _LOADING.format(size=size, sizes=sizes_of(model), classes=export.classes)
        write_folder(export, model, model.name, loading, target)


VIT = ViTFamily()
