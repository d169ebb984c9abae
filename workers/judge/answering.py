"""Let an exported language model answer a prompt, piece by piece as it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cache_store.errors import UserError
from workers.judge.model import JudgedModel


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. `temperature` 0: the likeliest token each time."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens: {self.max_tokens}: must be at least 1")
        if not 0.0 <= self.temperature <= 100.0:
            raise UserError(f"--temperature: {self.temperature}: must be between 0 (the likeliest token) and 100")


@dataclass
class Conversation:
    """A model and what was said so far. `raw`, and of a model without a chat template: prompts are continued as they
    are, and nothing is kept of them."""

    judged: JudgedModel
    sampling: Sampling
    raw: bool = False
    turns: list[Turn] = field(default_factory=list)

    @property
    def chats(self) -> bool:
        """Whether prompts go through the model's chat template."""
        return not self.raw and bool(getattr(self.judged.tokenizer, "chat_template", None))

    def answer(self, prompt: str, write: Callable[[str], None]) -> str:
        """Return the answer to `prompt`, which `write` is given in pieces while it is made.

        UserError for a prompt without tokens, one that the template refuses, and one that fills the model's context."""
        asked = [*self.turns, Turn("user", prompt)]
        tokens = self._rendered(asked) if self.chats else self.judged.tokenizer(prompt, return_tensors="pt").input_ids
        text = self._continued(tokens, write)
        if self.chats:
            self.turns = [*asked, Turn("assistant", text)]
        return text

    def _rendered(self, turns: Sequence[Turn]) -> Any:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            text = self.judged.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            # Templates are programs of their authors: they raise what they like.
            raise UserError(f"the model's chat template refuses this conversation: {error}; see --raw") from error
        return self.judged.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    def _continued(self, tokens: Any, write: Callable[[str], None]) -> str:
        import torch
        from transformers import TextStreamer

        model, tokenizer = self.judged.model, self.judged.tokenizer
        room = getattr(model.config, "max_position_embeddings", None)
        if not tokens.shape[1]:
            raise UserError("the prompt has no tokens; say something")
        if room is not None and tokens.shape[1] >= room:
            raise UserError(f"the prompt has {tokens.shape[1]:,} tokens, and the model reads {room:,}; begin anew")
        pieces: list[str] = []

        class Writer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                write(text)

        warm = self.sampling.temperature
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        new = self.sampling.max_tokens if room is None else min(self.sampling.max_tokens, room - tokens.shape[1])
        torch.manual_seed(self.sampling.seed)
        with torch.inference_mode():
            model.generate(
                tokens.to(model.device),
                attention_mask=torch.ones_like(tokens, device=model.device),
                max_new_tokens=new,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=Writer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                **({"do_sample": True, "temperature": warm} if warm else drawn),
            )
        return "".join(pieces)
