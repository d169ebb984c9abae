"""An HTTP proxy before an S3 server that breaks what the test asks it to break."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto


class Fault(Enum):
    """What happens to a request. Those from RESET_AFTER on reach the server first."""

    THROTTLED = auto()  # 429
    UNAVAILABLE = auto()  # 503 SlowDown
    BROKEN = auto()  # 500
    EXPIRED = auto()  # 400 ExpiredToken
    DENIED = auto()  # 403 AccessDenied
    RESET_BEFORE = auto()  # the connection is reset, nothing was done
    RESET_AFTER = auto()  # done, and the reply lost
    BROKEN_AFTER = auto()  # done, and reported as 500
    STALLED = auto()  # done, the reply's body stops half-way and the connection stays
    TRUNCATED = auto()  # done, the connection closes half-way through the body
    TOO_LONG = auto()  # done, the reply claims more bytes than it has
    TOO_SHORT = auto()  # done, the reply claims fewer bytes than there are, and is cut there
    HEAD_SHORT = auto()  # the length of an object, asked for without its body, is one less
    FLIPPED = auto()  # done, one bit of the body is flipped
    SLOW = auto()  # done, the reply comes in drops, within the time allowed


_ANSWERS = {
    Fault.THROTTLED: (429, "TooManyRequests"),
    Fault.UNAVAILABLE: (503, "SlowDown"),
    Fault.BROKEN: (500, "InternalError"),
    Fault.EXPIRED: (400, "ExpiredToken"),
    Fault.DENIED: (403, "AccessDenied"),
    Fault.BROKEN_AFTER: (500, "InternalError"),
}


@dataclass(frozen=True)
class Request:
    """A request as the test's choice sees it. `seen`: how often exactly this one came before."""

    method: str
    target: str
    headers: dict[str, str]
    seen: int

    @property
    def conditional(self) -> bool:
        """Whether it creates exclusively."""
        return self.method == "PUT" and "if-none-match" in self.headers

    @property
    def path(self) -> str:
        return self.target.split("?", 1)[0]


Choice = Callable[[Request], Fault | None]


@dataclass
class FaultyProxy:
    """A running proxy. Set `choose` to say what goes wrong; `requests` are all that came."""

    upstream: int
    stall_s: float = 5.0
    choose: Choice = lambda _: None
    requests: list[tuple[Request, Fault | None]] = field(default_factory=list)
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client, with any number of requests."""
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        with contextlib.suppress(OSError):
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        line, headers = _head(head)
        method, target, _ = line.split(" ", 2)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        seen = sum(1 for request, _ in self.requests if (request.method, request.target) == (method, target))
        request = Request(method, target, headers, seen)
        fault = self.choose(request)
        self.requests.append((request, fault))
        if fault is Fault.RESET_BEFORE:
            return _reset(writer)
        if fault in _ANSWERS and fault is not Fault.BROKEN_AFTER:
            return await _answer(writer, *_ANSWERS[fault])
        status, answer_headers, answer = await self._forward(method, head, body)
        if fault is Fault.RESET_AFTER:
            return _reset(writer)
        if fault is Fault.BROKEN_AFTER:
            return await _answer(writer, *_ANSWERS[fault])
        return await self._reply(writer, method, status, answer_headers, answer, fault)

    async def _forward(self, method: str, head: bytes, body: bytes) -> tuple[str, dict[str, str], bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        try:
            writer.write(head[:-2] + b"connection: close\r\n\r\n" + body)
            await writer.drain()
            status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
            answer = b"" if method == "HEAD" else await reader.read()
            if headers.pop("transfer-encoding", "") == "chunked":
                answer = _unchunked(answer)
                headers["content-length"] = str(len(answer))
            return status, headers, answer
        finally:
            writer.close()

    async def _reply(
        self,
        writer: asyncio.StreamWriter,
        method: str,
        status: str,
        headers: dict[str, str],
        body: bytes,
        fault: Fault | None,
    ) -> bool:
        length = int(headers.get("content-length", "0"))
        half = len(body) // 2
        if fault is Fault.TOO_LONG and body:
            length += 10
        elif fault is Fault.TOO_SHORT and body:
            length, body = half, body[:half]
        elif fault is Fault.HEAD_SHORT and method == "HEAD":
            length = max(0, length - 1)
        elif fault is Fault.FLIPPED and body:
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        headers = {**headers, "content-length": str(length), "connection": "keep-alive"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"{status}\r\n{lines}\r\n".encode("latin-1"))
        if fault in (Fault.STALLED, Fault.TRUNCATED) and body:
            writer.write(body[:half])
            await writer.drain()
            if fault is Fault.STALLED:
                await asyncio.sleep(self.stall_s)
            return False
        if fault is Fault.SLOW:
            for start in range(0, len(body), max(1, len(body) // 8)):
                writer.write(body[start : start + max(1, len(body) // 8)])
                await writer.drain()
                await asyncio.sleep(0.02)
            return True
        writer.write(body)
        await writer.drain()
        # After a wrong length the next reply would be read as the rest of this one.
        return fault not in (Fault.TOO_LONG, Fault.TOO_SHORT) or not body


def _head(raw: bytes) -> tuple[str, dict[str, str]]:
    first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
    pairs = (line.split(":", 1) for line in lines)
    return first, {name.strip().lower(): value.strip() for name, value in pairs}


def _unchunked(data: bytes) -> bytes:
    found = b""
    while data:
        line, data = data.split(b"\r\n", 1)
        size = int(line.split(b";")[0], 16)
        if not size:
            break
        found += data[:size]
        data = data[size + 2 :]
    return found


async def _answer(writer: asyncio.StreamWriter, status: int, code: str) -> bool:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>by the test</Message></Error>'.encode()
    head = f"HTTP/1.1 {status} Fault\r\ncontent-type: application/xml\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return True


def _reset(writer: asyncio.StreamWriter) -> bool:
    # Without lingering, closing sends a reset.
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


@contextlib.contextmanager
def faulty_proxy(upstream: int) -> Iterator[FaultyProxy]:
    """A proxy on loopback before the server at port `upstream`, in a thread of its own."""
    proxy = FaultyProxy(upstream)
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def main() -> None:
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=1 << 20)
        proxy.port = server.sockets[0].getsockname()[1]
        started.set()

    def work() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(main())
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()

    thread = threading.Thread(target=work, name="faulty-proxy", daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
