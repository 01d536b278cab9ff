"""Faults that must not last: put-off turns, locks in a lock, hooks that raise or hang."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from doubles import BrokenSink, HangingSink, SmallSink, begins, refusal
from reading import recorded
from running import HANG, eventually, in_threads, run_loop, run_well, until

from structlog_audit import (
    AuditConfigurationError,
    AuditError,
    AuditHandler,
    AuditSpaceWarning,
    AuditTimeoutError,
    AuditWriteError,
    Settings,
    SinkError,
    Space,
    alarm,
    commit,
)
from structlog_audit.testing import MemorySink

MakeHandler = Callable[..., AuditHandler]


def actions(sink: MemorySink) -> list[str]:
    return [entry["action"] for entry in sink.entries]


def test_an_outcome_is_flushed_although_the_last_flush_had_to_be_put_off(
    make_handler: MakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The helper's turn fell into a commit that had carried all there was; nobody calls again."""
    monkeypatch.setattr(commit, "FLUSH_DELAY", 0.3)
    sink = HangingSink()
    handler = make_handler(sink)
    handler.record({"action": "Before"})
    sink.hang()
    handler.submit({"action": "First"}, "Complete")
    leader = threading.Thread(target=handler.record, args=({"action": "Leader"},))
    leader.start()
    assert sink.entered.wait(HANG)
    threading.Event().wait(0.6)  # the helper has its turn, which nothing tells of
    sink.go_on()
    leader.join(HANG)

    handler.submit({"action": "Second"}, "Complete")

    eventually(lambda: "Second" in actions(sink))


def test_a_failing_call_within_the_counting_of_a_failed_call_does_not_hang(
    make_handler: MakeHandler,
) -> None:
    """A signal handler or finalizer audits at any line there, and fails as well."""
    sink = HangingSink()
    handler = make_handler(sink, timeout=0.2)
    sink.hang()
    leader = threading.Thread(target=in_vain, args=(handler, "Leader"), daemon=True)
    leader.start()
    assert sink.entered.wait(HANG)
    code = alarm.Gap.add.__code__
    reentered = []

    def at_each_line(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code is not code:
            return None
        if event == "line":
            sys.settrace(None)
            reentered.append(in_vain(handler, "Within"))
            sys.settrace(at_each_line)
        return at_each_line

    def work() -> AuditError | None:
        before = sys.gettrace()
        sys.settrace(at_each_line)
        try:
            return in_vain(handler, "Outside")
        finally:
            sys.settrace(before)

    (failed,) = in_threads([work])
    sink.go_on()
    leader.join(HANG)
    assert isinstance(failed, AuditTimeoutError)
    assert reentered
    assert all(isinstance(error, AuditTimeoutError) for error in reentered)
    handler.record({"action": "After"})
    assert begins(sink)[-1]["data"]["gap"]["failedCalls"] >= 1 + len(reentered)


def in_vain(handler: AuditHandler, action: str) -> AuditError | None:
    try:
        handler.record({"action": action})
    except AuditError as error:
        return error
    return None


def test_an_excepthook_that_exits_does_not_take_the_helper_with_it(
    make_handler: MakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sink exits in the helper's thread, and so does the hook: later calls work."""

    def crash(*_: object) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(sys, "excepthook", crash)
    sink = BrokenSink()
    handler = make_handler(sink)

    async def work() -> None:
        await handler.arecord({"action": "Before"})
        sink.error = SystemExit()
        with pytest.raises(AuditWriteError, match="SystemExit"):
            await handler.arecord({"action": "Lost"})
        sink.error = None
        await handler.arecord({"action": "After"})
        handler.submit({"action": "Outcome"}, "Complete")
        await until(lambda: "Outcome" in actions(sink))

    run_loop(work())


@pytest.mark.parametrize(
    "timeout", [None, math.inf, math.nan, threading.TIMEOUT_MAX * 2, 10**400, 0, -1, True, "10"]
)
def test_a_timeout_that_nobody_can_wait_for_is_refused(timeout: Any) -> None:
    """It would be noticed as late as two calls meet."""
    with pytest.raises(AuditConfigurationError, match="timeout"):
        AuditHandler(MemorySink(), timeout=timeout)


@pytest.mark.parametrize("text", ["none", "inf", "nan", "999999d", "9" * 400])
def test_a_timeout_of_the_host_that_nobody_can_wait_for_is_refused(text: str) -> None:
    """The same in the environment."""
    variables = {"AUDIT_LOG_DIR": "/dev/stderr", "AUDIT_LOG_TIMEOUT": text}

    with pytest.raises(AuditConfigurationError, match=r"(?i)timeout"):
        Settings.from_environ(variables).handler()


def test_the_longest_timeout_works_when_calls_meet(make_handler: MakeHandler) -> None:
    """Threads that wait for each other, and a coroutine."""
    sink = HangingSink()
    handler = make_handler(sink, timeout=threading.TIMEOUT_MAX)
    leader = sink.hang_in(handler, "A")
    waiters = [
        threading.Thread(target=handler.record, args=({"action": "A"},), daemon=True)
        for _ in range(2)
    ]
    for waiter in waiters:
        waiter.start()
    eventually(lambda: len(handler._commits._queue) == 2)

    async def work() -> None:
        call = asyncio.ensure_future(handler.arecord({"action": "A"}))
        await until(lambda: len(handler._commits._queue) == 3)
        sink.go_on()
        await call

    run_loop(work())
    for waiter in (leader, *waiters):
        waiter.join(HANG)

    assert actions(sink) == ["A"] * 4


def test_any_number_of_outcomes_is_taken_while_the_sink_works(make_handler: MakeHandler) -> None:
    """A busy loop leaves more of them than are kept while a sink fails."""
    sink = HangingSink()
    handler = make_handler(sink)
    leader = sink.hang_in(handler, "Leader")
    count = commit.MAX_OUTCOMES + 100
    for _ in range(count):
        handler.submit({"action": "Outcome"}, "Complete")
    sink.go_on()
    leader.join(HANG)
    handler.close()

    assert actions(sink).count("Outcome") == count


def test_outcomes_are_refused_when_too_many_failed(
    make_handler: MakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would fill the memory; those that were kept are written when the sink works again."""
    monkeypatch.setattr(commit, "MAX_OUTCOMES", 10)
    sink = BrokenSink(refusal())
    handler = make_handler(sink)
    for _ in range(10):
        handler.submit({"action": "Outcome"}, "Complete")
    in_vain(handler, "Lost")
    with pytest.raises(AuditWriteError, match="too many outcomes"):
        handler.submit({"action": "Refused"}, "Complete")
    sink.error = None
    handler.close()

    assert actions(sink) == ["Outcome"] * 10
    assert begins(sink)[-1]["data"]["gap"]["failedCalls"] == 2


def test_a_hook_that_hangs_on_low_space_delays_nobody_but_its_caller(
    make_handler: MakeHandler,
) -> None:
    """It waits for some server; the disk is healthy, and other calls go on."""
    entered, gate = threading.Event(), threading.Event()
    told: list[AuditError] = []

    def hook(error: AuditError) -> None:
        told.append(error)
        entered.set()
        assert gate.wait(HANG)

    sink = SmallSink(free=1)
    handler = make_handler(sink, timeout=1, low_space=0.5, on_failure=hook)
    first = threading.Thread(target=handler.record, args=({"action": "A"},))
    first.start()
    assert entered.wait(HANG)

    async def work() -> None:
        await handler.arecord({"action": "B"})

    results = in_threads([lambda: in_vain(handler, "B") for _ in range(4)])
    run_loop(work())
    hangs = first.is_alive()
    gate.set()
    first.join(HANG)

    assert hangs
    assert results == [None] * 4
    assert [type(error) for error in told] == [AuditSpaceWarning]
    assert sorted(actions(sink)) == ["A", "B", "B", "B", "B", "B"]


@pytest.mark.parametrize("error", [ValueError("no number"), SinkError("no answer")])
def test_a_sink_that_cannot_tell_its_space_keeps_its_session(
    error: Exception, make_handler: MakeHandler
) -> None:
    """The entry is durable already when the space is looked at."""

    class Mute(MemorySink):
        def space(self) -> Space:
            raise error

    sink = Mute()
    handler = make_handler(sink)
    receipts = [handler.record({"action": "A"}) for _ in range(2)]

    assert [receipt.sequence for receipt in receipts] == [2, 3]
    assert len(begins(sink)) == 1


RECURSION = """
    import sys
    from structlog_audit import AuditError, AuditHandler, FileSink

    def descend(frames, then):
        return then() if frames == 0 else descend(frames - 1, then)

    limit, failed = 300, 0
    sys.setrecursionlimit(limit)
    for warm in (0, 2):
        for frames in range(limit - 120, limit):
            handler = AuditHandler(FileSink(sys.argv[1]), timeout=1)
            for number in range(warm):
                handler.record({"action": "Before"})
            try:
                descend(frames, lambda: handler.record({"action": "Deep"}))
            except (AuditError, RecursionError):
                failed += 1
            handler.record({"action": "After"})
            handler.close()
    assert failed > 20, failed
"""


def test_an_endless_recursion_that_ends_in_an_audit_call_leaves_a_usable_handler(
    audit_dir: Path,
) -> None:
    """At any depth: whoever leads has room on the stack to hand over."""
    run_well(RECURSION, audit_dir)

    assert [e["action"] for e in recorded(audit_dir)].count("After") == 240


def test_a_ticket_that_is_withdrawn_while_the_leader_reaches_for_it(
    make_handler: MakeHandler,
) -> None:
    """Its caller's time was over in this very instant; the leader goes on with the others."""

    class Emptied(deque[commit.Ticket]):
        reaches = 0

        def __getitem__(self, index: Any) -> Any:
            self.reaches += 1
            if self.reaches == 1:
                raise IndexError("deque index out of range")
            return super().__getitem__(index)

    sink = MemorySink()
    handler = make_handler(sink)
    handler._commits._queue = Emptied()

    receipt = handler.record({"action": "A"})

    assert receipt.sequence == 2
    assert actions(sink) == ["A"]


class Struck(BaseException):
    """What a signal handler raises."""


def test_an_outcome_that_is_kept_when_an_exception_strikes_is_written_once(
    make_handler: MakeHandler,
) -> None:
    """The leader was putting it aside, and does so again on its way out."""
    sink = BrokenSink(refusal())
    handler = make_handler(sink)
    keep, struck = handler._commits._keep, []

    def strike(ticket: commit.Ticket) -> None:
        keep(ticket)
        if not struck:
            struck.append(ticket)
            raise Struck

    handler._commits._keep = strike  # type: ignore[method-assign]
    for _ in range(3):
        handler.submit({"action": "Outcome"}, "Complete")
    with pytest.raises(Struck):
        handler.record({"action": "A"})
    sink.error = None
    handler.close()

    assert struck
    assert actions(sink).count("Outcome") == 3


def test_a_lead_that_is_lost_between_two_is_found(make_handler: MakeHandler) -> None:
    """An exception strikes who gave it up, before the helper was told to take it."""
    sink = HangingSink()
    handler = make_handler(sink, timeout=HANG)
    handler.record({"action": "First"})
    order, struck = handler._commits._helper.order, []

    def strike(what: Any) -> None:
        if threading.current_thread().name == "leader" and not struck:
            struck.append(what)
            raise Struck
        order(what)

    handler._commits._helper.order = strike  # type: ignore[method-assign]
    sink.hang()

    def lead() -> None:
        threading.current_thread().name = "leader"
        with pytest.raises(Struck):
            handler.record({"action": "Leader"})

    def wait() -> None:
        assert sink.entered.wait(HANG)
        waiter = threading.Thread(target=lambda: run_loop(handler.arecord({"action": "Task"})))
        waiter.start()
        eventually(lambda: len(handler._commits._queue) == 1)
        sink.go_on()
        waiter.join(HANG)
        assert not waiter.is_alive()

    in_threads([lead, wait])

    assert struck
    assert "Task" in actions(sink)


def test_a_helper_whose_turn_an_exception_strikes_gets_it(make_handler: MakeHandler) -> None:
    """Who only wants to lead stays in the queue while others take it."""

    class Striking(deque[commit.Ticket]):
        armed = False

        def remove(self, ticket: commit.Ticket) -> None:
            super().remove(ticket)
            if self.armed:
                self.armed = False
                raise Struck

    sink = HangingSink()
    handler = make_handler(sink, timeout=HANG)
    handler.record({"action": "First"})
    queue = handler._commits._queue = Striking()
    leader = sink.hang_in(handler, "Leader")
    handler._commits.nudge()
    eventually(lambda: len(queue) == 1)

    def second() -> None:
        with pytest.raises(Struck):
            handler.record({"action": "Second"})

    def go_on() -> None:
        eventually(lambda: len(queue) == 2)
        queue.armed = True
        sink.go_on()

    in_threads([second, go_on])
    leader.join(HANG)
    eventually(lambda: not queue)

    run_loop(handler.arecord({"action": "Task"}))
    assert "Task" in actions(sink)
