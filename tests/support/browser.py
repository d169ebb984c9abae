"""Drive a Chromium that is installed on this machine over its own protocol: no driver program, no download.

What is missing is said by `missing()`: `apt-get install chromium` brings one. axe-core, which looks for barriers, is
taken from `SEGPROP_AXE` (a path of axe.min.js, from `npm install axe-core`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless=new", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--disable-dev-shm-usage", "--remote-debugging-port=0", "--no-proxy-server"),
)


def program() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def missing() -> str:
    """Say what is missing; "" where a browser is there."""
    return "" if program() else f"no browser: none of {', '.join(NAMES)} is installed (apt-get install chromium)"


def axe() -> str | None:
    """The text of axe-core; None where it is not there."""
    path = os.environ.get("SEGPROP_AXE", "")
    return Path(path).read_text() if path and Path(path).is_file() else None


@dataclass
class Tab:
    """One page. Errors of its scripts, and what its policy refused, are kept in `complaints`."""

    loop: asyncio.AbstractEventLoop
    socket: aiohttp.ClientWebSocketResponse
    complaints: list[str] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), 60))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads(await self.socket.receive_str())
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(message["params"])[:500])

    def look(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Give the page a size, and the system's dark or light."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def go(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait(f"location.href === {json.dumps(address)} && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, timeout_s: float = 30.0) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(AssertionError):  # the page is being replaced
                if self.evaluate(f"Boolean({expression})"):
                    return
            assert time.monotonic() < deadline, (expression, self.evaluate("document.body.innerText")[:2000])
            time.sleep(0.05)

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def tab(self) -> None:
        self.press("Tab", 9)

    def enter(self) -> None:
        self.press("Enter", 13, "\r")

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)


@contextmanager
def browsing(folder: Path) -> Iterator[Tab]:
    """Run a browser meanwhile, whose profile is in `folder`."""
    path = program()
    assert path is not None
    # Inside a container, or as root, its own sandbox cannot be had; it shows our pages alone.
    flags = (*FLAGS, "--no-sandbox", f"--user-data-dir={folder}")
    process = subprocess.Popen(
        [path, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    loop = asyncio.new_event_loop()
    try:
        with loop_session(loop, _address(folder, process)) as socket:
            tab = Tab(loop, socket)
            for domain in ("Page", "Runtime", "Log"):
                tab.call(f"{domain}.enable")
            yield tab
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        loop.close()


def _address(folder: Path, process: subprocess.Popen[bytes]) -> int:
    """The port of the browser's protocol."""
    file = folder / "DevToolsActivePort"
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text().count("\n") >= 1):
        assert process.poll() is None, "the browser ended"
        assert time.monotonic() < deadline, "the browser does not answer"
        time.sleep(0.05)
    return int(file.read_text().splitlines()[0])


@contextmanager
def loop_session(loop: asyncio.AbstractEventLoop, port: int) -> Iterator[aiohttp.ClientWebSocketResponse]:
    """Connect to the first page of a browser."""

    async def connect() -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
        session = aiohttp.ClientSession()
        while True:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                pages = [each for each in await answer.json() if each["type"] == "page"]
            if pages:
                return session, await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
            await asyncio.sleep(0.05)

    session, socket = loop.run_until_complete(connect())
    try:
        yield socket
    finally:
        loop.run_until_complete(socket.close())
        loop.run_until_complete(session.close())
