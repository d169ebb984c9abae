"""Causal language models and text as frozen data; see `workers.specs.experiment`, which these belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from workers.specs.model import ModelSpec

_STRICT: dict[str, Any] = {"extra": "forbid"}
#: Which tokens of a chat count.
ChatTargets = Literal["answers", "last_answer", "everything"]


#: Files of rows, as they are found in a folder.
ROW_FILES = ("*.jsonl", "*.ndjson", "*.json", "*.csv", "*.tsv", "*.parquet", "*.arrow", "*.feather")


@dataclass(frozen=True, kw_only=True)
class CausalLMSpec(ModelSpec):
    """A Hugging Face decoder as a chain: `embed`, `layer0` … `layer<n-1>`, `head` (final norm and LM head).

    The base depth of a split counts decoder layers: the embedding always goes with the base.
    """

    family: Literal["causal_lm"]
    #: A folder as `save_pretrained` writes it, or a hub id. None: random weights for `config`.
    path: str | None = None
    #: Commit, tag or branch of a hub id.
    revision: str | None = None
    #: A GGUF file inside `path`, dequantized on import.
    gguf: str | None = None
    #: Architecture (the contents of a config.json, `model_type` included) for a random start, or settings laid
    #: over those of `path`. In tasks: the whole architecture.
    config: dict[str, Any] | None = None
    #: Folder or hub id of the tokenizer; `bytes`: one token a byte; None: the model's own.
    tokenizer: str | None = None
    #: Type the weights are kept and updated in; auto: as the checkpoint has them.
    master: Literal["auto", "float32", "bfloat16"] = "float32"
    #: Attention kernel of transformers.
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    #: Decoder layers removed for good, by their number in the checkpoint.
    prune: tuple[int, ...] = ()
    #: Run model code from the checkpoint's folder. Off unless you have read it.
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Low-rank adapters (peft) in whatever a stage trains; merged into the weights when it commits."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    rank: Annotated[int, Ge(1), Le(1 << 16)] = 16
    alpha: Annotated[float, Gt(0)] = 32.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    #: Names of linear layers that get one; `all-linear`: every linear layer of the decoder layers.
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"

    def adapts(self, linear: str) -> bool:
        """Tell whether a linear layer of a decoder layer, by its name there, gets an adapter."""
        return self.targets == "all-linear" or any(f".{linear}".endswith(f".{target}") for target in self.targets)


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """Text as token sequences with the tokens that count as targets."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    #: text: plain files (.txt, .md, .py …), or JSON lines, CSV, TSV, Parquet or Arrow with a text column, under `path`.
    #: chat: such rows that hold conversations, through the tokenizer's own template; the layout is found by the columns
    #: (messages, conversations, instruction and output, prompt and completion). mmlu, winogrande: their files, in the
    #: formats they are evaluated in; only the answer counts; mmlu trains on auxiliary_train and validates on val,
    #: winogrande on train, and test (of winogrande: dev) is for the final score alone. hub: a hub data set through
    #: `datasets`. stdlib: the source of Python's own standard library.
    name: Literal["text", "chat", "mmlu", "winogrande", "hub", "stdlib"]
    #: File, folder or URI; for hub the data set's id.
    path: str | None = None
    #: hub: configuration of the data set, and its pinned revision.
    subset: str | None = None
    revision: str | None = None
    #: Column (JSON key) that holds the text or the messages; None: `text`, or what `columns` say.
    column: str | None = None
    #: text, chat: what a column is -> its name, where that is not the usual one, such as {prompt: question, completion:
    #: answer}: text; messages; conversations, system; instruction, input, output, system, history; prompt, completion,
    #: system.
    columns: dict[str, str] | None = None
    #: chat: a system prompt for conversations that have none.
    system: str | None = None
    #: chat: the tokens that count: all answers of the assistant, the last one, or everything. An answer of weight 0
    #: never counts.
    targets: ChatTargets = "answers"
    #: Rows that cannot be used: an error that names them, or skipped and counted.
    bad: Literal["refuse", "skip"] = "refuse"
    #: File name patterns taken from a folder; `.gz`, `.bz2`, `.xz` and `.zst` behind them do not count.
    include: tuple[str, ...] = ("*.txt", "*.md", "*.py", "*.rst", *ROW_FILES)
    #: Longest sample in tokens.
    sequence_length: Annotated[int, Ge(2), Le(1 << 24)] = 1024
    #: Join documents into samples. true: running text (text, hub, stdlib) into samples of exactly `sequence_length`
    #: tokens; chats whole, as many as fit. false: a sample a document. auto: true for running text, false for chats.
    pack: Literal["auto"] | bool = "auto"
    #: Attention does not cross documents inside a packed sample, and positions restart.
    isolate: bool = True
    #: Samples longer than `sequence_length` (where nothing is packed): cut and counted, dropped and counted, or an
    #: error before training. Packed documents simply go on in the next sample.
    overlong: Literal["truncate", "drop", "refuse"] = "truncate"
    #: Go on where more than half of the samples (of what is not packed) were dropped, have no target or, of what is no
    #: running text, were cut.
    allow_loss: bool = False
    #: Example answers before every mmlu / winogrande question.
    shots: Annotated[int, Ge(0), Le(32)] = 0
    #: Held out of train for choosing epochs, and for the final score where the data has no test split of its own: a
    #: fraction (< 1) or a count of documents.
    validation: Annotated[float, Gt(0)] = 0.05
    test: Annotated[float, Gt(0)] = 0.05
    #: Use only this many samples, chosen by seed (None: all).
    train_limit: Annotated[int, Ge(1)] | None = None
    validation_limit: Annotated[int, Ge(1)] | None = None
    test_limit: Annotated[int, Ge(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class HFTextSpec(ModelSpec):
    """A text classifier of transformers (BERT and its kin) as a chain: `embed`, `layer0` … `layer<n-1>`, `head`.

    The base depth of a split counts layers: the embedding always goes with the base.
    """

    family: Literal["hf_text"]
    #: A folder as `save_pretrained` writes it, or a hub id, with weights in *.safetensors; what a checkpoint lacks of
    #: the head (a classifier of other classes, a pooler) stays random. Null: random weights for `config`.
    path: str | None = None
    #: Commit, tag or branch of a hub id.
    revision: str | None = None
    #: Architecture (the contents of a config.json, `model_type` included) for a random start, or settings laid over
    #: those of `path`. In tasks: the whole architecture.
    config: dict[str, Any] | None = None
    #: Folder or hub id of the tokenizer; `bytes`: one token a byte; null: the model's own.
    tokenizer: str | None = None
    #: Attention kernel of transformers.
    attention: Literal["sdpa", "eager"] = "sdpa"


@dataclass(frozen=True, kw_only=True)
class LabelledTextSpec:
    """Texts, or pairs of texts, each of a class: rows of JSON lines, CSV, TSV, Parquet or Arrow files."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    #: Rows with a text, or two, and a label.
    name: Literal["labelled"] = "labelled"
    #: File, folder or URI; also a folder of the hub's data sets, as downloaded.
    path: str | None = None
    #: File name patterns taken from a folder; `.gz`, `.bz2`, `.xz` and `.zst` behind them do not count.
    include: tuple[str, ...] = ROW_FILES
    #: Split (train, validation, test) -> pattern of its files below `path`, such as {train: "train-*", test:
    #: "validation_matched-*"}. Null: by their names or folders, as train, validation (valid, val, dev) and test; where
    #: none is called train, all are.
    files: dict[str, str] | None = None
    #: What a column is -> its name, where that is not the usual one: text, pair (a second text), label. Null: text or
    #: sentence; or premise and hypothesis, sentence1 and sentence2, question1 and question2, question and sentence;
    #: and label or labels.
    columns: dict[str, str] | None = None
    #: Names of the classes, in the order of their numbers; a label is a name, or a number of this list (from 0). Null:
    #: the names that Parquet and Arrow files of the hub bring along, else all labels that there are, sorted.
    labels: tuple[str, ...] | None = None
    #: Rows that cannot be used (no text, no label, -1 for one, one that is not among `labels`): an error that names
    #: them, or skipped and counted.
    bad: Literal["refuse", "skip"] = "refuse"
    #: Longest sample in tokens, those that the tokenizer puts around texts included.
    sequence_length: Annotated[int, Ge(2), Le(1 << 24)] = 128
    #: Longer samples: cut (of a pair the longer text, as transformers does) and counted, dropped and counted, or an
    #: error before training.
    overlong: Literal["truncate", "drop", "refuse"] = "truncate"
    #: Held out of train for choosing epochs, and for the final score where the data has no such split of its own: a
    #: fraction (< 1) or a count of samples.
    validation: Annotated[float, Gt(0)] = 0.05
    test: Annotated[float, Gt(0)] = 0.05
    #: Use only this many samples, chosen by seed (null: all).
    train_limit: Annotated[int, Ge(1)] | None = None
    validation_limit: Annotated[int, Ge(1)] | None = None
    test_limit: Annotated[int, Ge(1)] | None = None

    def as_text(self) -> TextSpec:
        """The same files as text whose documents are not joined: how they are found, split and limited is alike."""
        return TextSpec(
            name="text",
            path=self.path,
            columns=self.columns,
            bad=self.bad,
            include=self.include,
            sequence_length=self.sequence_length,
            pack=False,
            overlong=self.overlong,
            validation=self.validation,
            test=self.test,
            train_limit=self.train_limit,
            validation_limit=self.validation_limit,
            test_limit=self.test_limit,
        )
