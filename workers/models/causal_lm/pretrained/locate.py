"""Where a model lies: a local folder, a GGUF file in it, the hub's cache, or nowhere (random weights)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cache_store.errors import first_line
from workers.models.causal_lm.errors import refuse
from workers.specs.export_files import TRAINED_QUESTIONS
from workers.specs.language import CausalLMSpec

#: Small files that make an export complete. Patterns are the hub's (fnmatch).
COMPANIONS = (
    TRAINED_QUESTIONS,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "chat_templates/*.jinja",
)
INDEX = "model.safetensors.index.json"
WEIGHTS = ("*.safetensors", INDEX)
#: Weights that are never read; that they are there is noticed.
PICKLES = ("*.bin", "*.pt", "*.pth")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Located:
    """A folder on this machine. `commit`: of the hub, when it came from there. `gguf`: the file inside it."""

    folder: Path
    commit: str | None = None
    gguf: Path | None = None


def locate(spec: CausalLMSpec, weights: bool) -> Located | None:
    """Find the model, downloading from the hub what is missing; None when `path` is None.

    With weights=False only configuration and companions are fetched. ConfigError for what is missing, gated or
    has no such revision; HF_HUB_OFFLINE is respected.
    """
    if spec.path is None:
        return None
    folder = Path(spec.path).expanduser()
    commit = None
    if not folder.is_dir():
        folder, commit = _from_hub(spec.path, spec.revision, wanted(spec, weights))
    gguf = None
    if spec.gguf is not None:
        gguf = folder / spec.gguf
        if not gguf.is_file():
            found = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
            if commit is None or weights:
                raise refuse(f"{gguf} does not exist; GGUF files there: {found}", "model.gguf", value=spec.gguf)
    return Located(folder, commit, gguf)


def wanted(spec: CausalLMSpec, weights: bool) -> list[str]:
    """Name the files of a model that are looked at, with its weights or without, as patterns (fnmatch)."""
    patterns = ["config.json", *COMPANIONS]
    if spec.trust_remote_code:
        patterns.append("*.py")
    if spec.gguf is not None:
        # Architecture and tokenizer are inside the file: without it nothing is known.
        return [*patterns, spec.gguf]
    return [*patterns, *WEIGHTS] if weights else patterns


def _from_hub(name: str, revision: str | None, patterns: list[str]) -> tuple[Path, str]:
    """The snapshot's folder and its commit."""
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise refuse(f"{name} is neither a folder nor a hub id (owner/name)", "model.path", value=name)
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    pinned = f" at revision {revision}" if revision is not None else ""
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except hub.GatedRepoError as e:
        raise refuse(
            f"{name} is gated: accept its terms on the hub and log in (`hf auth login` or HF_TOKEN)", "model.path"
        ) from e
    except hub.RepositoryNotFoundError as e:
        raise refuse(f"the hub has no model {name}, or you may not see it; nor is it a folder", "model.path") from e
    except hub.RevisionNotFoundError as e:
        raise refuse(f"{name} has no revision {revision!r}", "model.revision", value=revision) from e
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as e:
        raise refuse(
            f"{name}{pinned} is no folder, is not in the hub's cache on this machine, and the hub cannot be asked: "
            f"{first_line(e)}",
            "model.path",
            value=name,
        ) from e
    except (hub.HfHubHTTPError, hub.HFValidationError, OSError) as e:
        raise refuse(f"{name}{pinned} cannot be fetched from the hub: {first_line(e)}", "model.path") from e
    if not any(folder.glob("config.json")) and not any(folder.glob("*.gguf")):
        raise refuse(f"{name}{pinned} has no config.json", "model.path", value=name)
    return folder, folder.name
