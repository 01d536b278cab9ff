"""What is told of failures: to the caller, to the hook, and to whoever reads the log later."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doubles import BrokenSink, CountingSink, SmallSink, begins, refusal
from reading import read_sessions, recorded

from structlog_audit import (
    AuditConfigurationError,
    AuditEntryError,
    AuditError,
    AuditHandler,
    AuditSpaceWarning,
    AuditWriteError,
    FileSink,
    SinkError,
    alarm,
)
from structlog_audit.sinks import _durable
from structlog_audit.testing import FailingSink, MemorySink

MakeHandler = Callable[..., AuditHandler]


def test_the_caller_is_told_what_failed_and_what_to_do(
    make_handler: MakeHandler, tmp_path: Path
) -> None:
    """Sink, path, error number, fate of the entry, advice; in one exception."""
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" / "audit"
    handler = make_handler(FileSink(directory))

    with pytest.raises(AuditWriteError) as caught:
        handler.record({"action": "A", "secret": "hunter2"})

    error = caught.value
    assert (error.errno, error.persisted, error.path) == (errno.ENOTDIR, "no", str(directory))
    assert error.sink == f"FileSink({str(directory)!r})"
    for words in ("FileSink", "ENOTDIR", "was not stored", "name a directory"):
        assert words in str(error)
    assert "hunter2" not in str(error)


@pytest.mark.parametrize("persisted", ["no", "unknown"])
def test_what_a_sink_says_of_the_entrys_fate_reaches_the_caller(
    persisted: str, make_handler: MakeHandler
) -> None:
    """Word for word."""
    handler = make_handler(BrokenSink(refusal(persisted)))

    with pytest.raises(AuditWriteError) as caught:
        handler.record({"action": "A"})

    assert caught.value.persisted == persisted
    assert isinstance(caught.value.__cause__, SinkError)


@pytest.mark.parametrize("error", [ValueError("secret"), OSError(28, "full"), MemoryError()])
def test_whatever_a_foreign_sink_raises_becomes_one_kind_of_error(
    error: Exception, make_handler: MakeHandler
) -> None:
    """Nobody knows what it did: the entry's fate is unknown, the session is over."""
    sink = BrokenSink()
    handler = make_handler(sink)
    handler.record({"action": "A"})
    sink.error = error

    with pytest.raises(AuditWriteError) as caught:
        handler.record({"action": "B"})
    sink.error = None
    handler.record({"action": "C"})

    assert caught.value.persisted == "unknown"
    assert caught.value.__cause__ is error
    assert "secret" not in str(caught.value)
    assert len(begins(sink)) == 2


def test_errors_travel_between_processes(make_handler: MakeHandler, tmp_path: Path) -> None:
    """A task queue pickles them."""
    handler = make_handler(FailingSink())
    with pytest.raises(AuditWriteError) as caught:
        handler.record({"action": "A"})

    copy = pickle.loads(pickle.dumps(caught.value))

    assert type(copy) is type(caught.value)
    assert str(copy) == str(caught.value)
    assert (copy.persisted, copy.sink) == ("no", caught.value.sink)


def test_the_first_line_after_a_failure_tells_of_the_gap(make_handler: MakeHandler) -> None:
    """Since when, how many calls, why; and which session broke off where. Told once."""
    sink = BrokenSink()
    handler = make_handler(sink)
    first = handler.record({"action": "A"})
    sink.error = refusal()
    for _ in range(3):
        with pytest.raises(AuditWriteError):
            handler.record({"action": "Lost"})
    sink.error = None
    handler.record({"action": "B"})
    handler.close()
    handler.record({"action": "C"})

    _, after, last = begins(sink)
    gap = after["data"]["gap"]
    assert (gap["failedCalls"], gap["reason"]) == (3, "it does not work today")
    assert first.time <= gap["since"] <= after["time"]
    follows = after["data"]["follows"]
    assert (follows["session"], follows["sequence"]) == (first.session, first.sequence)
    assert (follows["hash"], follows["ended"]) == (first.hash, "it does not work today")
    assert "gap" not in last["data"]
    assert [entry["action"] for entry in sink.entries] == ["A", "B", "C"]


def test_a_gap_before_the_first_entry_is_told_as_well(make_handler: MakeHandler) -> None:
    """There is no session to follow, only calls that failed."""
    handler = make_handler(FailingSink(lambda number: number <= 2))
    for _ in range(2):
        with pytest.raises(AuditWriteError):
            handler.record({"action": "Lost"})

    handler.record({"action": "A"})

    (begin,) = begins(handler.sink)  # type: ignore[arg-type]
    assert begin["data"]["gap"]["failedCalls"] == 2
    assert "follows" not in begin["data"]


def test_a_session_that_cannot_begin_is_told_of_when_one_can(make_handler: MakeHandler) -> None:
    """The gap and the session before survive failing beginnings."""
    sink = FailingSink(lambda number: number in (2, 3, 4))
    handler = make_handler(sink)
    first = handler.record({"action": "A"})
    for _ in range(3):
        with pytest.raises(AuditWriteError):
            handler.record({"action": "Lost"})
    handler.record({"action": "B"})

    begin = begins(sink)[-1]
    assert begin["data"]["gap"]["failedCalls"] == 3
    assert begin["data"]["follows"]["session"] == first.session


def test_a_broken_session_is_closed_at_the_sink_and_not_written_again(
    make_handler: MakeHandler,
) -> None:
    """One close for each session; after the failure the next write belongs to a new one."""
    sink = CountingSink()
    handler = make_handler(sink)
    handler.record({"action": "A"})
    write, sink.write = sink.write, _refuse  # type: ignore[method-assign]
    with pytest.raises(AuditWriteError):
        handler.record({"action": "B"})
    closes = sink.closes
    sink.write = write  # type: ignore[method-assign]
    handler.record({"action": "C"})

    assert (closes, sink.opens) == (1, 2)


def _refuse(lines: Any) -> None:
    raise refusal()


def test_unusable_entries_leave_no_gap_and_no_new_session(make_handler: MakeHandler) -> None:
    """Nothing was wrong with the log."""
    sink = MemorySink()
    handler = make_handler(sink)
    handler.record({"action": "A"})
    with pytest.raises(AuditEntryError):
        handler.record({})
    handler.record({"action": "B"})

    assert len(begins(sink)) == 1


def test_the_hook_is_told_of_every_failed_call(make_handler: MakeHandler) -> None:
    """With the very error that the caller gets."""
    told: list[AuditError] = []
    handler = make_handler(FailingSink(), on_failure=told.append)
    raised: list[AuditError] = []

    for entry in ({"action": "A"}, {}, {"action": "A", "session": "x"}, {"action": "B"}):
        with pytest.raises(AuditError) as caught:
            handler.record(entry)
        raised.append(caught.value)

    assert list(map(id, told)) == list(map(id, raised))


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), AuditError("mine")])
def test_the_hook_cannot_suppress_or_replace_the_error(
    error: Exception, make_handler: MakeHandler, caplog: pytest.LogCaptureFixture
) -> None:
    """What it raises is logged; the caller gets the original."""

    def hook(told: AuditError) -> None:
        raise error

    handler = make_handler(FailingSink(), on_failure=hook)

    with pytest.raises(AuditWriteError, match="told to fail"):
        handler.record({"action": "A"})

    assert "on_failure itself raised" in caplog.text


def test_a_hook_that_audits_does_not_run_away(make_handler: MakeHandler) -> None:
    """An alert that is itself audited, while auditing fails: the caller gets its error."""
    sink = FailingSink()

    def hook(told: AuditError) -> None:
        handler.record({"action": "Alert"})

    handler = make_handler(sink, on_failure=hook)
    logging.getLogger("structlog_audit").setLevel(logging.CRITICAL + 1)
    try:
        with pytest.raises(AuditWriteError):
            handler.record({"action": "A"})
    finally:
        logging.getLogger("structlog_audit").setLevel(logging.NOTSET)

    assert sink.writes < 10


def test_low_space_is_told_of_once_per_crossing(
    make_handler: MakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with every entry, and again after there was room in between."""
    monkeypatch.setattr(alarm, "CHECK_SECONDS", 0.0)
    told: list[AuditError] = []
    sink = SmallSink(free=500)
    handler = make_handler(sink, low_space=0.1, on_failure=told.append)

    for free in (500, 101, 99, 50, 99, 101, 99, 0):
        sink.free = free
        handler.record({"action": "A"})

    assert [type(warning) for warning in told] == [AuditSpaceWarning] * 2
    assert [warning.free for warning in told] == [99, 99]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("low_space", "warned"), [(100, 1), (99, 0), (0.0995, 1), (0.099, 0), (0, 0)]
)
def test_the_threshold_is_bytes_or_a_part(
    low_space: float, warned: int, make_handler: MakeHandler
) -> None:
    """99 of 1000 bytes are free."""
    told: list[AuditError] = []
    handler = make_handler(SmallSink(99), low_space=low_space, on_failure=told.append)

    handler.record({"action": "A"})

    assert len(told) == warned


def test_low_space_without_a_hook_is_logged(
    make_handler: MakeHandler, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody may see it there."""
    make_handler(SmallSink(1)).record({"action": "A"})

    assert "only 1 of 1,000 bytes are free" in caplog.text


@pytest.mark.parametrize("low_space", [-1, True, float("nan"), -0.5])
def test_a_threshold_that_means_nothing_is_refused(low_space: float) -> None:
    """When the handler is made."""
    with pytest.raises(AuditConfigurationError, match="low_space"):
        AuditHandler(MemorySink(), low_space=low_space)


@pytest.mark.parametrize(
    "options",
    [{"timeout": 0}, {"timeout": -1}, {"max_bytes": 0}, {"max_age": -5}, {"max_entry_bytes": 100}],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    """By name."""
    with pytest.raises(AuditConfigurationError, match=next(iter(options))):
        AuditHandler(MemorySink(), **options)


def test_what_is_no_sink_is_refused() -> None:
    """A path instead of a sink, for instance; the message shows how."""
    with pytest.raises(AuditConfigurationError, match="FileSink"):
        AuditHandler("./audit")  # type: ignore[arg-type]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_told_of(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """As an ordinary user."""
    audit_dir.mkdir(0o500)

    with pytest.raises(AuditWriteError, match="EACCES"):
        make_handler().record({"action": "A"})


def test_a_thousand_failing_calls_leave_no_files(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """The directory was taken away by a file of its name; afterwards all is as before."""
    handler = make_handler()
    handler.record({"action": "A"})
    audit_dir.rename(audit_dir.with_name("old"))
    audit_dir.write_text("")
    for _ in range(1_000):
        with pytest.raises(AuditWriteError):
            handler.record({"action": "Lost"})
    audit_dir.unlink()
    handler.record({"action": "B"})

    ((begin, entry),) = read_sessions(audit_dir)
    assert begin["data"]["gap"]["failedCalls"] == 1_000
    assert entry["action"] == "B"
    assert [entry["action"] for entry in recorded(audit_dir.with_name("old"))] == ["A"]


def test_an_error_holds_no_entries_of_those_who_shared_the_commit(
    make_handler: MakeHandler,
) -> None:
    """Error trackers show the variables of each frame of a cause."""

    class Raising(MemorySink):
        def write(self, lines: Any) -> None:
            try:
                raise OSError(errno.EIO, "Input/output error")
            except OSError as error:
                raise refusal() from error

    with pytest.raises(AuditWriteError) as caught:
        make_handler(Raising()).record({"action": "A", "data": {"name": "Ada"}})

    cause = caught.value.__cause__
    assert isinstance(cause, SinkError)
    assert isinstance(cause.__cause__, OSError)
    assert (cause.__traceback__, cause.__cause__.__traceback__) == (None, None)


def test_a_sink_that_raises_the_same_error_again_and_again(make_handler: MakeHandler) -> None:
    """Python ties such errors into a ring of causes, which nobody may follow for ever."""
    one, two = refusal(), refusal()
    one.__cause__, two.__cause__ = two, one
    handler = make_handler(BrokenSink(one))

    for _ in range(3):
        with pytest.raises(AuditWriteError):
            handler.record({"action": "A"})


def test_an_exception_of_a_signal_handler_is_not_taken_for_the_systems_answer(
    handler: AuditHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watchdog raises `TimeoutError`, an `OSError`, when the bytes are in the file already."""
    handler.record({"action": "Before"})
    append = _durable.append

    def interrupted(descriptor: int, data: bytes) -> int:
        append(descriptor, data)
        raise TimeoutError("the watchdog")

    monkeypatch.setattr(_durable, "append", interrupted)
    with pytest.raises(AuditWriteError) as caught:
        handler.record({"action": "Cut"})

    assert caught.value.persisted == "unknown"
