"""Take tokens and keys from a file `.env` in the current directory, as people keep them there for other programs.

Of it only secrets of services that runs use are read (`NAMES`): the file may be anybody's, and other names could load
code, or have the user's own token sent to a server of somebody else's. What the environment has already stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from cache_store.storage.durable import read_regular

FILE = ".env"
#: The variables that are read.
NAMES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "SWANLAB_API_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
)
#: Longer files are none of tokens.
_MOST_BYTES = 1 << 20
_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")


def load_env_file(folder: Path, environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Add what `.env` in a folder sets, and return the names. A file that is absent, cannot be read, or is no text adds
    nothing; lines that set nothing are passed over."""
    try:
        text = read_regular(folder / FILE, _MOST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError):
        return []
    found = {name: value for name, value in settings(text) if name in NAMES and name not in environment}
    environment.update(found)
    return list(found)


def settings(text: str) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of each line `NAME=value`, with or without `export` and quotes. Outside of quotes a `#`
    behind a space begins a comment. Nothing is substituted."""
    for line in text.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None or "\0" in line:
            continue
        name, value = match.groups()
        quoted = re.match(r"""(["'])(.*?)\1\s*(?:#.*)?$""", value)
        yield name, quoted.group(2) if quoted else re.split(r"\s#", value, maxsplit=1)[0].strip()
