"""Architectures of four kinds, and what comes of each as a chain: docs/architectures.md is made of it."""

from __future__ import annotations

import runpy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from text_architectures import TEXTS, examine_text, text_case
from torch import Tensor, nn
from torch.nn import functional as F

from cache_store.errors import ConfigError
from workers.models.base import Export, ModelFamily, Parts, Start
from workers.models.chain import ModulePath
from workers.models.python.parts import initial_state
from workers.models.registry import family
from workers.specs.experiment import HFImageSpec, PythonSpec, TimmSpec, TorchvisionSpec

CLASSES = 5
_CPU = torch.device("cpu")
_SMALL = {"image_size": 32, "patch_size": 8, "num_attention_heads": 2, "hidden_size": 32, "num_hidden_layers": 3}
_STAGES = {"hidden_sizes": [8, 16], "depths": [2, 2]}
_EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "own_network"


@dataclass(frozen=True)
class Result:
    """A row of the page; `reason`: of a refusal, empty where all is equal."""

    library: str
    name: str
    sample: str
    blocks: int
    parameters: int
    reason: str


@dataclass(frozen=True)
class Case:
    """One architecture, and the side of its square RGB samples."""

    model: Any
    side: int = 32

    @property
    def library(self) -> str:
        return {"hf_image": "transformers", "python": "python"}.get(self.model.family, self.model.family)


@dataclass(frozen=True)
class TextCase:
    """A text classifier of transformers, by its kind; samples of up to 12 tokens."""

    kind: str
    library: str = "transformers text"

    def examined(self) -> tuple[int, int, str]:
        """Return blocks, parameters, and what is not equal. ConfigError where it is refused."""
        return examine_text(text_case(self.kind))


def _torchvision(name: str, side: int = 64, **args: Any) -> tuple[str, Case]:
    return f"torchvision/{name}", Case(TorchvisionSpec(name=name, args=args), side)


def _timm(name: str, side: int = 64, **args: Any) -> tuple[str, Case]:
    return f"timm/{name}", Case(TimmSpec(name=name, args=args), side)


def _transformers(kind: str, side: int = 32, **config: Any) -> tuple[str, Case]:
    return f"transformers/{kind}", Case(HFImageSpec(family="hf_image", config={"model_type": kind, **config}), side)


def _python(build: str, side: int = 64, **args: Any) -> tuple[str, Case]:
    return f"python/{build}", Case(PythonSpec(build=build, args=args, path=str(_EXAMPLES)), side)


_TOKENS = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24}
CASES: dict[str, Case | TextCase] = dict(
    (
        _torchvision("alexnet"),
        _torchvision("convnext_tiny"),
        _torchvision("densenet121"),
        _torchvision("efficientnet_b0"),
        _torchvision("efficientnet_v2_s"),
        _torchvision("googlenet"),
        _torchvision("inception_v3", 96, aux_logits=False),
        _torchvision("mnasnet0_5"),
        _torchvision("mobilenet_v2"),
        _torchvision("mobilenet_v3_small"),
        _torchvision("regnet_x_400mf"),
        _torchvision("regnet_y_400mf"),
        _torchvision("resnet18"),
        _torchvision("resnext50_32x4d"),
        _torchvision("shufflenet_v2_x0_5"),
        _torchvision("squeezenet1_1"),
        _torchvision("swin_t"),
        _torchvision("swin_v2_t"),
        _torchvision("vit_b_32", image_size=64),
        _timm("beit_base_patch16_224", 32, **_TOKENS, num_heads=2),
        _timm("cait_xxs24_224", 32, **_TOKENS, num_heads=2),
        _timm("caformer_s18"),
        _timm("coat_lite_tiny", img_size=64),
        _timm("convnext_atto"),
        _timm("convnextv2_atto"),
        _timm("crossvit_tiny_240", 240),
        _timm("cspresnet50"),
        _timm("davit_tiny"),
        _timm("deit3_small_patch16_224", 32, **_TOKENS, num_heads=2),
        _timm("dla34"),
        _timm("edgenext_xx_small"),
        _timm("efficientformer_l1", 224),
        _timm("efficientnet_lite0"),
        _timm("eva02_tiny_patch14_224", 32, **_TOKENS, num_heads=2),
        _timm("fastvit_t8"),
        _timm("focalnet_tiny_srf"),
        _timm("ghostnet_050"),
        _timm("gmlp_ti16_224", 64, img_size=64),
        _timm("hrnet_w18_small"),
        _timm("inception_next_atto"),
        _timm("levit_128s", 224),
        _timm("maxvit_pico_rw_256", 64, img_size=64),
        _timm("mixer_s32_224", 64, img_size=64),
        _timm("mobilenetv4_conv_small"),
        _timm("mobilevit_xxs"),
        _timm("nest_tiny", 224),
        _timm("pit_ti_224", 224),
        _timm("poolformer_s12"),
        _timm("pvt_v2_b0"),
        _timm("regnety_002"),
        _timm("repvgg_a0"),
        _timm("resmlp_12_224", 64, img_size=64),
        _timm("resnetv2_50"),
        _timm("rexnet_100"),
        _timm("seresnet18"),
        _timm(
            "swin_tiny_patch4_window7_224",
            32,
            img_size=32,
            window_size=4,
            embed_dim=12,
            depths=(2, 2),
            num_heads=(2, 2),
        ),
        _timm("swinv2_cr_tiny_224", 64, img_size=64),
        _timm("twins_svt_small"),
        _timm("vit_tiny_patch16_224", 32, **_TOKENS),
        _timm("xcit_nano_12_p16_224", 64, img_size=64),
        _transformers("beit", **_SMALL, intermediate_size=64),
        _transformers("bit", 64, **_STAGES, embedding_size=8, num_groups=4),
        _transformers("convnext", 64, hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 2, 1], image_size=64),
        _transformers("convnextv2", 64, hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 2, 1], image_size=64),
        _transformers("cvt", 64),
        _transformers("data2vec-vision", **_SMALL, intermediate_size=64),
        _transformers("deit", **_SMALL, intermediate_size=64),
        _transformers("dinov2", **_SMALL),
        _transformers("dinov2_with_registers", **_SMALL),
        _transformers("efficientnet", 64, width_coefficient=0.25, depth_coefficient=0.5, image_size=64, hidden_dim=320),
        _transformers("focalnet", image_size=32, embed_dim=8, depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 32, 64]),
        _transformers("hgnet_v2", 64),
        _transformers("ijepa", **_SMALL, intermediate_size=64),
        _transformers("levit", 224),
        _transformers("mobilenet_v1", depth_multiplier=0.25, image_size=32, classifier_dropout_prob=0.2),
        _transformers("mobilenet_v2", depth_multiplier=0.35, image_size=32),
        _transformers("mobilevit", 64, image_size=64),
        _transformers("poolformer", 64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
        _transformers("regnet", 64, **_STAGES, embedding_size=8, groups_width=4),
        _transformers("resnet", **_STAGES, embedding_size=8, layer_type="basic"),
        _transformers("segformer", 64),
        _transformers("siglip", vision_config={**_SMALL, "intermediate_size": 64}),
        _transformers("swiftformer", 64),
        _transformers("textnet", 64),
        _transformers("vit", **_SMALL, intermediate_size=64),
        _transformers("vit_msn", **_SMALL, intermediate_size=64),
        *((f"transformers text/{kind}", TextCase(kind)) for kind in TEXTS),
        _python("mynets:unet_encoder", 32, channels=3, classes=CLASSES),
        _python("torchvision.models:mobilenet_v3_large", num_classes=CLASSES),
        _python("torchvision.models:wide_resnet50_2", num_classes=CLASSES),
    )
)
#: One a library, seconds each: what the tests try anew.
SAMPLED = (
    "transformers text/electra",
    "torchvision/mnasnet0_5",
    "timm/pvt_v2_b0",
    "transformers/ijepa",
    "python/mynets:unet_encoder",
)


def examine(name: str, case: Case | TextCase) -> Result:
    """Try one architecture. Its reason is empty where everything is equal."""
    if isinstance(case, TextCase):
        text = (case.library, case.kind, "12")
        try:
            return Result(*text, *case.examined())
        except ConfigError as error:
            reason = error.message.partition(": ")[2].removeprefix(f"{case.kind!r} is ").removeprefix(f"{case.kind}: ")
            return Result(*text, 0, 0, reason)
    sample = (3, case.side, case.side)
    row = (case.library, name.partition("/")[2], "x".join(map(str, sample)))
    own = family(case.model.family)
    try:
        found = own.inspect(case.model)
        settled: Any = own.architecture(case.model, found)
        parts = own.parts(settled, sample, CLASSES)
        blocks = len(own.outline(case.model, found, sample, CLASSES).blocks)
    except ConfigError as error:
        return Result(*row, 0, 0, error.message.partition(": ")[2].removeprefix(f"{row[1]}: "))
    state = _initial(own, settled, sample)
    count = sum(tensor.numel() for tensor in state.values())
    tried = (
        _chain(own, settled, parts, state, sample),
        _stages(parts, state, sample),
        _export(own, settled, state, sample),
    )
    return Result(*row, blocks, count, "; ".join(filter(None, tried)))


def _initial(own: ModelFamily[Any, Any], model: Any, sample: tuple[int, ...]) -> dict[str, Tensor]:
    if model.family == "python":
        return initial_state(model, 3)
    start = Start(model, CLASSES, 3, sample)
    return own.initial_state(start)  # type: ignore[attr-defined, no-any-return]


def _whole(own: ModelFamily[Any, Any], model: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """The library's own network with these weights, its forward as the library has it."""
    if model.family == "python":
        from workers.models.python.building import build

        network = build(model, 0)
    else:
        network = own.library(model).built(CLASSES, 0)  # type: ignore[attr-defined]
    # Its own state has the versions of modules.
    given = network.state_dict()
    given.update({name: tensor.clone() for name, tensor in state.items()})
    network.load_state_dict(given, strict=True)
    return network


def _modules(parts: Parts, state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    modules = {}
    for name in parts.names():
        modules[name] = parts.build(name, _CPU)
        modules[name].load_state_dict({key: state[key].clone() for key in parts.state_names(name)}, strict=True)
    return modules


def scores_of(given: Any) -> Tensor:
    """The scores among what a library's network gives."""
    return given if isinstance(given, Tensor) else given.logits  # type: ignore[no-any-return]


def _batch(sample: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, *sample, generator=generator), torch.arange(4) % CLASSES


def _chain(
    own: ModelFamily[Any, Any], model: Any, parts: Parts, state: Mapping[str, Tensor], sample: tuple[int, ...]
) -> str:
    """Compare scores, gradients and running statistics in training; in words what differs."""
    network, modules = _whole(own, model, state).train(), _modules(parts, state)
    x, targets = _batch(sample)
    torch.manual_seed(1)
    want = scores_of(network(x.clone()))
    torch.manual_seed(1)
    given = ModulePath(modules, modules.keys()).train()((x.clone(),))
    if not torch.equal(want, given):
        return "scores differ in training"
    F.cross_entropy(want, targets).backward()
    F.cross_entropy(given, targets).backward()
    trained = {key: tensor for module in modules.values() for key, tensor in module.named_parameters()}
    for key, parameter in network.named_parameters():
        there = trained[key].grad
        if not (there is parameter.grad is None or torch.equal(_or_zero(there), _or_zero(parameter.grad))):
            return f"gradients differ, first of {key}"
    after = {key: tensor for module in modules.values() for key, tensor in module.state_dict().items()}
    wrong = [key for key, tensor in network.state_dict().items() if not torch.equal(after[key], tensor)]
    return f"running statistics differ, first {wrong[0]}" if wrong else ""


def _or_zero(gradient: Tensor | None) -> Tensor:
    return torch.zeros(()) if gradient is None else gradient


def _stages(parts: Parts, state: Mapping[str, Tensor], sample: tuple[int, ...]) -> str:
    """Train a step of SegProp's first stage (block, adapter, head) and of LW's (block, local head)."""
    names = parts.names()
    first, blocks = names[0], len(names) - 1
    adapter = {"adapter": parts.build_adapter(1, blocks, 5, _CPU)} if blocks > 1 else {}
    modules = _modules(parts, state)
    segprop = {first: modules[first], **adapter, "head": modules["head"]}
    lw = {first: _modules(parts, state)[first], "aux": parts.build_aux(1, 5, _CPU, None)}
    for regime, path in (("SegProp", segprop), ("LW", lw)):
        trained = ModulePath(path, path.keys()).train()
        before = {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
        for _ in range(2):
            # Twice: some libraries' classifiers begin as zeros, so that nothing before them learns from the first step.
            x, targets = _batch(sample)
            optimizer.zero_grad()
            loss = F.cross_entropy(trained((x,)), targets)
            loss.backward()
            optimizer.step()
        moved = [name for name, p in trained.named_parameters() if p.grad is not None and p.grad.any()]
        still = [name for name in moved if torch.equal(before[name], dict(trained.named_parameters())[name])]
        if not torch.isfinite(loss) or not any(name.startswith(f"parts.{first}.") for name in moved) or still:
            return f"one stage of {regime} does not train"
    return ""


def _export(own: ModelFamily[Any, Any], model: Any, state: Mapping[str, Tensor], sample: tuple[int, ...]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        own.export(Export(model, CLASSES, iter([("all", dict(state))]), {}, {}, {}), target)
        loaded = runpy.run_path(str(target / "load_model.py"))["load"]()
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            # Where a file is mapped, weights begin at any address, and kernels add up in another order.
            tensor.data = tensor.data.clone()
        x, _ = _batch(sample)
        with torch.no_grad():
            same = torch.equal(scores_of(loaded(x.clone())), scores_of(_whole(own, model, state).eval()(x.clone())))
    return "" if same else "the exported folder gives other scores"
