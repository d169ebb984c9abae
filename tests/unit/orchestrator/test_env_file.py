"""`.env`: tokens of the services that runs use, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.env_file import load_env_file

WRITTEN = """\
# tokens
HF_TOKEN=hf_plain   # of the team
export HUGGING_FACE_HUB_TOKEN="with # and spaces"  # quoted
WANDB_API_KEY=first
AWS_SECRET_ACCESS_KEY='a=b$HOME'
WANDB_API_KEY=again
HF_ENDPOINT=https://elsewhere
MLFLOW_TRACKING_PASSWORD=
SWANLAB_API_KEY=from the file
LD_PRELOAD=/tmp/evil.so
PYTHONPATH=/tmp
RAY_ADDRESS=ray://elsewhere
AWS_SESSION_TOKEN="no end
not a line
=x
AZURE_\u00e9=1
"""


def test_tokens_are_taken_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbf" + WRITTEN.replace("\n", "\r\n").encode())
    environment = {"SWANLAB_API_KEY": "as it was"}
    assert load_env_file(tmp_path, environment) == [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "AWS_SESSION_TOKEN",
    ]
    assert environment == {
        "SWANLAB_API_KEY": "as it was",
        "HF_TOKEN": "hf_plain",
        "HUGGING_FACE_HUB_TOKEN": "with # and spaces",
        "WANDB_API_KEY": "again",
        "AWS_SECRET_ACCESS_KEY": "a=b$HOME",
        "MLFLOW_TRACKING_PASSWORD": "",
        "AWS_SESSION_TOKEN": '"no end',
    }


def test_what_is_no_file_of_settings_adds_nothing(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    assert load_env_file(tmp_path, environment) == []
    (tmp_path / ".env").write_bytes(b"HF_TOKEN=\xff\xfe")
    assert load_env_file(tmp_path, environment) == []
    (tmp_path / ".env").unlink()
    os.mkfifo(tmp_path / ".env")
    assert load_env_file(tmp_path, environment) == []
    assert environment == {}
