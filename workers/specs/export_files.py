"""Name the files that an exported language model has beside what its library knows."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

#: What an exported folder says of itself; its key `questions` names the file of digests.
FACTS = "segprop.json"
#: Length and digest of every file that an export wrote, so that damage is noticed.
EXPORTED = "segprop_export.json"
#: The model card, which is written again whenever something is known that was not.
CARD = "README.md"
#: Digests of the questions that the model was trained on; in the commit of a data node too.
TRAINED_QUESTIONS = "segprop_questions.npz"


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that low-rank adapters go on. `quantization`: how bitsandbytes rounds it, in the words of transformers'
    `BitsAndBytesConfig`; None: not at all."""

    path: str | None
    revision: str | None
    quantization: Mapping[str, str | float | bool | list[str]] | None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What `FACTS` says of a language model. `sources`: part -> node that it comes from and digest of the file that
    holds it; `companions`: names of the files beside the weights; `base`: of adapters by themselves."""

    sources: Mapping[str, list[str]]
    companions: Collection[str]
    base: Base | None = None

    def to_bytes(self) -> bytes:
        """Write the file."""
        says: dict[str, object] = {"sources": dict(self.sources)}
        if TRAINED_QUESTIONS in self.companions:
            says["questions"] = TRAINED_QUESTIONS
        if self.base is not None:
            says["base"] = asdict(self.base)
        return json.dumps(says, indent=2).encode() + b"\n"
