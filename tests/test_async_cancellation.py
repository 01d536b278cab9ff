"""Cancelled tasks and time limits: they take as long as the outcome, and then say the truth."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import structlog
from doubles import BrokenSink, HangingSink, begins, refusal
from running import HANG, run_loop, until

from structlog_audit import (
    AuditError,
    AuditHandler,
    AuditTimeoutError,
    AuditWriteError,
    audit_log,
    audit_processors,
)

MakeHandler = Callable[..., AuditHandler]


def test_a_cancelled_task_waits_for_its_outcome(make_handler: MakeHandler) -> None:
    """It is cancelled when the entry is durable, and not before."""
    sink = HangingSink()
    handler = make_handler(sink)

    async def work() -> None:
        sink.hang()
        task = asyncio.create_task(handler.arecord({"action": "A"}))
        await until(sink.entered.is_set)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()
        sink.go_on()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert [entry["action"] for entry in sink.entries] == ["A"]

    run_loop(work())


def test_a_cancelled_task_whose_entry_failed_is_told_of(make_handler: MakeHandler) -> None:
    """Its caller sees the cancellation only, so the hook and the gap must know."""
    sink = BrokenSink()
    told: list[AuditError] = []
    handler = make_handler(sink, on_failure=told.append)
    entered, gate = threading.Event(), threading.Event()

    def fail_slowly(lines: Any) -> None:
        entered.set()
        assert gate.wait(HANG)
        raise refusal()

    sink.write = fail_slowly  # type: ignore[method-assign]

    async def work() -> None:
        task = asyncio.create_task(handler.arecord({"action": "A"}))
        await until(entered.is_set)
        task.cancel()
        await asyncio.sleep(0.01)
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_loop(work())
    del sink.write  # type: ignore[method-assign]
    handler.record({"action": "B"})

    assert [type(error) for error in told] == [AuditWriteError]
    assert begins(sink)[0]["data"]["gap"]["failedCalls"] == 1


async def cancelled_in_time_out(
    sink: HangingSink, handler: AuditHandler, call: Coroutine[Any, Any, object]
) -> None:
    """Cancel a call while its sink hangs, which goes on when the call has timed out."""
    sink.hang()
    task = asyncio.create_task(call)
    await until(sink.entered.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    sink.go_on()
    await until(lambda: handler._commits._since is None)


def test_a_cancelled_task_that_timed_out_is_told_of(make_handler: MakeHandler) -> None:
    """Likewise when there was no answer in time."""
    sink = HangingSink()
    told: list[AuditError] = []
    handler = make_handler(sink, timeout=0.1, on_failure=told.append)

    run_loop(cancelled_in_time_out(sink, handler, handler.arecord({"action": "A"})))

    assert [type(error) for error in told] == [AuditTimeoutError]


def test_a_time_limit_around_a_call_waits_for_its_outcome(make_handler: MakeHandler) -> None:
    """`asyncio.wait_for`: it takes longer, but what it says is true."""
    sink = HangingSink()
    handler = make_handler(sink)

    async def work() -> None:
        sink.hang()
        loop = asyncio.get_running_loop()
        loop.call_later(0.1, sink.go_on)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(handler.arecord({"action": "A"}), 0.01)
        assert len(sink.entries) == 1

    run_loop(work())


@pytest.mark.skipif(not hasattr(asyncio, "timeout"), reason="needs Python 3.11")
def test_a_timeout_block_around_a_call_waits_for_its_outcome(make_handler: MakeHandler) -> None:
    """`asyncio.timeout`."""
    sink = HangingSink()
    handler = make_handler(sink)

    async def work() -> None:
        sink.hang()
        asyncio.get_running_loop().call_later(0.1, sink.go_on)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):  # type: ignore[attr-defined, unused-ignore]
                await handler.arecord({"action": "A"})
        assert len(sink.entries) == 1

    run_loop(work())


def test_an_operation_cancelled_while_it_begins_is_abandoned(make_handler: MakeHandler) -> None:
    """Its Begin is durable and its body never ran, so an outcome must tell."""
    sink = HangingSink()
    handler = make_handler(sink)
    structlog.configure(processors=[*audit_processors(handler=handler)])

    async def operate() -> None:
        async with audit_log.operation(action="A"):
            raise AssertionError("the body ran")

    async def work() -> None:
        sink.hang()
        task = asyncio.create_task(operate())
        await until(sink.entered.is_set)
        task.cancel()
        await asyncio.sleep(0.01)
        sink.go_on()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_loop(work())
    handler.close()

    assert [entry["event"] for entry in sink.entries] == ["Begin", "Abandon"]
    assert len({entry["operationId"] for entry in sink.entries}) == 1


def test_an_operation_cancelled_while_its_begin_fails_has_no_outcome(
    make_handler: MakeHandler,
) -> None:
    """There is nothing in the log that it could end."""
    sink = HangingSink()
    handler = make_handler(sink, timeout=0.1)
    structlog.configure(processors=[*audit_processors(handler=handler)])

    begin = audit_log.operation(action="A").__aenter__()
    run_loop(cancelled_in_time_out(sink, handler, begin))
    handler.close()

    assert "Abandon" not in [entry["event"] for entry in sink.entries]
