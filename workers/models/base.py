"""The contract between the rest of the project and a family of models; `workers.models.registry` has the table.

A family has a planning half, which reads files and does arithmetic, and a training half, which builds modules. Only
methods of the second may load torch, and only when they are called. Nothing outside asks which family a model is of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from cache_store.errors import UserError
from workers.specs.experiment import ImageSpec, TrainSpec
from workers.specs.language import CausalLMSpec, LabelledTextSpec, LoraSpec, TextSpec
from workers.specs.memory import ON_DEVICE, MemorySpec
from workers.specs.model import FileDigests, ModelSpec
from workers.specs.ranks import ONE_DEVICE, Ranks
from workers.specs.results import PartRecord

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cache_store.records.nodes import Attempt
    from workers.control import Control
    from workers.models.counting import Shape
    from workers.models.outline import ChainOutline, PartOutline

#: The spec class of a family, and what its `inspect` finds (None: nothing needs to be looked at).
SpecT = TypeVar("SpecT", bound=ModelSpec)
FoundT = TypeVar("FoundT")

#: What is wrong with a setting: the keys (in lists: the indices) that lead to it, and the message.
Finding = tuple[tuple[str | int, ...], str]

#: Files beside a model's weights (tokenizer, generation settings) are committed under names that begin so.
COMPANION = "companion-"

_LANGUAGE = "is for language models"


@dataclass(frozen=True)
class Capabilities:
    """What a configuration may ask of a family: None where the family can do it, else the words of the refusal.

    The defaults are those of an image classifier whose parts are trained as they are.
    """

    lora: str | None = _LANGUAGE
    lm_head: str | None = _LANGUAGE
    frozen_weights: str | None = _LANGUAGE
    #: memory.masters, beside weights in bfloat16.
    masters: str | None = _LANGUAGE
    #: split.omit: blocks left out while training and put back afterwards.
    omit: str | None = _LANGUAGE
    fp8: str | None = f"fp8: {_LANGUAGE}; allowed for images: plain, lossless, int8"
    #: resources.gang.strategy: fsdp2 and zero3, after the name of which the words stand.
    sharding: str | None = f"{_LANGUAGE}; allowed: ddp"
    channels_last: str | None = None
    #: training.micro_batch: auto.
    auto_micro: str | None = "auto: batch normalization learns from what a micro-batch is made of; allowed: a number"
    #: evaluation.judge: questions in words, which an exported network answers.
    judged: str | None = _LANGUAGE
    #: regimes.<name>.head_convs.
    head_convs: str | None = "is for ResNets and VGGs"
    #: regimes.<name>.variant: of LW, which needs a chain that can be cut before pooling.
    variant: str | None = "is for ResNets and VGGs"


@dataclass(frozen=True)
class Traits:
    """How the chains of a family are shaped, as far as stages, plans and scores depend on it."""

    #: One model, as a sentence names it.
    noun: str
    #: Leading blocks that always go with the base and that `split.base` does not count (an embedding).
    stem: int = 0
    #: Boundaries differ in shape, so stages that leave blocks out bridge them by an adapter.
    adapters: bool = True
    #: LW's local heads start as copies of the model's own head.
    copies_head: bool = False
    #: Blocks behind the stem are alike: a chain without some of them is a network whose score means something, and a
    #: curve over their numbers can be drawn.
    alike_layers: bool = False
    #: A pretrained model is scored as it came, before anything is trained.
    scores_original: bool = False
    #: The optimizer's state is worth a column in the dry run.
    large_optimizer: bool = False
    #: The initial weights depend on the shape of a sample.
    sized_weights: bool = False
    #: What its models do, in the hub's words; None: nothing it has a word for.
    pipeline: str | None = "image-classification"
    can: Capabilities = field(default_factory=Capabilities)


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage; `trainable` counts parameters. `peak` is where the walk found most, not the others' sum."""

    trainable: int
    weights: int
    gradients: int
    optimizer: int
    #: Activations of one micro-batch when the forward pass is done, autocast's copies of weights among them.
    activations: int
    #: What making the loss takes beside them.
    loss: int
    peak: int
    #: Weights of the parts that the stage commits.
    committed: int
    #: What lies on the host in place of the device: frozen weights and activations.
    away: int = 0


@dataclass(frozen=True)
class StageParts:
    """The parts of one stage, as far as its memory depends on them."""

    path: Sequence[PartOutline]
    #: Names of the parts that are trained in the course of the stage.
    trained: frozenset[str]
    train: TrainSpec
    #: Those of them that get gradients, where the others are frozen for the time being; None: all.
    active: frozenset[str] | None = None
    #: Frozen parts that run on the device before every step, in groups of `group_rows` samples.
    prefix: Sequence[PartOutline] = ()
    group_rows: int = 0
    #: Bytes of an element of the snapshots the stage reads; None: it reads raw inputs.
    stored_item_bytes: int | None = None
    #: The device is the host.
    on_host: bool = False
    #: Where the stage keeps what it holds.
    memory: MemorySpec = ON_DEVICE
    #: The devices that hold it together; `train` then says what one of them takes of a step.
    ranks: Ranks = ONE_DEVICE

    @property
    def updated(self) -> frozenset[str]:
        """Names of the parts that get gradients."""
        return self.trained if self.active is None else self.trained & self.active


@dataclass(frozen=True)
class FrozenBytes:
    """Bytes of parts that run frozen, one after the other: weights of each, and what works beside them."""

    weights: Sequence[int]
    working: int


def two_at_a_time(sizes: Sequence[int]) -> int:
    """Most bytes on the device of blocks that come one after the other, each while the one before it computes."""
    return max((sum(sizes[index : index + 2]) for index in range(len(sizes))), default=0)


@dataclass(frozen=True)
class StageTraining:
    """What a stage of a plan trains, and how."""

    trained: tuple[str, ...]
    train: TrainSpec


class TrainedParts(Protocol):
    """What rules need to know of a stage. `name`: as messages call it; `trained`: the parts whose weights change;
    `adapter`: the boundaries that its adapter leads from and to; `aux`: the boundary that its local head reads."""

    @property
    def name(self) -> str: ...
    @property
    def trained(self) -> tuple[str, ...]: ...
    @property
    def adapter(self) -> tuple[int, int] | None: ...
    @property
    def aux(self) -> int | None: ...


@dataclass(frozen=True)
class Ties:
    """Where a regime holds as one the tensor that two parts of its model share (the embedding and the LM head)."""

    #: Whether the model comes so.
    start: bool = False
    #: Of every stage in order; empty: in none.
    held: tuple[bool, ...] = ()
    #: A sentence where a stage parts them: which, and how they stay one.
    note: str | None = None


@dataclass(frozen=True)
class Start:
    """What the initial weights of a model are made from. `model` is what `ModelFamily.start` gave."""

    model: ModelSpec
    classes: int
    seed: int
    #: Shape of one sample, where `Traits.sized_weights` asks for it.
    sample: Shape | None


@dataclass(frozen=True, kw_only=True)
class Written:
    """Initial weights as an attempt holds them: one file `state.safetensors` with every tensor of the network and its
    `digest`; or a file a part, and a file `companion-<name>` for each of `companions`."""

    digest: str | None = None
    parts: Mapping[str, PartRecord] | None = None
    companions: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Export:
    """A trained model on its way out. `states` gives every part once, in forward order, read when it is asked for."""

    model: ModelSpec
    classes: int
    states: Iterator[tuple[str, Mapping[str, Tensor]]]
    #: Files that the commit of the initial weights holds beside them, by name.
    companions: Mapping[str, bytes]
    #: JSON facts of the data: class names, preprocessing.
    data: Mapping[str, Any]
    #: Part -> node that it comes from and digest of the file that holds it.
    sources: Mapping[str, list[str]]


@dataclass(frozen=True)
class AdapterPiece:
    """Low-rank adapters that one stage trained on a part: what they add is alpha / rank of `lora` times B @ A."""

    #: `<linear>.lora_A.weight` (rank, in) and `<linear>.lora_B.weight` (out, rank), float32, read when asked for.
    tensors: Callable[[], Mapping[str, Tensor]]
    lora: LoraSpec
    #: Into how many bits the part's matrices had been rounded (`TrainSpec.frozen_weights`), and what was computed in.
    frozen_weights: str = "full"
    precision: str = "fp32"


@dataclass(frozen=True)
class AdapterExport:
    """What low-rank adapters add to the weights that training started from."""

    #: As the architecture is exported.
    model: ModelSpec
    #: As the initial weights were read: its path, revision and what was left out of it.
    base: ModelSpec
    #: Part -> what stages trained on it, in order; {} for a part that is as it was.
    pieces: Mapping[str, Sequence[AdapterPiece]]
    #: As in `Export`.
    companions: Mapping[str, bytes]
    sources: Mapping[str, list[str]]


class ModelFamily(ABC, Generic[SpecT, FoundT]):
    """A family of models. One object serves all its models; its methods are given a model's spec and what `inspect`
    found. A package adds an instance by an entry point of the group `segprop.model_families`, and must be installed on
    every machine that trains."""

    #: As `model.family` names it.
    name: ClassVar[str]
    #: A frozen dataclass derived from `ModelSpec`: what the section `model` of a configuration may say.
    spec: ClassVar[type[ModelSpec]]
    #: The domain its models work on, by its name in `workers.domains.registry`.
    domain: ClassVar[str]
    traits: ClassVar[Traits]
    #: Packages that compute: another version of one may give other numbers, so it is part of every result's identity.
    libraries: ClassVar[tuple[str, ...]] = ("torch",)

    # -- planning: no torch at import ---------------------------------------------------------------------

    def inspect(self, model: SpecT) -> FoundT | None:
        """Look at what a model starts from, as far as planning needs it. ConfigError with `where`, the dotted key."""
        return None

    @abstractmethod
    def outline(self, model: SpecT, found: FoundT | None, sample: Shape, classes: int) -> ChainOutline:
        """The chain in figures for samples of this shape. ConfigError with `where` when there is no such chain.

        Names of blocks and shapes of boundaries between them may not depend on `classes`: checks pass a dummy.
        """

    def outputs(self, found: FoundT | None, classes: int | None) -> int:
        """What the head chooses from. `classes`: of the data set; None where its targets are tokens."""
        if classes is None:
            raise TypeError(f"{self.name} needs data with classes")
        return classes

    def architecture(self, model: SpecT, found: FoundT | None) -> ModelSpec:
        """The spec without what only says where files lie: every stage's task holds it, and its node id."""
        return model

    def start(self, model: SpecT, found: FoundT | None) -> ModelSpec:
        """The spec with defaults for whatever does not change the initial weights, so that models share them."""
        return model

    def weights_digest(self, model: SpecT, found: FoundT | None) -> str | None:
        """Identity of the files of initial weights; None for random ones. ConfigError when they cannot be read."""
        return None

    def file_digests(self, model: SpecT, found: FoundT | None) -> FileDigests:
        """Identities of the files beside the weights: tokenizer, companions of an export, model code."""
        return FileDigests()

    def pretrained(self, model: SpecT) -> bool:
        """Whether a model starts from weights that were trained before."""
        return False

    def tokenizing(self, model: SpecT) -> CausalLMSpec | None:
        """The settings that decide how text is tokenized for a model; None where data need no tokenizer."""
        return None

    def narrow_weights(self, model: SpecT, found: FoundT | None) -> bool:
        """Whether the weights that train are held in less than float32."""
        return False

    def with_head_convs(self, model: SpecT, head_convs: int | None) -> SpecT:
        """The model with a regime's own `head_convs`; only where `Capabilities.head_convs` allows it."""
        return model

    def with_bare_head(self, model: SpecT) -> SpecT:
        """The model cut so late that its head is pooling and classifier alone; only where `Capabilities.variant` allows
        it. Initial weights and states of the network stay the same."""
        return model

    def regime_settings(self, model: SpecT) -> Mapping[str, Any]:
        """Settings of the model that each regime's section of a resolved configuration repeats."""
        return {}

    def data_problems(
        self, model: SpecT, found: FoundT, data: ImageSpec | TextSpec | LabelledTextSpec
    ) -> Iterator[Finding]:
        """What is wrong with these data for this model, without looking at them."""
        yield from ()

    def stage_problems(
        self, stage: TrainedParts, chain: ChainOutline, train: TrainSpec, rows: int
    ) -> Iterator[Finding]:
        """What is wrong with training a stage on `rows` samples. The keys are those of `train`."""
        yield from ()

    def fit_problems(self, model: SpecT, chain: ChainOutline, sample: Shape) -> Iterator[Finding]:
        """What is wrong with this chain for samples of this shape and their classes, whose number the chain knows."""
        yield from ()

    def missing_weights(self, model: SpecT, found: FoundT | None) -> str | None:
        """Why a model that can be planned for cannot be trained; None when it can."""
        return None

    @abstractmethod
    def words(self, model: SpecT, found: FoundT | None) -> str:
        """The model in a few words, to be followed by ` on ` and the data."""

    def notes(self, model: SpecT, found: FoundT | None, stages: Sequence[StageTraining]) -> Iterator[str]:
        """Yield what a user should know before a regime trains these stages, in sentences."""
        yield from ()

    def ties(
        self,
        model: SpecT,
        found: FoundT | None,
        stages: Sequence[tuple[TrainedParts, TrainSpec]],
        *,
        in_turn: bool,
    ) -> Ties:
        """Where the stages of a regime hold shared tensors as one. `in_turn`: false where stages overlap."""
        return Ties()

    def stage_memory(self, model: SpecT, found: FoundT | None, stage: StageParts) -> StageMemory | None:
        """Memory of a stage; None where the general estimate from shapes is good enough."""
        return None

    def frozen_bytes(
        self, model: SpecT, found: FoundT | None, parts: Sequence[PartOutline], rows: int, precision: str
    ) -> FrozenBytes | None:
        """Memory of pushing `rows` samples through frozen parts at once; None as for `stage_memory`."""
        return None

    # -- training: may load torch --------------------------------------------------------------------------

    @abstractmethod
    def parts(self, model: SpecT, sample: Shape, classes: int) -> Parts:
        """The parts of a model as modules."""

    @abstractmethod
    def write_start(self, start: Start, attempt: Attempt, control: Control) -> Written:
        """Write the initial weights into `attempt`. Interrupted when `control` asks to stop."""

    @abstractmethod
    def export(self, export: Export, target: Path) -> None:
        """Write the folder `target`, in place of what it holds, so that the family's own library loads it."""

    def export_adapter(self, export: AdapterExport, target: Path) -> None:
        """Write low-rank adapters as the folder `target`, in place of what it holds, for the base they were trained on.
        UserError where they cannot be told apart from the weights."""
        raise UserError(f"there are no low-rank adapters of {self.name}; leave --adapter out")


class Parts(ABC):
    """The parts of one model: blocks in forward order, then `head`.

    Blocks map a boundary (a tuple of tensors with a batch dimension) to a boundary, the head gives the output. Names in
    states of different parts differ: together they are the state of the network.
    """

    @abstractmethod
    def names(self) -> list[str]:
        """Blocks in forward order, then `head`."""

    @abstractmethod
    def state_names(self, part: str) -> list[str]:
        """Names in the part's state dict, without allocating it."""

    @abstractmethod
    def build(self, part: str, device: torch.device) -> nn.Module:
        """The part, allocated, weights unset. ValueError for an unknown part."""

    @abstractmethod
    def boundary(self, blocks: int) -> Mapping[str, Shape]:
        """The tensors behind the first `blocks` blocks in order, name -> shape of one row of a snapshot set."""

    @abstractmethod
    def build_aux(self, source: int, seed: int, device: torch.device, head: Mapping[str, Tensor] | None) -> nn.Module:
        """LW's local head on boundary `source`, initialised from `seed`; `head`: the state of the real head, where
        `Traits.copies_head` asks for it."""

    def build_adapter(self, source: int, target: int, seed: int, device: torch.device) -> nn.Module:
        """Training-only map from boundary `source` to the input of block `target` (the number of blocks: the head),
        initialised from `seed`. Needed where `Traits.adapters` is set."""
        raise TypeError("boundaries of this family are all alike: there is nothing to adapt")

    def prepare_training(self, part: str, module: nn.Module, train: TrainSpec, seed: int) -> None:  # noqa: B027  may stay
        """Make a part ready to be trained. All its parameters require gradients before."""

    def prepare_frozen(self, part: str, module: nn.Module, train: TrainSpec) -> None:  # noqa: B027  may stay
        """Make a part of a path whose matrices stay as they are ready for it. It has its weights, on its device."""

    def sharing(self) -> tuple[str, ...]:
        """The parts that `tie` lets share a tensor."""
        return ()

    def tie(self, modules: Mapping[str, nn.Module], train: TrainSpec | None) -> None:  # noqa: B027  may stay
        """Let those of these parts (by name) that share a tensor hold it together, after `prepare_training`; only where
        `ModelFamily.ties` says so. `train`: of the stage; None: nothing is trained."""

    def final_state(self, module: nn.Module) -> dict[str, Tensor]:
        """A trained part's own tensors, named as `state_names` does, to be written before they change."""
        from workers.models.chain import whole_state

        return whole_state(module)

    def adapter_state(self, module: nn.Module) -> dict[str, Tensor]:
        """The low-rank adapters of a trained part, which `final_state` has merged; {} where it has none."""
        return {}

    @abstractmethod
    def identity(self) -> Any:
        """JSON that names the computation, where digests of states do not: snapshots are addressed by it."""


class TokenParts(Parts):
    """Parts over token sequences: the boundary is the residual stream, and parts take a context beside it."""

    @abstractmethod
    def context(self, device: torch.device, longest: int) -> Callable[..., Any]:
        """Give what makes the context of a batch, from (ids or hidden states, positions, attention mask, where).

        longest: tokens of the longest sample there may be, so that a batch's context does not depend on its longest.
        """

    @abstractmethod
    def stream_dtype(self) -> torch.dtype:
        """The type of the residual stream."""


class SequenceParts(Parts):
    """Parts over token sequences that are classified: the first block takes ids (B, T), boundaries are hidden states
    (B, T, D), the head gives scores (B, classes), and parts take a context beside it. What comes out at padding is of
    no use, and nothing else may depend on what goes in there."""

    @abstractmethod
    def context(self, device: torch.device) -> Callable[[Tensor, Mapping[str, Tensor]], Any]:
        """Give what makes the context of a batch, from ids or hidden states and, int64 (B, T) by name: `input_ids`,
        `attention_mask` (0 at padding), and `token_type_ids` (which of two texts a token is of)."""
