"""Sinks that count, wait or fail when a test says so."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

from running import HANG

from structlog_audit import AuditHandler, SinkError, Space
from structlog_audit.testing import MemorySink


class CountingSink(MemorySink):
    """Keeps lines in memory and counts what it was asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.opens = 0
        self.writes = 0
        self.closes = 0

    def open(self, session: str) -> None:
        self.opens += 1

    def write(self, lines: Sequence[bytes]) -> None:
        self.writes += 1
        super().write(lines)

    def close(self) -> None:
        self.closes += 1


class HangingSink(MemorySink):
    """Hangs in every write while `gate` is closed; it begins open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def hang(self) -> None:
        """Hang from now on."""
        self.entered.clear()
        self.gate.clear()

    def hang_in(self, handler: AuditHandler, action: str) -> threading.Thread:
        """Have a thread record an entry, and hang in its write; return the thread."""
        self.hang()
        thread = threading.Thread(target=handler.record, args=({"action": action},))
        thread.start()
        assert self.entered.wait(HANG)
        return thread

    def go_on(self) -> None:
        """Let the write that hangs go on."""
        self.gate.set()

    def write(self, lines: Sequence[bytes]) -> None:
        self.entered.set()
        assert self.gate.wait(HANG)
        super().write(lines)


class SendingSink(MemorySink):
    """Confirms a write for each permit; says before it waits that the lines are sent, or not."""

    def __init__(self, *, tells: bool) -> None:
        super().__init__()
        self.on_sent: Callable[[], None] | None = None
        self.permits = threading.Semaphore(0)
        self.writes = 0
        self._tells = tells

    def write(self, lines: Sequence[bytes]) -> None:
        self.writes += 1
        if self._tells and self.on_sent is not None:
            self.on_sent()
        assert self.permits.acquire(timeout=HANG)
        super().write(lines)


class BrokenSink(MemorySink):
    """Raises `error` while it is set."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.error = error

    def write(self, lines: Sequence[bytes]) -> None:
        if self.error is not None:
            raise self.error
        super().write(lines)


class SmallSink(MemorySink):
    """Tells how much room it has."""

    def __init__(self, free: int) -> None:
        super().__init__()
        self.free = free

    def space(self) -> Space:
        return Space(self.free, 1_000, "memory")


def refusal(persisted: str = "no") -> SinkError:
    """Return what a sink raises when it cannot write."""
    return SinkError("it does not work today", persisted=persisted)


def begins(sink: MemorySink) -> list[dict[str, Any]]:
    """Return the first line of each session."""
    return [line for line in map(json.loads, sink.lines) if line["prev"] == ""]
