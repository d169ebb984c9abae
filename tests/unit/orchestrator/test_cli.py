"""How the program ends."""

from __future__ import annotations

import errno
from typing import NoReturn

import pytest

from orchestrator import cli

#: As a starved process gives them, one at this place and one at that: Python's own, the system's, the loader's.
STARVED = (
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("/x/_core.so: failed to map segment from shared object"),
)


def ending_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> int:
    def app(**_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(cli, "app", app)
    return cli.main(["schema"])


@pytest.mark.parametrize("error", STARVED, ids=lambda error: type(error).__name__)
def test_a_machine_without_memory_is_told_in_a_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending_with(error, monkeypatch) == 1
    told = "segprop: this machine has no memory left; the same command goes on where it ended\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "bad"), ImportError("no module x")], ids=["OSError", "import"])
def test_other_errors_are_not_taken_for_it(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)):
        ending_with(error, monkeypatch)
