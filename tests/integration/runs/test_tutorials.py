"""A newcomer's path: every command of the tutorials, as it stands there, in a fresh folder."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from lm_running import write_checkpoint
from running import ROOT, RayHome, summary_of, wait_for

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]


@dataclass
class Shell:
    """A folder in which the commands of a page are typed one after the other."""

    folder: Path
    home: RayHome
    said: dict[str, str] = field(default_factory=dict)

    def type(self, page: str, **instead: str) -> None:
        for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE):
            for theirs, ours in instead.items():
                block = block.replace(theirs, ours)
            for command in self.commands(block):
                self.said[command] = self.look(command) if command.startswith("segprop ui") else self.run(command)

    def commands(self, block: str) -> list[str]:
        return [block] if "<<" in block else block.splitlines()

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        return self.home.environment(PATH=path, PYTHONPATH=str(ROOT), XDG_CACHE_HOME=str(self.folder / "cache"))

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
        return done.stdout

    def look(self, command: str) -> str:
        """Open the address that a page of ours says, then stop it as a user would."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port 0"],
            cwd=self.folder,
            env=self.environment(),
            stdout=(output := self.folder / "ui.txt").open("w"),
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(lambda: re.search(r"http://\S+", output.read_text()), 120, output.read_text)
            [address] = re.findall(r"http://\S+", output.read_text())
            return str(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address).read().decode())
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with tempfile.TemporaryDirectory(prefix="sp-", dir="/tmp", ignore_cleanup_errors=True) as ray:
        home = RayHome(Path(ray))
        yield Shell(tmp_path, home)
        home.kill_all()


def test_the_first_run_as_the_tutorial_has_it(shell: Shell) -> None:
    shell.type("tutorial.md")
    runs = shell.folder / "runs"
    first, second = summary_of(runs / "first"), summary_of(runs / "first-2")
    assert set(first["regimes"]) == {"e2e", "lw", "segprop"}
    assert (first["status"], set(second["regimes"])) == ("done", {"segprop"})
    assert first["nodes"]["reused"] == first["nodes"]["done"], "the second time"
    assert (runs / "first" / "stages" / "segprop" / "stage1-base" / "model.safetensors").is_file()
    assert not (runs / "first" / "store").exists()
    assert "first" in shell.said["segprop ui runs"]
    compared = shell.said["segprop compare runs/first runs/first-2"]
    assert re.search(r"training\.epochs +2 +1", compared)
    assert not shell.home.processes()


def test_the_chat_model_as_the_tutorial_has_it(shell: Shell) -> None:
    write_checkpoint(shell.folder / "model", tied=True, max_position_embeddings=512)
    shell.type("tutorial-chat.md", **{"HuggingFaceTB/SmolLM2-135M-Instruct": "model"})
    assert summary_of(shell.folder / "runs" / "chat")["status"] == "done"
    config = json.loads((shell.folder / "runs" / "chat" / "model" / "segprop" / "config.json").read_text())
    assert config["model_type"] == "llama"
    shown = next(said for command, said in shell.said.items() if command.startswith("segprop data show"))
    assert "⟦A run of layers that trains together with the head." in shown
    assert not shell.home.processes()
