"""Sessions that were recorded a while ago: the library is given a clock of ours."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import orjson
from reading import session_files
from running import HANG, environment

from structlog_audit import AuditHandler, FileSink, Signer, entry, journal
from structlog_audit.sinks import file

NOW = datetime.now(timezone.utc)


@contextlib.contextmanager
def days_ago(days: float) -> Iterator[None]:
    """Have the library stamp lines and files with an earlier time."""
    now = NOW - timedelta(days=days)
    before = entry.time_ns, journal.time, file.time

    def time_ns() -> int:
        nonlocal now
        now += timedelta(milliseconds=7)
        return int(now.timestamp() * 1e6) * 1000

    around = {name: getattr(time, name) for name in ("sleep", "monotonic", "strftime")}
    entry.time_ns = time_ns
    journal.time = SimpleNamespace(time_ns=time_ns, **around)
    file.time = SimpleNamespace(gmtime=now.timetuple, monotonic_ns=time.monotonic_ns, **around)
    try:
        yield
    finally:
        entry.time_ns, journal.time, file.time = before


def record(
    directory: Path,
    days: float,
    *,
    signer: Signer | None = None,
    entries: int = 2,
    prefix: str = "audit",
) -> Path:
    """Record a session, some days ago; return its file."""
    known = set(session_files(directory)) if directory.is_dir() else set()
    with days_ago(days):
        handler = AuditHandler(FileSink(directory, prefix, signer=signer))
        for number in range(entries):
            handler.record({"action": "InvoiceDelete", "data": {"number": number}})
        handler.close()
    (path,) = set(session_files(directory)) - known
    return path


def journal_events(directory: Path, prefix: str = "audit") -> list[dict]:
    """Return the lines of the journal."""
    lines = (directory / f"{prefix}-journal.ndjson").read_bytes().split(b"\n")[:-1]
    return [orjson.loads(line) for line in lines]


def command(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours."""
    return subprocess.run(
        [sys.executable, "-m", "structlog_audit", *map(str, arguments)],
        env=environment(**environ), capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip


def done(*arguments: object, **environ: str) -> str:
    """Run a command that must succeed; return what it printed."""
    ran = command(*arguments, **environ)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def contents(directory: Path) -> dict[str, bytes]:
    """Return all that is in a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
