"""The console: lines on stdout or stderr, for whoever collects them there.

What a collector does with them is out of our hands: a pipe that took the bytes proves no more. If
the stream is a regular file, it is synced.
"""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from structlog_audit.exceptions import AuditConfigurationError, SinkError, from_oserror
from structlog_audit.sinks import _durable

PATIENCE = 10.0
"""Seconds to wait for room in a non-blocking pipe."""


class ConsoleSink:
    """Writes lines to a standard stream of the process.

    Args:
        stream: `stdout` or `stderr`.

    Raises:
        AuditConfigurationError: it is neither.
    """

    def __init__(self, stream: Literal["stdout", "stderr"] = "stdout") -> None:
        if stream not in ("stdout", "stderr"):
            raise AuditConfigurationError(f"a console is stdout or stderr, not {stream!r}")
        self.stream: Literal["stdout", "stderr"] = stream
        self._descriptor = 1 if stream == "stdout" else 2
        self._identity = self._look()
        self._torn = False

    def __repr__(self) -> str:
        return f"ConsoleSink({self.stream!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return ConsoleSink, (self.stream,)

    def check(self) -> None:
        """Make sure that the stream is open, and still what it was.

        Raises:
            SinkError: it is not.
        """
        now = self._look()
        if getattr(sys, f"__{self.stream}__") is None or now is None:
            raise SinkError(f"the process has no {self.stream}", persisted="no")
        if now != self._identity:
            raise SinkError(
                f"{self.stream} is not what it was when auditing was configured",
                persisted="no",
                hint="it was closed or redirected since; configure auditing after doing so",
            )

    def open(self, session: str) -> None:
        """Make sure that the stream is open, and still what it was.

        Raises:
            SinkError: it is not.
        """
        self.check()

    def write(self, lines: Sequence[bytes]) -> None:
        """Write lines at once, past Python's own buffer.

        Raises:
            SinkError: the stream did not take them all.
        """
        self.check()
        data = memoryview(b"\n" * self._torn + b"".join(lines))
        written = 0
        self._torn = True  # until all is written: what comes after a part needs a line of its own
        try:
            with _alone(self._descriptor):
                while written < len(data):
                    written += self._take(data[written:])
                if stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                    _durable.sync(self._descriptor)
        except OSError as error:
            raise from_oserror(
                f"write to {self.stream}", error, persisted="unknown" if written else "no"
            ) from error
        self._torn = False

    def close(self) -> None:
        """Leave the stream to the process it belongs to."""

    def _look(self) -> tuple[int, int] | None:
        try:
            stats = os.fstat(self._descriptor)
        except OSError:
            return None
        return stats.st_dev, stats.st_ino

    def _take(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:
            if not select.select([], [self._descriptor], [], PATIENCE)[1]:
                raise
            return 0


@contextmanager
def _alone(descriptor: int) -> Iterator[None]:
    """Keep other processes of ours out: what exceeds PIPE_BUF is torn apart in a full pipe."""
    try:
        import fcntl  # not on Windows

        fcntl.lockf(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):  # nothing that can be locked
        yield
        return
    try:
        yield
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN)
