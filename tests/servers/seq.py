"""A stand-in for Seq's ingestion, as a program of its own: `python seq.py --port 0 --store FILE`.

It keeps the contract that is published, and nothing else:

- "docs" is docs.datalust.co: posting-raw-events, using-the-http-api, api-keys;
- "forwarder" is the receiver in datalust/seqcli, `Forwarder/Web/Api/IngestionEndpoints.cs`;
- "seq-api" is datalust/seq-api; where no source tells, the comment says "unverified".

A request is read whole; every line is validated; then all its events are appended to the store
and fsynced; then, and only then, comes 201. The store has one event a line, in the bytes that
came. `FILE.requests` has one JSON line a request, written before its answer is sent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import socket
import socketserver
import ssl
import sys
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from io import BufferedIOBase
from pathlib import Path
from typing import Any

EVENT_LIMIT = 262_144
"""Bytes of an event with its newline (seq-api, RawEventMaximumContentLength)."""
PAYLOAD_LIMIT = 10 * 1024 * 1024
"""Bytes of a body (seq-api, RawPayloadMaximumContentLength); exactly as many are too many already
(forwarder)."""
DEPTH_LIMIT = 64
"""Levels of nesting: what the forwarder's `Utf8JsonReader` reads by default."""
CLEF = "application/vnd.serilog.clef"
LEVELS = ("verbose", "debug", "information", "warning", "error", "fatal")
SECRET = {"authorization", "proxy-authorization", "cookie"}


@dataclass(frozen=True)
class Options:
    """What kind of Seq it is; each is an option of the command line."""

    store: Path
    base: str = ""
    key: str | None = None
    key_header: str = "X-Seq-ApiKey"
    null_errors: bool = False
    minimum_level: str | None = None
    ndjson: int | None = None
    answer_after: float = 0.0


class Refused(Exception):
    """The answer is an error; its text has no value that the client sent (forwarder)."""

    def __init__(self, status: int, error: str | None) -> None:
        super().__init__(status, error)
        self.status = status
        self.error = error


# What an event must be.


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are Python's, not JSON's


_JSON = json.JSONDecoder(parse_constant=_no_constant)
_TIME = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d)(:[0-5]\d(?:[.,]\d+)?)?"
    r"(?:Z|[+-](?:0\d|1[0-4])(?::?[0-5]\d)?)?"
)
_KINDS = {list: "StartArray", str: "String", int: "Number", float: "Number", type(None): "Null"}


def events_of(body: bytes) -> list[bytes]:
    """Return the lines of a body without their ends; the last end is optional (forwarder, docs)."""
    lines = body.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for line in lines:
        if len(line) + 1 > EVENT_LIMIT:
            raise _failed("an event exceeds the configured size limit")
    return [line.removesuffix(b"\r") for line in lines]


def parse(line: bytes) -> dict[str, Any]:
    """Return the object that a line is; a blank line is none (forwarder)."""
    try:
        event = _JSON.decode(line.decode())
    except (ValueError, RecursionError):
        raise _failed("JSON parsing failure") from None
    if not isinstance(event, dict):
        raise _failed(f"unexpected token type `{_KINDS.get(type(event), str(event))}`")
    return event


def parse_clef(line: bytes) -> dict[str, Any]:
    """Return the event that a line is."""
    event = parse(line)
    if line.count(b"{") + line.count(b"[") > DEPTH_LIMIT and _depth(event) > DEPTH_LIMIT:
        raise _failed("JSON parsing failure")
    if "@t" not in event:
        raise _failed("missing `@t` timestamp property")
    if not _is_time(event["@t"]):
        raise _failed("unparseable `@t` timestamp value")
    # docs, posting-raw-events: "Seq requires a string value"; what it answers is unverified
    for name in ("@l", "@x"):
        if not isinstance(event.get(name, ""), str):
            raise _failed(f"`{name}` is not a string")
    return event


def _failed(why: str) -> Refused:
    return Refused(400, f"Payload validation failed: {why}.")  # forwarder


def _is_time(value: object) -> bool:
    """Tell whether it is ISO 8601 (docs); the forwarder's `TryParse` would take more."""
    found = _TIME.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return False
    try:
        datetime.strptime(found[1], "%Y-%m-%dT%H:%M")
    except ValueError:
        return False
    return True


def _depth(value: object) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


# Where events go.


class Store:
    """The events' file and the requests' file, appended to by any number of threads."""

    def __init__(self, path: Path) -> None:
        self._events = _open(path)
        self._requests = _open(requests_of(path))
        self._lock = threading.Lock()

    def append(self, events: list[bytes]) -> None:
        """Return when the events are on disk; fsyncs of several threads go side by side."""
        if not events:
            return
        with self._lock:
            _write(self._events, b"".join(event + b"\n" for event in events))
        os.fsync(self._events)

    def note(self, request: dict[str, Any]) -> None:
        """Append a line to the requests' file, which need not survive a power cut."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            _write(self._requests, line)


def requests_of(store: Path) -> Path:
    """Return the path of the file that tells of the requests."""
    return store.with_name(store.name + ".requests")


def _open(path: Path) -> int:
    """Open a file of whole lines: what a kill tore off at its end was never acknowledged."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)
    os.fsync(descriptor)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    return descriptor


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


# Requests and answers.


@dataclass(frozen=True)
class Request:
    """A request, read whole but for what is over the limit; of repeated headers the last."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def query(self, name: str) -> list[str]:
        """Return the values of a parameter; a bare name's is the name itself."""
        pairs = [item.partition("=") for item in self.target.partition("?")[2].split("&")]
        return [value if equals else name for key, equals, value in pairs if key == name]


@dataclass(frozen=True)
class Answer:
    """An answer with a JSON body, or with none."""

    status: int
    body: bytes
    events: int = 0
    stored: int = 0

    @classmethod
    def json(cls, status: int, value: Any, **counts: int) -> Answer:
        """Return an answer that says this."""
        return cls(status, json.dumps(value, separators=(",", ":")).encode(), **counts)

    def encode(self) -> bytes:
        """Return the bytes to send."""
        head = f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n"
        if self.status != HTTPStatus.NO_CONTENT:
            head += "Content-Type: application/json; charset=utf-8\r\n"  # forwarder
            head += f"Content-Length: {len(self.body)}\r\n"
        return (head + "\r\n").encode() + self.body


def read_request(stream: BufferedIOBase, out: BufferedIOBase) -> Request | None:
    """Read one request; None when the client has gone instead, or sent something else."""
    words = stream.readline(65_536).decode("latin-1").split()
    if len(words) != 3:
        return None
    headers = {}
    while (line := stream.readline(65_536).decode("latin-1")) not in ("\r\n", "\n"):
        if not line:
            return None
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        out.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = _read_body(stream, headers)
    return None if body is None else Request(words[0], words[1], headers, body)


def _read_body(stream: BufferedIOBase, headers: dict[str, str]) -> bytes | None:
    """Read a body whole, but keep no more of it than tells that it is over the limit."""
    chunked = headers.get("transfer-encoding", "").lower() == "chunked"
    body = b""
    while length := _next_length(stream) if chunked else int(headers.get("content-length", 0)):
        while length:
            piece = stream.read(min(length, 1 << 20))
            if not piece:
                return None
            length -= len(piece)
            if len(body) < PAYLOAD_LIMIT:
                body += piece
        if not chunked:
            break
        stream.readline(3)
    if chunked:
        stream.readline(3)
    return body


def _next_length(stream: BufferedIOBase) -> int:
    return int(stream.readline(100).partition(b";")[0], 16)


class Receiver:
    """Answers requests."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.store = Store(options.store)

    def answer(self, request: Request) -> Answer:
        """Return the answer to a request, when all that it says is true."""
        try:
            answer = self._answer(request)
        except Refused as refused:
            # seq-tickets#2012: a refused key may come without a text
            silent = self.options.null_errors and refused.status in (401, 403)
            error = None if silent else refused.error
            answer = Answer.json(refused.status, {"Error": error})
        except OSError:
            answer = Answer.json(500, {"Error": "Ingestion failed."})  # forwarder
        self.store.note(self._noted(request, answer))
        return answer

    def _answer(self, request: Request) -> Answer:
        base, path = self.options.base, request.path
        if request.method == "GET" and path == f"{base}/health":
            # docs, using-the-http-api: 200 or 503, no key needed
            return Answer.json(200, {"status": "The Seq node is in service."})
        if request.method == "POST" and path == f"{base}/ingest/clef":
            return self._ingest(request, clef=True)
        if request.method == "POST" and path == f"{base}/api/events/raw":
            if not _says_clef(request):
                # forwarder; Seq itself would take the legacy {"Events": […]} here
                text = "Only newline-delimited JSON (CLEF) payloads are supported."
                raise Refused(400, text)
            return self._ingest(request, clef=True)
        if request.method == "POST" and path.startswith(base) and self.options.ndjson:
            return self._ingest(request, clef=False)
        raise Refused(404, "Not found.")  # unverified

    def _ingest(self, request: Request, *, clef: bool) -> Answer:
        self._check_key(request)
        if len(request.body) >= PAYLOAD_LIMIT:
            raise Refused(413, "the request is too large to process")  # forwarder
        lines = events_of(request.body)
        events = [parse_clef(line) if clef else parse(line) for line in lines]
        kept = [line for line, event in zip(lines, events, strict=True) if self._keeps(event)]
        self.store.append(kept)
        if self.options.answer_after:
            time.sleep(self.options.answer_after)
        counts = {"events": len(lines), "stored": len(kept)}
        if not clef and self.options.ndjson:
            body = b"" if self.options.ndjson == HTTPStatus.NO_CONTENT else b"{}"
            return Answer(self.options.ndjson, body, **counts)
        # facts/seq.md: 201, null or a level's name; the forwarder's body is {}
        return Answer.json(201, {"MinimumLevelAccepted": self.options.minimum_level}, **counts)

    def _check_key(self, request: Request) -> None:
        state = self._key_state(request)
        if state == "absent":
            raise Refused(401, "An API key is required.")  # wording unverified
        if state == "wrong":
            raise Refused(403, "The API key is not valid.")  # wording unverified

    def _key_state(self, request: Request) -> str | None:
        """Tell how the key is: header first, then parameter, of each the last (forwarder)."""
        if self.options.key is None:
            return None
        in_url = request.query("apiKey")[-1:] or [""]
        key = request.headers.get(self.options.key_header.lower(), in_url[0])
        return "absent" if not key else "right" if key == self.options.key else "wrong"

    def _keeps(self, event: dict[str, Any]) -> bool:
        """Tell whether the minimum level lets an event through (docs, api-keys).

        A level with a name that Seq does not know is dropped (nlog-targets-seq#33).
        """
        if self.options.minimum_level is None:
            return True
        level = event.get("@l", "information").lower()
        lowest = LEVELS.index(self.options.minimum_level.lower())
        return level in LEVELS and LEVELS.index(level) >= lowest

    def _noted(self, request: Request, answer: Answer) -> dict[str, Any]:
        """Return what is noted of a request: all but secrets."""
        secret = {*SECRET, self.options.key_header.lower()}
        return {
            "method": request.method,
            "target": re.sub(r"(?<=[?&]apiKey=)[^&]*", "…", request.target),
            "headers": {k: "…" if k in secret else v for k, v in request.headers.items()},
            "key": self._key_state(request),
            "events": answer.events,
            "stored": answer.stored,
            "status": answer.status,
        }


def _says_clef(request: Request) -> bool:
    """Tell whether a raw request is CLEF: `?clef`, `?clef=true`, or its type (forwarder)."""
    value = request.query("clef")
    says = len(value) == 1 and (value[0] == "clef" or value[0].lower() == "true")
    return says or request.headers.get("content-type", "").startswith(CLEF)


# The server.


class Handler(socketserver.StreamRequestHandler):
    """One connection, kept alive until the client says otherwise."""

    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.do_handshake()
        super().setup()

    def handle(self) -> None:
        while request := read_request(self.rfile, self.wfile):
            self.wfile.write(self.server.receiver.answer(request).encode())
            if request.headers.get("connection", "").lower() == "close":
                break


class Server(socketserver.ThreadingTCPServer):
    """Listens on loopback, a thread for each connection."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, options: Options, tls: ssl.SSLContext | None = None) -> None:
        self.receiver = Receiver(options)
        self.tls = tls
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept; the handshake is left to the connection's thread."""
        accepted, address = super().get_request()
        if self.tls:
            accepted = self.tls.wrap_socket(
                accepted, server_side=True, do_handshake_on_connect=False
            )
        return accepted, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Let clients go as they like; all else is a bug, of ours or in what they sent."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--base", default="", help="the URL's path before /ingest/clef: /logs")
    parser.add_argument("--key", help="the API key that is wanted")
    parser.add_argument("--key-header", default="X-Seq-ApiKey")
    parser.add_argument("--null-errors", action="store_true", help="401 and 403 without a text")
    parser.add_argument("--minimum-level", help="answer it, and drop what is below")
    parser.add_argument(
        "--ndjson", type=int, nargs="?", const=200, choices=(200, 201, 204),
        help="answer this to objects posted anywhere else",
    )  # fmt: skip
    parser.add_argument("--answer-after", type=float, default=0.0, help="seconds after storing")
    parser.add_argument("--cert", type=Path, help="the server's certificate; TLS from then on")
    parser.add_argument("--private", type=Path, help="its private key")
    parser.add_argument("--client-ca", type=Path, help="whose certificates clients must show")
    return parser.parse_args()


def tls_context(cert: Path, private: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    """Return a context for a server with this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, private)
    if client_ca:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def main() -> None:
    """Serve until killed; say on standard output at which port."""
    given = vars(_arguments())
    port, cert, private, client_ca = map(given.pop, ("port", "cert", "private", "client_ca"))
    tls = tls_context(cert, private, client_ca) if cert else None
    with Server(port, Options(**given), tls) as server:
        print(server.port, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
