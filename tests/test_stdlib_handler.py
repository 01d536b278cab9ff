"""`AuditHandler` as a plain handler of logging: recorded, or raised to the caller of `log`."""

from __future__ import annotations

import logging
import logging.config
import logging.handlers
import queue
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from doubles import BrokenSink, refusal
from reading import recorded
from running import HANG

from structlog_audit import (
    AUDIT,
    AuditConfigurationError,
    AuditEntryError,
    AuditHandler,
    AuditWriteError,
    audit_context,
)
from structlog_audit.testing import MemorySink

MakeHandler = Callable[..., AuditHandler]


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger of its own, without handlers."""
    logger = logging.getLogger("structlog_audit_tests.shop")
    yield logger
    logger.handlers.clear()
    logger.disabled = False
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def sink() -> MemorySink:
    return MemorySink()


@pytest.fixture
def attached(make_handler: MakeHandler, sink: MemorySink, logger: logging.Logger) -> AuditHandler:
    """A handler in memory, attached to the logger."""
    handler = make_handler(sink)
    logger.addHandler(handler)
    return handler


def test_a_record_of_the_level_audit_is_recorded(
    attached: AuditHandler, logger: logging.Logger, sink: MemorySink
) -> None:
    """The text with its arguments, and everything in `extra`."""
    extra = {"action": "OrderDelete", "user_id": "u-1", "data": {"a": 1}, "order": "o-1"}

    logger.log(AUDIT, "deleted %s of %d", "o-1", 3, extra=extra)

    (entry,) = sink.entries
    assert (entry["action"], entry["userId"], entry["event"]) == ("OrderDelete", "u-1", "Record")
    assert entry["data"] == {"a": 1, "order": "o-1", "description": "deleted o-1 of 3"}


def test_it_is_durable_when_log_returns(
    handler: AuditHandler, logger: logging.Logger, audit_dir: Path
) -> None:
    """It stands in the file."""
    logger.addHandler(handler)

    logger.log(35, "", extra={"action": "OrderDelete"})

    (entry,) = recorded(audit_dir)
    assert "description" not in entry["data"]


def test_an_exception_is_kept(
    attached: AuditHandler, logger: logging.Logger, sink: MemorySink
) -> None:
    """Type, message and traceback."""
    try:
        raise LookupError("no such order")
    except LookupError:
        logger.log(AUDIT, "failed", extra={"action": "OrderDelete"}, exc_info=True)

    exception = sink.entries[0]["data"]["exception"]
    assert (exception["type"], exception["message"]) == ("LookupError", "no such order")
    assert "test_an_exception_is_kept" in exception["traceback"]


@pytest.mark.parametrize("level", [10, 20, 30, 34, 36, 40, 50])
def test_other_levels_are_left_alone(
    level: int, attached: AuditHandler, logger: logging.Logger, sink: MemorySink
) -> None:
    """An ordinary record never raises and never waits."""
    logger.setLevel(1)

    logger.log(level, "x", extra={"session": "of no concern"})

    assert sink.lines == []


def test_a_failing_sink_raises_to_the_caller(
    make_handler: MakeHandler, logger: logging.Logger
) -> None:
    """Not swallowed, whatever `logging.raiseExceptions` says."""
    logger.addHandler(make_handler(BrokenSink(refusal())))

    with pytest.raises(AuditWriteError, match="does not work today"):
        logger.log(AUDIT, "x", extra={"action": "OrderDelete"})


@pytest.mark.parametrize(
    ("message", "args", "extra", "told"),
    [
        ("no action", (), {}, "needs an action"),
        ("%d", ("x",), {"action": "A"}, "does not fit"),
        ("x", (), {"action": "A", "session": "forged"}, "cannot be set"),
        ("x", (), {"action": "A", "data": 5}, "must be a mapping"),
        ("x", (), {"action": ["A"]}, "must be text"),
        ("x", (), {"action": "A", "description": "y", "data": {"description": "z"}}, "twice"),
    ],
)
def test_an_unusable_entry_raises_to_the_caller(
    message: str,
    args: Any,
    extra: Any,
    told: str,
    attached: AuditHandler,
    logger: logging.Logger,
    sink: MemorySink,
) -> None:
    """It says what is wrong; nothing is recorded."""
    with pytest.raises(AuditEntryError, match=told):
        logger.log(AUDIT, message, *args, extra=extra)

    assert sink.lines == []


def test_the_audit_context_reaches_records_of_logging(
    attached: AuditHandler, logger: logging.Logger, sink: MemorySink
) -> None:
    """Who is asking is known here as well."""
    with audit_context(user_id="u-1", request_id="r-1"):
        logger.log(AUDIT, "x", extra={"action": "A", "request_id": "mine"})

    assert (sink.entries[0].get("userId"), sink.entries[0]["requestId"]) == ("u-1", "mine")


def test_handlers_after_it_are_not_called_when_it_raises(
    make_handler: MakeHandler, logger: logging.Logger
) -> None:
    """What was not recorded is not told elsewhere as if it were."""
    other = logging.handlers.BufferingHandler(10)
    logger.addHandler(make_handler(BrokenSink(refusal())))
    logger.addHandler(other)

    with pytest.raises(AuditWriteError):
        logger.log(AUDIT, "x", extra={"action": "A"})

    assert other.buffer == []
    other.close()


def test_it_works_after_it_raised(make_handler: MakeHandler, logger: logging.Logger) -> None:
    """No lock is left behind."""
    sink = BrokenSink(refusal())
    logger.addHandler(make_handler(sink))
    with pytest.raises(AuditWriteError):
        logger.log(AUDIT, "x", extra={"action": "A"})
    sink.error = None

    logger.log(AUDIT, "x", extra={"action": "B"})

    assert [entry["action"] for entry in sink.entries] == ["B"]


def test_callers_in_threads_share_commits_here_too(
    attached: AuditHandler, logger: logging.Logger, sink: MemorySink
) -> None:
    """There is no handler lock that lets them in one by one."""
    assert attached.lock is None
    attached.acquire()
    attached.release()


@pytest.mark.parametrize("level", [36, "CRITICAL", logging.ERROR])
def test_a_level_that_would_keep_entries_out_is_refused(level: Any, attached: AuditHandler) -> None:
    """And does not stick."""
    with pytest.raises(AuditConfigurationError, match="keep audit entries"):
        attached.setLevel(level)

    assert attached.level <= AUDIT


def test_a_level_below_is_accepted(
    attached: AuditHandler, logger: logging.Logger, sink: MemorySink
) -> None:
    """It changes nothing."""
    attached.setLevel("WARNING")
    attached.setLevel(AUDIT)

    logger.log(AUDIT, "x", extra={"action": "A"})

    assert len(sink.entries) == 1


def test_filters_are_refused(attached: AuditHandler) -> None:
    """They would drop entries."""
    with pytest.raises(AuditConfigurationError, match="no filters"):
        attached.addFilter(logging.Filter("x"))


def test_behind_a_memory_handler_it_refuses(
    make_handler: MakeHandler, sink: MemorySink, logger: logging.Logger
) -> None:
    """Its callers went on long before; it raises when the buffer is flushed."""
    buffering = logging.handlers.MemoryHandler(10, target=make_handler(sink))
    logger.addHandler(buffering)
    logger.log(AUDIT, "x", extra={"action": "A"})

    with pytest.raises(AuditConfigurationError, match=r"behind a MemoryHandler[\s\S]*itself"):
        buffering.flush()

    assert sink.lines == []
    buffering.setTarget(None)  # type: ignore[arg-type]
    buffering.close()


@pytest.mark.parametrize(
    "kind", [logging.handlers.QueueListener, type("Mine", (logging.handlers.QueueListener,), {})]
)
def test_behind_a_queue_it_refuses_and_the_listener_goes_on(
    make_handler: MakeHandler,
    sink: MemorySink,
    logger: logging.Logger,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[logging.handlers.QueueListener],
) -> None:
    """The caller is gone: hook and stderr are told, and other handlers get their records."""
    failures: list[Any] = []
    shown: list[Any] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: shown.append(error))
    records: queue.Queue[Any] = queue.Queue()
    logger.addHandler(logging.handlers.QueueHandler(records))
    other: queue.Queue[Any] = queue.Queue()
    audit = make_handler(sink, on_failure=failures.append)
    listener = kind(records, audit, logging.handlers.QueueHandler(other))
    listener.start()

    logger.log(AUDIT, "x", extra={"action": "A"})
    logger.warning("y")

    assert [other.get(timeout=HANG).getMessage() for _ in "xy"] == ["x", "y"]
    listener.stop()
    (failure,) = failures
    assert isinstance(failure, AuditConfigurationError)
    assert shown == [failure]
    assert "attach the AuditHandler to the logger itself" in str(failure)
    assert sink.lines == []


def test_a_level_of_the_logger_that_drops_audit_records_is_not_ours_to_see(
    attached: AuditHandler, logger: logging.Logger, sink: MemorySink
) -> None:
    """What `isEnabledFor` says is what happens: the documentation tells to ask it."""
    logger.setLevel(logging.ERROR)
    assert not logger.isEnabledFor(AUDIT)

    logger.log(AUDIT, "x", extra={"action": "A"})

    assert sink.lines == []


def test_an_audit_call_from_within_another_handler_is_recorded(
    make_handler: MakeHandler, sink: MemorySink, logger: logging.Logger
) -> None:
    """A foreign handler that audits while logging handles a record."""
    audit = make_handler(sink)

    class Auditing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            audit.record({"action": "FromHandler"})

    logger.addHandler(Auditing())
    logger.warning("x")

    assert [entry["action"] for entry in sink.entries] == ["FromHandler"]
