"""The Ray that a run starts asks for a token, and only its user can read it."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from cache_store.errors import UserError
from orchestrator.runners.ray_cluster import MODE, TOKEN, TOKEN_PATH, secure_token


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (MODE, TOKEN, TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(TOKEN, "")  # so that what the code sets is taken back
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_that_others_cannot_read(home: Path) -> None:
    secure_token()
    token = home / ".ray" / "auth_token"
    assert re.fullmatch(r"[0-9a-f]{64}", token.read_text())
    assert (mode(token), mode(token.parent)) == (0o600, 0o700)
    assert os.listdir(token.parent) == ["auth_token"]
    first = token.read_text()
    secure_token()
    assert token.read_text() == first


def test_a_token_that_ray_made_is_kept_and_closed_to_others(home: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("a" * 64)
    token.chmod(0o644)
    secure_token()
    assert (token.read_text(), mode(token)) == ("a" * 64, 0o600)


def test_a_token_at_hand_is_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "b" * 64)
    monkeypatch.setenv(MODE, "token")
    secure_token()
    assert list(home.iterdir()) == []


def test_a_named_file_is_where_the_token_goes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_PATH, str(home / "mine"))
    secure_token()
    assert mode(home / "mine") == 0o600


def test_without_a_home_that_can_be_written_the_token_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    secure_token()
    assert re.fullmatch(r"[0-9a-f]{64}", os.environ[TOKEN])


def test_a_cluster_without_a_token_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE, "disabled")
    with pytest.raises(UserError, match=r"RAY_AUTH_MODE=disabled: .*listens on all interfaces.*resources\.address"):
        secure_token()
