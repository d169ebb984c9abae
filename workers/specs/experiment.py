"""What a worker is told to do, as frozen data: plain dataclasses that travel as JSON.

The same classes are sections of the user's configuration, so a setting is defined, typed and bounded in
one place. Beside our own pure modules only the standard library and `annotated_types` (pure metadata) are imported
here: pydantic reads the annotations when a configuration is loaded, a worker needs neither pydantic nor Ray.

Vocabulary: a *part* is a named piece of the chain with weights: the blocks (`seg1`, `seg2`, … in order) and
`head`. `adapter` and `aux` are training-only parts of one stage. A *hop* is the run of consecutive blocks
that takes one stored boundary to the next stored boundary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from workers.specs.language import LabelledTextSpec, LoraSpec, TextSpec
from workers.specs.model import ModelSpec

#: `auto` is for configurations alone: `orchestrator.config.precision` settles it before a plan is made.
Precision = Literal["auto", "fp32", "bf16", "fp16"]
#: Precision -> the dtype that is computed in, by its name in `cache_store.formats.dtypes`.
COMPUTED: dict[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: Share of the updates that rounding to bfloat16 may take before plan, log and report warn.
MOST_SWALLOWED = 0.1
SnapshotDtype = Literal["auto", "float32", "bfloat16", "float16"]
ViTName = Literal["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"]
VGGName = Literal["vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"]
ResNetName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d"]

#: What a sample's target is; the rows are `workers.data.images.targets.TARGETS`.
TargetKind = Literal["classes", "labels", "numbers", "given"]

_STRICT: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class ResNetSpec(ModelSpec):
    """A torchvision ResNet as a chain. Sizes of adapters and heads are read from the boundaries."""

    family: Literal["resnet"] = "resnet"
    name: ResNetName
    #: imagenet: 7x7 stride 2 + max-pool. small: 3x3 stride 1, no pool, for images of 16 to 64 pixels.
    stem: Literal["imagenet", "small"] = "imagenet"
    classifier: Literal["mlp", "linear"] = "mlp"
    hidden: Annotated[int, Ge(1), Le(1 << 20)] = 512
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.3
    #: How many of the last residual block's convolutions belong to the head (1..2 basic, 1..3 bottleneck).
    head_convs: Annotated[int, Ge(1), Le(3)] = 1  # 0 in tasks of a regime whose head is pooling and classifier alone
    #: stages: seg1 = stem+layer1 … seg4; blocks: each residual block; or explicit lists of unit names.
    segments: Literal["stages", "blocks"] | tuple[tuple[str, ...], ...] = "stages"
    #: A torchvision state dict (.safetensors, or .pth read with weights_only) to start from; None: random.
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class ViTSpec(ModelSpec):
    """A torchvision Vision Transformer as a chain: `embed`, `layer0`, `layer1`, …, and the head (norm, classifier)."""

    family: Literal["vit"] = "vit"
    #: Sizes of torchvision's network of that name; each one that is set below takes the place of its own.
    name: ViTName = "vit_b_16"
    #: Side of a patch in pixels.
    patch: Annotated[int, Ge(1), Le(4096)] | None = None
    #: Encoder layers.
    layers: Annotated[int, Ge(1), Le(10_000)] | None = None
    #: Width of a token.
    hidden: Annotated[int, Ge(1), Le(1 << 20)] | None = None
    #: Attention heads; `hidden` is a multiple of them.
    heads: Annotated[int, Ge(1), Le(4096)] | None = None
    #: Inner width of a layer's feed-forward network.
    mlp: Annotated[int, Ge(1), Le(1 << 22)] | None = None
    #: In the embedding and in every layer.
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    #: A torchvision state dict (.safetensors, or .pth read with weights_only) to start from; None: random. Positions
    #: for images of another size are interpolated, a classifier of other classes stays random.
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class VGGSpec(ModelSpec):
    """A torchvision VGG as a chain. A unit is a convolution with what follows it, so max-pooling ends a stage."""

    family: Literal["vgg"] = "vgg"
    #: torchvision's name; `_bn`: with batch normalization.
    name: VGGName
    #: mlp: mean over the map, then hidden, ReLU, dropout and classes. linear: mean and one layer. torchvision: its own
    #: pooling to 7x7 and three layers of 120 million weights.
    classifier: Literal["mlp", "linear", "torchvision"] = "mlp"
    #: Width of the mlp classifier.
    hidden: Annotated[int, Ge(1), Le(1 << 20)] = 512
    #: Of the mlp and torchvision classifiers.
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5
    #: How many of the last stage's convolutions belong to the head.
    head_convs: Annotated[int, Ge(1), Le(3)] = 1  # 0 in tasks of a regime whose head is pooling and classifier alone
    #: stages: seg1 = stage1 … seg5; blocks: each convolution (stage1.0, stage2.0, …); or explicit lists of them.
    segments: Literal["stages", "blocks"] | tuple[tuple[str, ...], ...] = "stages"
    #: A torchvision state dict (.safetensors, or .pth read with weights_only) to start from; None: random. Layers of
    #: the classifier that do not fit stay random.
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class PythonSpec(ModelSpec):
    """A network of your own, as a chain (docs/own-network.md)."""

    family: Literal["python"] = "python"
    #: `module:function`, which returns a `segprop.Chain` or an `nn.Module` that is cut by itself. The module is looked
    #: for in `model.path`, in the current directory, then among installed packages.
    build: str
    #: Arguments of the function, by name.
    args: dict[str, Any] = field(default_factory=dict)
    #: Folder that the module lies in; null: that of the configuration.
    path: str | None = None
    #: Blocks of a module that is cut by itself. auto: at every joint behind a layer with weights; a number: so many, of
    #: about equal cost. A `segprop.Chain` is cut as it says.
    segments: Literal["auto"] | Annotated[int, Ge(1), Le(100_000)] = "auto"
    #: sha256 of the source that the function comes from: a run with other source is refused. In tasks always given.
    code: str | None = None


@dataclass(frozen=True, kw_only=True)
class TorchvisionSpec(ModelSpec):
    """A classifier of torchvision, cut by itself (docs/libraries.md)."""

    family: Literal["torchvision"] = "torchvision"
    #: As `torchvision.models.get_model` knows it: swin_t, convnext_tiny, efficientnet_b0, …
    name: str
    #: Arguments of the function that builds it, by name, such as {dropout: 0.1}.
    args: dict[str, Any] = field(default_factory=dict)
    #: Blocks. auto: at every joint; a number: so many, of about equal cost.
    segments: Literal["auto"] | Annotated[int, Ge(1), Le(100_000)] = "auto"
    #: A state dict (.safetensors, or .pth read with weights_only) to start from; None: random. A classifier of other
    #: classes stays random.
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class TimmSpec(ModelSpec):
    """A classifier of timm (the extra segprop[timm]), cut by itself (docs/libraries.md)."""

    family: Literal["timm"] = "timm"
    #: As `timm.create_model` knows it: vit_tiny_patch16_224, convnext_atto, …
    name: str
    #: Arguments of timm.create_model, by name, such as {img_size: 32, drop_path_rate: 0.1}.
    args: dict[str, Any] = field(default_factory=dict)
    #: Blocks. auto: at every joint; a number: so many, of about equal cost.
    segments: Literal["auto"] | Annotated[int, Ge(1), Le(100_000)] = "auto"
    #: A state dict (.safetensors, or .pth read with weights_only) to start from; None: random. A classifier of other
    #: classes stays random.
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class HFImageSpec(ModelSpec):
    """An image classifier of transformers, cut by itself (docs/libraries.md)."""

    family: Literal["hf_image"]
    #: A folder as `save_pretrained` writes it, with config.json and weights in *.safetensors; a classifier of other
    #: classes stays random. Null: random weights for `config`.
    path: str | None = None
    #: Architecture (the contents of a config.json, `model_type` included) for a random start, or settings laid over
    #: those of `path`. In tasks: the whole architecture.
    config: dict[str, Any] | None = None
    #: Blocks. auto: at every joint; a number: so many, of about equal cost.
    segments: Literal["auto"] | Annotated[int, Ge(1), Le(100_000)] = "auto"


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """A data set of images, or of samples of your own, and the views made of it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    LATER: ClassVar[tuple[str, ...]] = ("build", "args", "sample", "classes", "targets")

    name: Literal["digits", "cifar10", "cifar100", "folder", "python"]
    #: cifar: a folder or file of Parquet as on the Hugging Face hub, or torchvision's download folder.
    #: folder: has train/ and test/ (or val/) with one subfolder a class, or these subfolders themselves; val/ beside
    #: test/ is the validation split. python: the folder that the module lies in; null: that of the configuration.
    #: digits: not used.
    path: str | None = None
    download: bool = False
    image_size: Annotated[int, Ge(4), Le(4096)] = 224
    #: Side to which images are resized before cropping; None: image_size * 256 / 224, rounded.
    resize: Annotated[int, Ge(4), Le(1 << 16)] | None = None
    #: paper: RandomResizedCrop(0.6, 1) + flip + RandAugment(2, 9) + RandomErasing(0.25).
    #: light: pad-free random crop scale (0.6, 1) + flip. none: the test transform.
    augment: Literal["paper", "light", "none"] = "paper"
    #: Horizontal flips (off for digits, where a mirrored image is another symbol).
    flip: bool = True
    #: Epoch e uses augmentation view e mod views. auto: a fresh view an epoch where a stage computes from the images;
    #: of stored boundaries as many as snapshots.budget allows (without one: 16 GiB), at least 4, at most one an epoch;
    #: one where augment is none. The plan says how many.
    views: Literal["auto"] | Annotated[int, Ge(1), Le(10_000)] = "auto"
    #: Held out of train for choosing epochs, where the data has no validation split of its own: a fraction (< 1) or a
    #: count.
    validation: Annotated[float, Gt(0)] = 0.1
    #: Held out of train by the seed for the final score, where the data has no test split of its own: a fraction (< 1)
    #: or a count.
    test: Annotated[float, Gt(0)] = 0.1
    #: Use only this many training / test samples, chosen by seed (None: all).
    train_limit: Annotated[int, Ge(1)] | None = None
    test_limit: Annotated[int, Ge(1)] | None = None
    #: python: `module:function`, which returns `{"train": …, "test": …}`, data sets of (tensor, target), and may add
    #: `"validation"` (docs/own-network.md). Samples are taken as they are: image_size, resize, augment and views do not
    #: count.
    build: str | None = None
    #: Arguments of that function, by name.
    args: dict[str, Any] | None = None
    #: python: shape of one sample. null: that of the first.
    sample: tuple[Annotated[int, Ge(1)], ...] | None = None
    #: python: number of classes. null: as the data set's `classes` says, or the largest class there is. Of other
    #: targets the number of outputs that the head has for them; null: as many as a target has.
    classes: Annotated[int, Ge(1), Le(1 << 24)] | None = None
    #: python: what a target is. classes: a whole number. labels: a value of 0 to 1 for each of several labels. numbers:
    #: one number or several. given: a number or array, as it is. null: what `training.loss` takes, for a loss of your
    #: own given. It decides the metric, too: accuracy, micro-averaged F1, R², and for given the loss alone.
    targets: TargetKind | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    #: Update rule; momentum and nesterov count for sgd, betas and eps for adamw. adamw8bit: its moments in 8 bits
    #: (bitsandbytes). adamw4bit: in 4 bits (torchao).
    name: Literal["adamw", "sgd", "adamw8bit", "adamw4bit"] = "adamw"
    #: How weights in bfloat16 take updates smaller than their precision; float32 weights take all. stochastic: up or
    #: down by chance, right on average. compensated: the error is kept and added to the next update (6 more bytes a
    #: parameter). nearest: small updates are lost.
    rounding: Literal["stochastic", "compensated", "nearest"] = "stochastic"
    lr: Annotated[float, Gt(0), Le(1e6)] = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Gt(0)] = 1e-8
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Ge(0)] = 0.01


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """Learning rate over the steps of one stage; restarts at the base rate with every stage."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    name: Literal["cosine", "linear", "constant"] = "constant"
    #: Linear warm-up from 0 over this share of the stage's steps.
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.0
    #: What the rate goes down to, as a share of the base rate (cosine, linear): reached one step after the last, as in
    #: transformers.
    final: Annotated[float, Ge(0), Le(1)] = 0.0


@dataclass(frozen=True, kw_only=True)
class ExitSpec:
    """When a stage stops before its last epoch. Metrics are of the validation split on the stage's path."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    #: Stop after this many optimizer steps (None: epochs decide).
    steps: Annotated[int, Ge(1)] | None = None
    #: Stop when the monitored metric has not improved by `min_delta` for this many epochs.
    plateau: Annotated[int, Ge(1)] | None = None
    min_delta: Annotated[float, Ge(0)] = 0.0
    #: Stop when validation accuracy (0..1) reaches this; of other targets than classes F1 or R².
    target: Annotated[float, Gt(0), Le(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """What training makes small, the same for all regimes (docs/own-network.md)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    LATER: ClassVar[tuple[str, ...]] = ("delta", "build", "args", "path", "code")

    #: cross_entropy: one class a sample. multi_label: binary cross-entropy with logits, the mean over labels. mse,
    #: huber: the mean over outputs. python: a function of your own.
    name: Literal["cross_entropy", "multi_label", "mse", "huber", "python"] = "cross_entropy"
    #: huber: where the square ends and the line begins. null: 1.
    delta: Annotated[float, Gt(0)] | None = None
    #: python: `module:function`, called with the head's outputs (B, outputs) in float32 and the targets of B samples;
    #: returns their mean loss.
    build: str | None = None
    #: python: more arguments of that function, by name.
    args: dict[str, Any] | None = None
    #: python: folder that the module lies in; null: that of the configuration.
    path: str | None = None
    #: sha256 of the source that the function comes from: a run with other source is refused. In tasks always given.
    code: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    LATER: ClassVar[tuple[str, ...]] = ("loss",)

    #: Of images and data of your own; null: cross_entropy. In tasks it is a part of the experiment.
    loss: LossSpec | None = None
    epochs: Annotated[int, Ge(1), Le(1_000_000)] = 400
    batch_size: Annotated[int, Ge(1), Le(1 << 24)] = 256
    #: Micro-batches per optimizer step; batch_size must be a multiple.
    accumulate: Annotated[int, Ge(1), Le(1 << 24)] = 1
    #: Most samples that go through the path at once; None: batch_size / accumulate. With it the batch stays what it
    #: is wherever the stage runs, and the micro-batches per step follow. auto: for every stage the most that the device
    #: holds (`resources.device_memory`), settled by the plan and the same for as long as the stage trains (language
    #: models); another device gives other micro-batches, which sum in another order.
    micro_batch: Literal["auto"] | Annotated[int, Ge(1), Le(1 << 24)] | None = None
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    exit: ExitSpec = field(default_factory=ExitSpec)
    precision: Precision = "fp32"
    #: Max gradient norm (after unscaling); None: no clipping.
    clip: Annotated[float, Gt(0)] | None = None
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    #: Drop the last short batch of a training epoch (kept anyway when it is the only one). Language models: false where
    #: nothing is said.
    drop_last: bool = True
    #: Commit the weights of the best validation epoch or of the last.
    commit: Literal["best", "last"] = "best"
    #: The head's optimizer state at the start of a stage.
    head_optimizer: Literal["reset", "carry"] = "reset"
    activation_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = True
    #: Train low-rank adapters instead of whole matrices (language models).
    lora: LoraSpec | None = None
    #: The LM head's matrix in a stage that has it: trained, left alone (where the embedding is the same one, too), or
    #: (with lora) trained by an adapter.
    lm_head: Literal["train", "frozen", "lora"] = "train"
    #: Linear layers of the decoder layers of a path whose matrices are frozen, on the device (bitsandbytes): 8 or 4
    #: bits, or as they are. With lora also those under adapters (QLoRA).
    frozen_weights: Literal["full", "int8", "nf4"] = "full"
    #: Mid-stage checkpoint about this often (seconds), between steps; auto: as often as it pays, by what one costs and
    #: `resources.interruptions_every`, for at most 1% of the time; None: after every epoch.
    checkpoint_every_s: Literal["auto"] | Annotated[float, Gt(0)] | None = "auto"

    @property
    def micro(self) -> int:
        """Samples of a micro-batch (the last of a step may be smaller); before a plan has settled `auto` the most that
        it can be."""
        if self.micro_batch == "auto":
            return self.batch_size
        return min(self.batch_size, self.micro_batch or -(-self.batch_size // self.accumulate))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all nodes of a regime share: the chain, the data and the seed."""

    LATER: ClassVar[tuple[str, ...]] = ("loss",)

    model: ModelSpec
    data: ImageSpec | TextSpec | LabelledTextSpec
    #: Classes, or the size of the vocabulary; of other targets the outputs that the head has for them.
    classes: int
    seed: int
    #: Digest of the model code that comes with a trusted checkpoint.
    code: str | None = None
    #: None: cross-entropy.
    loss: LossSpec | None = None
