"""Help for those who test code that audits.

`capture_audit()` keeps entries in memory instead of recording them, whatever the configuration;
`MemorySink` and `FailingSink` are sinks for handlers of your own. The pytest fixture
`audit_entries` comes with the package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import orjson

from structlog_audit.call import CAPTURES
from structlog_audit.entry import SESSION_ACTION, Kind
from structlog_audit.exceptions import AuditWriteError, SinkError
from structlog_audit.handler import AuditHandler


class MemorySink:
    """Keeps lines in memory.

    Attributes:
        lines: every line that was written, with its newline, in order, over all sessions.
        entries: the entries as they stand on the lines, without the sessions' own.
    """

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.entries: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        return f"MemorySink({len(self.lines)} lines)"

    def open(self, session: str) -> None:
        """Get ready for a new session."""

    def write(self, lines: Sequence[bytes]) -> None:
        """Keep the lines."""
        self.lines.extend(lines)
        entries = map(orjson.loads, lines)
        self.entries.extend(entry for entry in entries if entry["action"] != SESSION_ACTION)

    def close(self) -> None:
        """Let go of the session."""


class FailingSink(MemorySink):
    """Keeps lines in memory, and fails when it is told to.

    Args:
        fail: given the number of the write, from 1, tells whether it fails; None fails always.
        error: what to raise.
    """

    def __init__(
        self,
        fail: Callable[[int], bool] | None = None,
        error: Exception | None = None,
    ) -> None:
        super().__init__()
        self.writes = 0
        self._fail = fail or (lambda number: True)
        self._error = error or SinkError("it was told to fail", persisted="no")

    def __repr__(self) -> str:
        return f"FailingSink({self.writes} writes)"

    def write(self, lines: Sequence[bytes]) -> None:
        """Fail, or keep the lines.

        Raises:
            SinkError: it was told to fail.
        """
        self.writes += 1
        if self._fail(self.writes):
            raise self._error
        super().write(lines)


@contextlib.contextmanager
def capture_audit(sink: MemorySink | None = None) -> Iterator[list[dict[str, Any]]]:
    """Keep all audit entries of the process in memory for the length of a block.

    It serves whatever is configured: processors, a handler of logging, the environment, or
    nothing. It is for tests alone: nothing is recorded meanwhile.

    Args:
        sink: where to keep them; a `FailingSink` tests what your code does when auditing fails.

    Raises:
        TypeError: the sink is of another kind.

    Yields:
        The entries as they stand on their lines, growing while the block runs.
    """
    if sink is not None and not isinstance(sink, MemorySink):
        raise TypeError(f"capture_audit takes a MemorySink or FailingSink, not {sink!r}")
    memory = MemorySink() if sink is None else sink
    handler = _Capture(memory)
    CAPTURES.append(handler)
    try:
        yield memory.entries
    finally:
        CAPTURES.remove(handler)  # not the last one: blocks in two threads may overlap
        with contextlib.suppress(AuditWriteError):  # a FailingSink may refuse the outcomes
            handler.close()


class _Capture(AuditHandler):
    """Has outcomes at hand at once, for tests to look at."""

    def submit(self, entry: Mapping[str, object], kind: Kind = "Record") -> None:
        try:
            self.record(entry, kind)
        except AuditWriteError:
            super().submit(entry, kind)
