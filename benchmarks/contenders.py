"""Who takes part: each makes one entry durable, or says that it does not promise to.

A contender is opened in a process of its own, in an empty directory. Its `call` takes an entry.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import socket
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog

from benchmarks.entries import Entry
from structlog_audit import (
    AuditHandler,
    FileSink,
    Redact,
    SeqSink,
    Sink,
    audit_log,
    audit_processors,
)
from structlog_audit.chain import link
from structlog_audit.entry import Renderer
from structlog_audit.formats import clef

Call = Callable[[Entry], object]
Open = Callable[[Path, dict[str, Any]], Call]

_sync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


class Nowhere:
    """A sink that does nothing."""

    def open(self, session: str) -> None:
        """Do nothing."""

    def write(self, lines: Sequence[bytes]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _line(renderer: Renderer, entry: Entry) -> bytes:
    """Return the bytes that an audit call writes for an entry."""
    given = {"description": "An invoice was deleted.", **entry}
    return link(renderer.render(given).text, "k3v9w0q1z7m2x8c4b6n5", 1000, "0" * 64) + b"\n"


class BarePost:
    """The floor of a server: the bytes that an audit call would post, over a kept connection."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._renderer = Renderer(app="billing")
        self._bodies: dict[int, bytes] = {}

    def prepare(self, entry: Entry) -> None:
        """Make the body, outside of what is timed."""
        self._bodies[id(entry)] = clef(_line(self._renderer, entry)) + b"\n"

    def __call__(self, entry: Entry) -> None:
        """Post it and read the answer."""
        headers = {"Content-Type": "application/vnd.serilog.clef"}
        self._connection.request("POST", "/ingest/clef", self._bodies[id(entry)], headers)
        answer = self._connection.getresponse()
        assert answer.status == 201
        answer.read()


class Bare:
    """The floor: the bytes that an audit call would write, made before, written and synced.

    Args:
        path: file to create and append to.
        sync: `os.fdatasync` or `os.fsync`.
    """

    def __init__(self, path: Path, sync: Callable[[int], None]) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_WRONLY
        self._descriptor = os.open(path, flags, 0o600)
        self._sync = sync
        self._renderer = Renderer(app="billing")
        self._lines: dict[int, bytes] = {}

    def prepare(self, entry: Entry) -> None:
        """Make the line, outside of what is timed."""
        self._lines[id(entry)] = _line(self._renderer, entry)

    def __call__(self, entry: Entry) -> None:
        """Write the line and sync."""
        os.write(self._descriptor, self._lines[id(entry)])
        self._sync(self._descriptor)


def _bare(sync: Callable[[int], None]) -> Open:
    return lambda directory, options: Bare(directory / "bare.ndjson", sync)


def _configure(sink: Sink, options: dict[str, Any], *before: Any) -> Call:
    """Configure structlog as an application would, and audit through it."""
    handler = AuditHandler(sink, max_bytes=options.get("max_bytes"), max_age=None)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            *before,
            *audit_processors(app="billing", handler=handler),
            structlog.processors.add_log_level,
            structlog.processors.JSONRenderer(),
        ]
    )
    return lambda entry: audit_log.info("An invoice was deleted.", **entry)


def _ours(directory: Path, options: dict[str, Any]) -> Call:
    return _configure(FileSink(directory / "audit"), options)


def _ours_redacting(directory: Path, options: dict[str, Any]) -> Call:
    return _configure(FileSink(directory / "audit"), options, Redact())


def _ours_nowhere(directory: Path, options: dict[str, Any]) -> Call:
    return _configure(Nowhere(), options)


def _bare_post(directory: Path, options: dict[str, Any]) -> Call:
    return BarePost(options["url"])


def _ours_post(directory: Path, options: dict[str, Any]) -> Call:
    return _configure(SeqSink(options["url"]), options)


def _naive_structlog(directory: Path, options: dict[str, Any]) -> Call:
    file = open(directory / "naive.ndjson", "ab")  # noqa: SIM115 - open as long as the process

    def write(logger: Any, name: str, line: Any) -> Any:
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())
        raise structlog.DropEvent

    def dumps(value: Any, **_: Any) -> bytes:
        return json.dumps(value).encode()

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(serializer=dumps),
            write,
        ]
    )
    log = structlog.get_logger()
    return lambda entry: log.info("An invoice was deleted.", **entry)


def _stdlib(directory: Path, options: dict[str, Any]) -> Call:
    class Syncing(logging.FileHandler):
        def emit(self, record: logging.LogRecord) -> None:
            super().emit(record)
            if self.stream is not None:
                os.fsync(self.stream.fileno())

    logger = logging.getLogger("benchmark")
    handler = Syncing(directory / "stdlib.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return lambda entry: logger.info("An invoice was deleted. %s", json.dumps(entry))


def _sqlite(directory: Path, options: dict[str, Any]) -> Call:
    base = sqlite3.connect(directory / "audit.db", isolation_level=None, check_same_thread=False)
    base.execute("PRAGMA journal_mode=WAL")
    base.execute("PRAGMA synchronous=FULL")
    base.execute("CREATE TABLE entries (id INTEGER PRIMARY KEY, entry TEXT NOT NULL)")

    def call(entry: Entry) -> None:
        base.execute("INSERT INTO entries (entry) VALUES (?)", (json.dumps(entry),))

    return call


def _rust(*, fsync: bool) -> Open:
    def open_rust(directory: Path, options: dict[str, Any]) -> Call:
        from rust_py_audit import AuditLogger

        logger = AuditLogger("billing", str(directory / "rust.jsonl"), fsync=fsync)

        def call(entry: Entry) -> None:
            logger.log(
                str(entry.get("user_id")), entry["action"], "invoice", "inv_42", entry["data"]
            )

        return call

    return open_rust


BARE = "write + fdatasync"
BARE_FSYNC = "write + fsync"
OURS = "structlog-audit"
REDACTING = "structlog-audit, Redact"
NOWHERE = "structlog-audit, no disk"
BARE_POST = "http.client, POST"
OURS_POST = "structlog-audit, SeqSink"

CONTENDERS: dict[str, tuple[Open, str]] = {
    BARE: (_bare(_sync), "durable, raises; the floor: no entry is made, nothing is linked"),
    BARE_FSYNC: (_bare(os.fsync), "durable, raises; writes the inode as well"),
    OURS: (_ours, "durable, raises"),
    REDACTING: (_ours_redacting, "durable, raises"),
    "structlog, naive fsync": (
        _naive_structlog,
        "durable but for the file's name; after a failed fsync it goes on in the same file",
    ),
    "logging, fsync": (_stdlib, "durable as the one above; swallows every error"),
    "SQLite, WAL, FULL": (_sqlite, "durable, raises"),
    "rust-py-audit, fsync": (_rust(fsync=True), "durable but for the file's name, raises"),
    "rust-py-audit": (_rust(fsync=False), "not durable"),
    NOWHERE: (_ours_nowhere, "nothing: the share of the processor alone"),
    BARE_POST: (_bare_post, "durable if the server says the truth; no deadline, no repetition"),
    OURS_POST: (_ours_post, "durable if the server says the truth, raises"),
}
"""Name, how to open it, and what it promises when its call returns."""
