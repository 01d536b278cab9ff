"""Outcomes: queued without waiting, written soon, kept while the sink fails."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from doubles import BrokenSink, HangingSink, refusal
from reading import recorded
from running import HANG, in_threads

from structlog_audit import (
    AuditHandler,
    AuditWriteError,
    SinkError,
    audit_log,
    audit_processors,
    commit,
)
from structlog_audit.testing import MemorySink

MakeHandler = Callable[..., AuditHandler]


def test_an_outcome_does_not_wait_for_the_sink(make_handler: MakeHandler) -> None:
    """The sink is stuck: the block is left all the same."""
    sink = HangingSink()
    handler = make_handler(sink)
    structlog.configure(processors=[*audit_processors(handler=handler)])

    def work() -> None:
        with audit_log.operation(action="A"):
            sink.hang()
            blocker.start()
            assert sink.entered.wait(HANG)

    blocker = threading.Thread(target=handler.record, args=({"action": "Blocker"},))
    worker = threading.Thread(target=work)
    worker.start()
    worker.join(HANG)
    left = not worker.is_alive()
    sink.go_on()
    blocker.join(HANG)
    handler.close()
    assert left
    assert [e["event"] for e in sink.entries if e["action"] == "A"] == ["Begin", "Complete"]


def wait_for(count: int, entries: list[Any]) -> None:
    patience = threading.Event()
    for _ in range(HANG * 100):
        if len(entries) >= count:
            return
        patience.wait(0.01)
    raise AssertionError(f"only {len(entries)} entries")


def test_an_outcome_is_written_by_itself(make_handler: MakeHandler) -> None:
    """Nobody calls again, nobody closes: it becomes durable nevertheless."""
    sink = MemorySink()
    structlog.configure(processors=[*audit_processors(handler=make_handler(sink))])

    with audit_log.operation(action="A"):
        pass

    wait_for(2, sink.entries)


def test_an_outcome_goes_with_the_next_commit(handler: AuditHandler, audit_dir: Path) -> None:
    """It stands before the entry that came after it."""
    structlog.configure(processors=[*audit_processors(handler=handler)])

    with audit_log.operation(action="A"):
        pass
    audit_log.info(action="B")

    told = [(e["action"], e["event"]) for e in recorded(audit_dir)]
    assert told == [("A", "Begin"), ("A", "Complete"), ("B", "Record")]


def test_outcomes_are_kept_while_the_sink_fails(make_handler: MakeHandler) -> None:
    """They are written once it works again, each once, in order."""
    sink = BrokenSink()
    handler = make_handler(sink)
    structlog.configure(processors=[*audit_processors(handler=handler)])

    for number in range(5):
        with audit_log.operation(action="A", number=number):
            sink.error = refusal()
        with pytest.raises(AuditWriteError):
            audit_log.info(action="Failing")
        sink.error = None
    handler.close()

    outcomes = [e for e in sink.entries if e["event"] == "Complete"]
    begun = [e["operationId"] for e in sink.entries if e["event"] == "Begin"]
    assert [e["operationId"] for e in outcomes] == begun
    assert "Failing" not in {e["action"] for e in sink.entries}


def test_outcomes_that_cannot_be_written_at_close_are_told_of(make_handler: MakeHandler) -> None:
    """`close` raises; what it could not write it keeps for the next try."""
    sink = BrokenSink()
    handler = make_handler(sink)
    structlog.configure(processors=[*audit_processors(handler=handler)])
    with audit_log.operation(action="A"):
        sink.error = refusal()

    with pytest.raises(AuditWriteError, match="1 outcome"):
        handler.close()

    sink.error = None
    handler.close()
    assert [e["event"] for e in sink.entries] == ["Begin", "Complete"]


def test_operations_in_threads_have_whole_pairs(handler: AuditHandler, audit_dir: Path) -> None:
    """Every Begin has one outcome, after it."""
    structlog.configure(processors=[*audit_processors(handler=handler)])

    def work() -> None:
        for _ in range(20):
            with audit_log.operation(action="A"):
                pass

    in_threads([work] * 8)
    handler.close()

    entries = recorded(audit_dir)
    begun = [e["operationId"] for e in entries if e["event"] == "Begin"]
    ended = [e["operationId"] for e in entries if e["event"] == "Complete"]
    assert len(begun) == len(set(begun)) == 160
    assert sorted(begun) == sorted(ended)


class Picky(MemorySink):
    """Refuses lines above a length, as a server or a file size limit does."""

    longest = 10_000

    def write(self, lines: Sequence[bytes]) -> None:
        if any(len(line) > self.longest for line in lines):
            raise SinkError("too large", persisted="no")
        super().write(lines)


def test_an_outcome_that_the_sink_never_takes_fails_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is tried again alone, and given up loudly once others were taken and it was not."""
    monkeypatch.setattr(commit, "RETRY_DELAY", 0.01)
    sink, lost = Picky(), threading.Event()
    handler = AuditHandler(sink)
    handler.on_failure = lambda error: lost.set() if "is lost" in error.reason else None
    handler.submit({"action": "Import", "rows": "y" * 20_000}, "Complete")
    with contextlib.suppress(AuditWriteError):
        handler.record({"action": "With it"})  # may share the outcome's first try

    for number in range(1000):
        handler.record({"action": "After", "number": number})
        if lost.wait(0.01):
            break

    assert lost.is_set()
    handler.record({"action": "Last"})
    with pytest.raises(AuditWriteError, match="1 outcome"):
        handler.close()
    handler.close()  # it was told of
    gaps = [line for line in sink.lines if b"refused again and again" in line]
    assert gaps


def test_an_outcome_that_the_sink_never_takes_costs_no_other_at_close() -> None:
    """They were in one batch; at the end each is tried alone."""
    sink = Picky()
    handler = AuditHandler(sink)
    for number, rows in enumerate(["x", "y" * 20_000, "z"]):
        handler.submit({"action": "Import", "number": number, "rows": rows}, "Complete")

    with pytest.raises(AuditWriteError, match="1 outcome"):
        handler.close()

    assert [entry["data"]["number"] for entry in sink.entries] == [0, 2]
    sink.longest = 100_000
    handler.close()
    assert [entry["data"]["number"] for entry in sink.entries] == [0, 2, 1]


def test_an_outcome_that_failed_is_written_soon_while_many_callers_are_busy(
    make_handler: MakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lead goes from caller to caller; the helper must get its turn among them."""
    monkeypatch.setattr(commit, "RETRY_DELAY", 0.01)
    sink = BrokenSink(refusal())
    handler = make_handler(sink)
    handler.submit({"action": "Outcome"}, "Complete")
    with contextlib.suppress(AuditWriteError):
        handler.record({"action": "With it"})
    sink.error = None
    deadline = time.monotonic() + HANG

    def work() -> bool:
        while time.monotonic() < deadline:
            handler.record({"action": "Busy"})
            if any(b'"Outcome"' in line for line in sink.lines):
                return True
        return False

    assert all(in_threads([work] * 8))


def test_an_outcome_queued_as_the_interpreter_ends_is_written(make_handler: MakeHandler) -> None:
    """The handler was closed for the last time in the instant between looking and queueing."""
    sink = MemorySink()
    handler = make_handler(sink)
    handler.record({"action": "Before"})
    queue = handler._commits.submit

    def close_first(ticket: commit.Ticket) -> bool:
        handler._sessions.exiting = True
        handler.close()
        return queue(ticket)

    handler._commits.submit = close_first  # type: ignore[method-assign]
    handler.submit({"action": "Last"}, "Complete")

    assert [entry["action"] for entry in sink.entries] == ["Before", "Last"]
