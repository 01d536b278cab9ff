"""ASGI servers in threads, over real sockets; and one that is none, for what no server does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import hypercorn.asyncio
import hypercorn.config
import uvicorn
from running import HANG, eventually

Entry = dict[str, Any]


class Uvicorn:
    """uvicorn at a port that the system chose."""

    def __init__(self, app: Any, **options: Any) -> None:
        config = uvicorn.Config(app, port=0, log_config=None, ws="websockets-sansio", **options)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        eventually(lambda: self._server.started or not self._thread.is_alive())
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]

    def ask_to_stop(self) -> None:
        self._server.should_exit = True

    def stop(self) -> None:
        self.ask_to_stop()
        self._thread.join(HANG)
        assert not self._thread.is_alive()


class Hypercorn:
    """hypercorn at a port that the system chose."""

    def __init__(self, app: Any, **options: Any) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = listening.getsockname()[1]
        self._config = hypercorn.config.Config()
        self._config.bind = [f"fd://{listening.detach()}"]
        self._config.accesslog = self._config.errorlog = None
        self._config.graceful_timeout = options.get("timeout_graceful_shutdown", 3)
        self._app = app
        self._stop: Callable[[], object] | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        eventually(lambda: self._stop is not None)

    async def _serve(self) -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        async def stopped() -> None:
            self._stop = lambda: loop.call_soon_threadsafe(stop.set)
            await stop.wait()

        await hypercorn.asyncio.serve(self._app, self._config, shutdown_trigger=stopped)

    def ask_to_stop(self) -> None:
        assert self._stop is not None
        self._stop()

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has stopped already
            self.ask_to_stop()
        self._thread.join(HANG)
        assert not self._thread.is_alive()


SERVERS = [Uvicorn, Hypercorn]


@contextlib.contextmanager
def serving(app: Any, server: Any = Uvicorn, **options: Any) -> Iterator[Any]:
    """Serve an application for the length of a block."""
    running = server(app, **options)
    try:
        yield running
    finally:
        running.stop()


def outcomes(entries: list[Entry], number: int = 1) -> list[Entry]:
    """Wait for so many outcomes, and return them; each has its Begin before it."""
    found: list[Entry] = []

    def are_there() -> bool:
        found[:] = [entry for entry in list(entries) if entry["event"] not in ("Begin", "Record")]
        return len(found) >= number

    eventually(are_there)
    for outcome in found:
        same = [e["event"] for e in entries if e.get("operationId") == outcome["operationId"]]
        assert [event for event in same if event != "Record"] == ["Begin", outcome["event"]]
    assert len(found) == number
    return found


def outcome(entries: list[Entry]) -> Entry:
    """Wait for the outcome of the one operation there is."""
    return outcomes(entries)[0]


def begin(entries: list[Entry]) -> Entry:
    """Return the Begin of the one operation there is."""
    (found,) = [entry for entry in list(entries) if entry["event"] == "Begin"]
    return found


def http_scope(path: str = "/orders", **more: Any) -> dict[str, Any]:
    """Return what a server makes of a request."""
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
        "method": "GET", "scheme": "http", "path": path, "raw_path": path.encode(errors="replace"),

        "query_string": b"", "root_path": "", "headers": [(b"host", b"shop")],
        "client": ("192.0.2.7", 4711), "server": ("127.0.0.1", 80), "extensions": {}, **more,
    }  # fmt: skip


def websocket_scope(path: str = "/feed", **more: Any) -> dict[str, Any]:
    """Return what a server makes of a WebSocket's handshake."""
    scope = http_scope(path, type="websocket", scheme="ws", subprotocols=[], **more)
    del scope["method"]
    return scope


class Wire:
    """A server's side of one exchange: gives messages, and keeps what is sent."""

    def __init__(self, *messages: Any) -> None:
        self.messages = list(messages) or [{"type": "http.request", "body": b""}]
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        if not self.messages:
            await asyncio.sleep(HANG)
        message = self.messages.pop(0)
        if isinstance(message, BaseException):
            raise message
        return message

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int | None:
        starts = [m["status"] for m in self.sent if m["type"] == "http.response.start"]
        assert len(starts) <= 1, "the response starts twice"
        return starts[0] if starts else None

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent if m["type"].endswith(".body"))


async def answer(send: Any, status: int = 200, body: bytes = b"done", **headers: str) -> None:
    """Send a whole response."""
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
