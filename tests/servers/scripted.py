"""A server that does what no honest server does, request by request.

    with ScriptedServer([answer(503), never_answer(), accepted()]) as server:
        ...  # the first request gets 503, the second nothing, the third and all later ones 201
    assert [request.body for request in server.requests] == [...]

A script is a list of steps. Each request takes the next one, on whatever connection it comes; when
the script is over, the last one is repeated. An `OnConnect` step is taken by the next connection,
before any request. Steps are functions of the `Exchange`, so that tests can write their own.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime
from http import HTTPStatus
from typing import TypeAlias

PATIENCE = 30
"""Seconds within which all steps end when the server does."""
MEGABYTE = 1024 * 1024
SEQ_BODY = b'{"MinimumLevelAccepted":null}'

Headers: TypeAlias = Sequence[tuple[str, str]]
JSON: Headers = (("Content-Type", "application/json; charset=utf-8"),)


@dataclass(frozen=True)
class Request:
    """A request, or what was read of it; header names in lower case, of repeated ones the last."""

    line: str
    headers: dict[str, str]
    body: bytes
    connection: int
    """The number of the connection that it came on, from 1."""


class Over(Exception):
    """No more requests come on this connection."""


class Exchange:
    """One request on its way in, and the means to treat it badly."""

    def __init__(self, server: ScriptedServer, sock: socket.socket, connection: int) -> None:
        self.server = server
        self.socket = sock
        self.connection = connection
        self.came = b""
        self.request: Request | None = None

    def receive(self) -> bool:
        """Read what there is, at least a byte; tell whether there was any."""
        with contextlib.suppress(OSError):
            piece = self.socket.recv(65_536)
            self.came += piece
            return bool(piece)
        return False

    def read(self) -> Request:
        """Read the request whole and record it; a client that goes before its end is recorded too.

        Bodies must come with a Content-Length.
        """
        if self.request is None:
            self.request = self._read(None)
            self.server.requests.append(self.request)
        return self.request

    def read_part(self, body_bytes: int) -> None:
        """Read no more than so much of the body; record the request as cut."""
        self.server.cut.append(self._read(body_bytes))

    def _read(self, limit: int | None) -> Request:
        while b"\r\n\r\n" not in self.came:
            if not self.receive():
                self._cut("", {}, self.came)
        head, _, body = self.came.partition(b"\r\n\r\n")
        line, *rest = head.decode("latin-1").split("\r\n")
        fields = [field.partition(":") for field in rest]
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        wanted = int(headers.get("content-length", "0")) if limit is None else limit
        self.came = body
        while len(self.came) < wanted:
            if not self.receive():
                self._cut(line, headers, self.came)
        body, self.came = self.came[:wanted], self.came[wanted:]
        return Request(line, headers, body, self.connection)

    def _cut(self, line: str, headers: dict[str, str], body: bytes) -> None:
        self.server.cut.append(Request(line, headers, body, self.connection))
        raise Over

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.socket.sendall(data)

    def wait(self, seconds: float | None = None) -> None:
        """Wait, but not for longer than the server lives."""
        if self.server.ended.wait(seconds):
            raise Over

    def close(self) -> None:
        """Close the connection in order."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        raise Over

    def reset(self) -> None:
        """Close the connection so that the client is reset, without a word of TLS either."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
        raise Over


Step: TypeAlias = Callable[[Exchange], None]


@dataclass(frozen=True)
class OnConnect:
    """A step that doesn't wait for a request, nor for the TLS handshake."""

    step: Step

    def __call__(self, exchange: Exchange) -> None:
        self.step(exchange)


class ScriptedServer:
    """Listens on loopback while the `with` block lasts.

    Attributes:
        requests: those that were read whole.
        cut: what was read of the others.
        stored: the bodies that were "stored": by `accepted` and by `storing`.
        connections: how many were accepted.
    """

    def __init__(self, script: Sequence[Step], *, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[Request] = []
        self.cut: list[Request] = []
        self.stored: list[bytes] = []
        self.connections = 0
        self.ended = threading.Event()
        self._script = list(script)
        self._tls = tls
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.settimeout(0.02)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}"

    def __enter__(self) -> ScriptedServer:
        self._start(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._threads[0].join()
        self._listener.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a step doesn't end; does it wait by Exchange.wait?"
        for sock in self._sockets:
            sock.close()

    def _start(self, work: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=work, args=args, daemon=True))
        self._threads[-1].start()

    def _listen(self) -> None:
        while not self.ended.is_set():
            with contextlib.suppress(TimeoutError):
                accepted, _ = self._listener.accept()
                self.connections += 1
                self._start(self._serve, accepted, self.connections)

    def _next(self, *, connecting: bool) -> Step | None:
        with self._lock:
            step = self._script[0]
            if connecting and not isinstance(step, OnConnect):
                return None
            if len(self._script) > 1:
                self._script.pop(0)
            return step

    def _serve(self, sock: socket.socket, connection: int) -> None:
        """Take a step for each request on a connection, until one of the two closes it."""
        with contextlib.suppress(Over, OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.append(sock)
            if step := self._next(connecting=True):
                step(Exchange(self, sock, connection))
            if self._tls:
                sock = tls = self._tls.wrap_socket(sock, True, do_handshake_on_connect=False)
                self._sockets.append(tls)
                tls.do_handshake()
            exchange = Exchange(self, sock, connection)
            while exchange.came or exchange.receive():
                step = self._next(connecting=False)
                assert step
                step(exchange)
                exchange.request = None
        sock.close()


# Answers, in bytes and as steps.


def response(status: int, body: bytes = b"", headers: Headers = JSON) -> bytes:
    """Return an answer that is well formed."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers]
    lines += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


ACCEPTED = response(201, SEQ_BODY)


def raw(data: bytes, *, close: bool = True) -> Step:
    """Read the request whole, answer these very bytes, and close."""

    def step(exchange: Exchange) -> None:
        exchange.read()
        exchange.send(data)
        if close:
            exchange.close()

    return step


def answer(status: int, body: bytes = b"", headers: Headers = JSON) -> Step:
    """Answer in good form, and keep the connection."""
    return raw(response(status, body, headers), close=False)


def storing(step: Step) -> Step:
    """Read the request whole and store it, whatever is answered then."""

    def store(exchange: Exchange) -> None:
        exchange.server.stored.append(exchange.read().body)
        step(exchange)

    return store


def accepted(level: str | None = None) -> Step:
    """Store and say so as Seq does, honestly."""
    if level is None:
        return storing(raw(ACCEPTED, close=False))
    return storing(answer(201, b'{"MinimumLevelAccepted":"%s"}' % level.encode()))


def error(status: int, text: str | None = None) -> Step:
    """Answer an error as Seq does; None is an error without a text."""
    value = "null" if text is None else f'"{text}"'
    return answer(status, f'{{"Error":{value}}}'.encode())


def too_many(retry_after: int | datetime | None = None, status: int = 429) -> Step:
    """Answer 429 (or 503), with Retry-After in seconds, as a date in UTC, or not at all."""
    if isinstance(retry_after, datetime):
        retry = [("Retry-After", format_datetime(retry_after, usegmt=True))]
    else:
        retry = [] if retry_after is None else [("Retry-After", str(retry_after))]
    return answer(status, b'{"Error":"too many"}', [*JSON, *retry])


def redirect(location: str, status: int = 302) -> Step:
    """Send the client elsewhere."""
    return answer(status, b"", [("Location", location)])


def html(status: int = 200) -> Step:
    """Answer a page, as a proxy or a captive portal does."""
    page = b"<!doctype html><title>Welcome</title><p>Please sign in."
    return answer(status, page, [("Content-Type", "text/html; charset=utf-8")])


def truncated_json(status: int = 201) -> Step:
    """Answer in good form, but for the JSON, which ends too early."""
    return answer(status, SEQ_BODY[:-3])


def truncated_body() -> Step:
    """Promise a longer answer than is sent, and close."""
    return raw(ACCEPTED[:-3])


def contradictory_length() -> Step:
    """Answer 201 with two lengths, of which one is right."""
    headers = [*JSON, ("Content-Length", str(len(SEQ_BODY) + 7))]
    return raw(response(201, SEQ_BODY, headers))


def broken_chunk() -> Step:
    """Answer 201 in chunks, the second of which has no length."""
    head = b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n"
    good = b"5\r\n" + SEQ_BODY[:5] + b"\r\n"
    return raw(head + good + b"xyz\r\n" + SEQ_BODY[5:] + b"\r\n0\r\n\r\n")


def garbage() -> Step:
    """Answer something that is not HTTP."""
    return raw(b"\x15\x03\x01\x00\x02\x02\x28 this is not HTTP\r\n\r\n")


def status_line_only() -> Step:
    """Say that it was created, and nothing more."""
    return raw(b"HTTP/1.1 201 Created\r\n")


def stream(size: int = 100 * MEGABYTE, status: int = 201) -> Step:
    """Answer with a body of so many bytes: right JSON behind a great many blanks."""

    def step(exchange: Exchange) -> None:
        exchange.read()
        head = response(status, b"")
        exchange.send(head.replace(b"Content-Length: 0", b"Content-Length: %d" % size))
        blanks = size - len(SEQ_BODY)
        for start in range(0, blanks, MEGABYTE):
            exchange.send(b" " * min(MEGABYTE, blanks - start))
        exchange.send(SEQ_BODY)

    return step


# Time.


def never_answer() -> Step:
    """Read the request whole, and say nothing as long as the server lives."""

    def step(exchange: Exchange) -> None:
        exchange.read()
        exchange.wait()

    return step


def never_read() -> Step:
    """Leave the request unread, and say nothing as long as the server lives."""
    return Exchange.wait


def after(seconds: float, step: Step) -> Step:
    """Read the request whole, and go on later."""

    def wait(exchange: Exchange) -> None:
        exchange.read()
        exchange.wait(seconds)
        step(exchange)

    return wait


def drip(data: bytes, interval: float, at_once: int = 0) -> Step:
    """Answer a byte at a time, but the first ones at once."""

    def step(exchange: Exchange) -> None:
        exchange.read()
        exchange.send(data[:at_once])
        for byte in data[at_once:]:
            exchange.wait(interval)
            exchange.send(bytes([byte]))

    return step


def drip_header(interval: float, data: bytes = ACCEPTED) -> Step:
    """Answer a byte at a time, from the first on."""
    return drip(data, interval)


def drip_body(interval: float, data: bytes = ACCEPTED) -> Step:
    """Answer the header at once and the body a byte at a time."""
    return drip(data, interval, data.index(b"\r\n\r\n") + 4)


# Endings.


def reset_before_reading() -> Step:
    """Reset the connection when a request comes, without having read it to its end."""

    def step(exchange: Exchange) -> None:
        exchange.reset()

    return step


def reset_mid_body(body_bytes: int = 1) -> Step:
    """Reset the connection when so many bytes of the body have come."""

    def step(exchange: Exchange) -> None:
        exchange.read_part(body_bytes)
        exchange.reset()

    return step


def reset_after_reading() -> Step:
    """Read the request whole and reset the connection."""

    def step(exchange: Exchange) -> None:
        exchange.read()
        exchange.reset()

    return step


def close_after_reading() -> Step:
    """Read the request whole and close without an answer."""
    return raw(b"")


def then_close(step: Step, seconds: float = 0.0) -> Step:
    """Close a connection that was to be kept, so long after the step."""

    def closing(exchange: Exchange) -> None:
        step(exchange)
        exchange.wait(seconds)
        exchange.close()

    return closing


def on_connect_reset() -> Step:
    """Accept the connection and reset it before anything is said."""
    return OnConnect(Exchange.reset)


def on_connect_silence() -> Step:
    """Accept the connection and say nothing, not even in the TLS handshake."""
    return OnConnect(Exchange.wait)
