"""asyncio: tasks share commits, the loop goes on, and a cancelled task knows its outcome."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from doubles import BrokenSink, CountingSink, HangingSink, begins, refusal
from faults.runner import needs
from reading import read_lines, recorded, session_files
from running import HANG, environment, in_threads, run_loop, until

from structlog_audit import (
    AuditEntryError,
    AuditHandler,
    AuditTimeoutError,
    AuditWriteError,
    Receipt,
    audit_context,
    audit_log,
    audit_processors,
)
from structlog_audit.testing import MemorySink

MakeHandler = Callable[..., AuditHandler]


def test_a_thousand_tasks_share_commits(make_handler: MakeHandler) -> None:
    """Far fewer writes than entries, every entry once, one session."""
    sink = CountingSink()
    handler = make_handler(sink)
    structlog.configure(processors=[*audit_processors(handler=handler)])

    async def work() -> list[Receipt]:
        return await asyncio.gather(
            *(audit_log.ainfo(action="A", number=number) for number in range(1_000))
        )

    receipts = run_loop(work())

    assert sorted(receipt.sequence for receipt in receipts) == list(range(2, 1_002))
    assert sorted(e["data"]["number"] for e in sink.entries) == list(range(1_000))
    assert len(read_lines(b"".join(sink.lines))) == 1_001
    assert sink.writes < 100
    assert sink.opens == 1


def test_tasks_that_wait_for_a_commit_share_the_next(make_handler: MakeHandler) -> None:
    """A hundred tasks behind one slow write need one more."""
    sink = HangingSink()
    handler = make_handler(sink)
    batches: list[int] = []
    write = sink.write
    sink.write = lambda lines: (batches.append(len(lines)), write(lines))  # type: ignore[method-assign]

    async def work() -> None:
        sink.hang()
        first = asyncio.create_task(handler.arecord({"action": "First"}))
        await until(sink.entered.is_set)
        others = [asyncio.create_task(handler.arecord({"action": "A"})) for _ in range(100)]
        await until(lambda: len(handler._commits._queue) == 100)
        sink.go_on()
        await asyncio.gather(first, *others)

    run_loop(work())
    assert batches == [2, 100]


def test_an_awaited_entry_is_in_the_file(handler: AuditHandler, audit_dir: Path) -> None:
    """The receipt names its line; context of the task is in it."""
    structlog.configure(processors=[*audit_processors(handler=handler)])

    async def work() -> Receipt:
        with audit_context(user_id="u-1"):
            return await audit_log.ainfo("text", action="A")

    receipt = run_loop(work())

    (entry,) = recorded(audit_dir)
    assert (entry["sequence"], entry["userId"]) == (receipt.sequence, "u-1")
    assert entry["data"] == {"description": "text"}


def test_entries_of_one_task_stand_in_its_order(handler: AuditHandler, audit_dir: Path) -> None:
    """Also those that were queued without waiting for one another."""

    async def work() -> None:
        for number in range(20):
            await handler.arecord({"action": "A", "n": number})
        await asyncio.gather(
            *(handler.arecord({"action": "A", "n": number}) for number in range(20, 60))
        )

    run_loop(work())

    assert [entry["data"]["n"] for entry in recorded(audit_dir)] == list(range(60))


def test_the_loop_goes_on_while_the_sink_hangs(make_handler: MakeHandler) -> None:
    """Other tasks run a hundred steps while one waits for the disk."""
    sink = HangingSink()
    handler = make_handler(sink)

    async def work() -> None:
        sink.hang()
        waiting = asyncio.create_task(handler.arecord({"action": "A"}))
        await until(sink.entered.is_set)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not waiting.done()
        sink.go_on()
        await waiting

    run_loop(work())
    assert len(sink.entries) == 1


def test_the_default_executor_is_left_alone(make_handler: MakeHandler) -> None:
    """A slow disk must not starve whatever else runs there, `getaddrinfo` above all."""
    handler = make_handler(MemorySink())

    async def work() -> Any:
        await handler.arecord({"action": "A"})
        return getattr(asyncio.get_running_loop(), "_default_executor", None)

    assert run_loop(work()) is None


def test_a_failed_commit_raises_in_every_task(make_handler: MakeHandler) -> None:
    """Each has an exception of its own, and the next entry works."""
    sink = BrokenSink(refusal())
    handler = make_handler(sink)

    async def work() -> list[Any]:
        calls = (handler.arecord({"action": "A"}) for _ in range(20))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        sink.error = None
        await handler.arecord({"action": "B"})
        return answers

    answers = run_loop(work())

    assert all(isinstance(answer, AuditWriteError) for answer in answers)
    assert len(set(map(id, answers))) == 20
    assert [entry["action"] for entry in sink.entries] == ["B"]


def test_an_unusable_entry_raises_in_its_task_alone(make_handler: MakeHandler) -> None:
    """The others are recorded."""
    sink = MemorySink()
    handler = make_handler(sink)

    async def work() -> list[Any]:
        calls = (handler.arecord({"action": name} if name else {}) for name in ("A", "", "B"))
        return await asyncio.gather(*calls, return_exceptions=True)

    first, second, third = run_loop(work())

    assert isinstance(second, AuditEntryError)
    assert {first.sequence, third.sequence} == {2, 3}


def test_a_task_behind_a_stuck_sink_times_out_and_is_never_written(
    make_handler: MakeHandler,
) -> None:
    """The one that was taken says `unknown`, those in the queue say `no`, and that is true."""
    sink = HangingSink()
    handler = make_handler(sink, timeout=0.1)

    async def work() -> list[Any]:
        sink.hang()
        taken = asyncio.create_task(handler.arecord({"action": "Taken"}))
        await until(sink.entered.is_set)
        queued = [asyncio.create_task(handler.arecord({"action": "Queued"})) for _ in range(5)]
        answers = await asyncio.gather(taken, *queued, return_exceptions=True)
        sink.go_on()
        await until(lambda: handler._commits._since is None)
        await handler.arecord({"action": "After"})
        return answers

    answers = run_loop(work())

    assert [type(answer) for answer in answers] == [AuditTimeoutError] * 6
    assert [answer.persisted for answer in answers] == ["unknown", *["no"] * 5]
    assert [entry["action"] for entry in sink.entries] == ["Taken", "After"]
    gaps = [e["data"]["gap"] for e in begins(sink) if "gap" in e["data"]]
    assert [gap["failedCalls"] for gap in gaps] == [6]


def test_loops_in_threads_and_plain_threads_share_one_session(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """Three loops, three threads, operations among them."""
    structlog.configure(processors=[*audit_processors(handler=handler)])

    async def task(number: int) -> None:
        async with audit_log.operation(action="Task", number=number):
            await audit_log.ainfo(action="InTask", number=number)

    async def tasks() -> None:
        await asyncio.gather(*(task(number) for number in range(50)))

    def plain() -> None:
        for number in range(50):
            audit_log.info(action="InThread", number=number)

    answers = in_threads([lambda: asyncio.run(tasks())] * 3 + [plain] * 3)
    handler.close()

    assert answers == [None] * 6
    entries = recorded(audit_dir)
    count = {name: [e["action"] for e in entries].count(name) for name in
             ("Task", "InTask", "InThread")}  # fmt: skip
    assert count == {"Task": 300, "InTask": 150, "InThread": 150}
    assert len(session_files(audit_dir)) == 1


def test_a_loop_that_ended_meanwhile_hinders_nobody(make_handler: MakeHandler) -> None:
    """Its entry was on the way when the loop was closed; others go on."""
    sink = HangingSink()
    handler = make_handler(sink)
    sink.hang()
    loop = asyncio.new_event_loop()
    task = loop.create_task(handler.arecord({"action": "Left"}))
    loop.call_later(0.01, loop.stop)
    loop.run_forever()
    assert sink.entered.wait(HANG)
    loop._ready.clear()  # type: ignore[attr-defined]
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]

    sink.go_on()
    receipt = handler.record({"action": "After"})

    assert receipt.sequence == 3
    assert [entry["action"] for entry in sink.entries] == ["Left", "After"]
    task.get_coro().close()


def test_a_call_while_the_same_thread_holds_no_loop_raises(make_handler: MakeHandler) -> None:
    """Without a running loop there is nobody to wait for."""
    handler = make_handler(MemorySink())
    coroutine = handler.arecord({"action": "A"})

    with pytest.raises(RuntimeError, match="no running event loop"):
        coroutine.send(None)


TASKS = """
    import asyncio, os, sys
    from structlog_audit import AuditHandler, FileSink

    async def main():
        handler = AuditHandler(FileSink(sys.argv[1]))
        await asyncio.gather(*(handler.arecord({"action": "A", "n": n}) for n in range(1_000)))

    asyncio.run(main())
    os._exit(0)  # without closing, which is this thread's
"""


@pytest.mark.fault
def test_the_loops_own_thread_makes_no_system_call_on_the_audit_log(
    audit_dir: Path, tmp_path: Path
) -> None:
    """A thousand tasks: directory, file, writes and syncs are all the helper's."""
    needs("strace")
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-y", "-qq", "-e", "trace=%file,%desc", "-o", str(trace)]
    script = [sys.executable, "-c", textwrap.dedent(TASKS), str(audit_dir)]

    subprocess.run([*command, *script], check=True, timeout=HANG, env=environment())

    lines = trace.read_text(errors="replace").splitlines()
    loop = lines[0].split()[0]
    ours = [line for line in lines if str(audit_dir) in line and " execve(" not in line]
    assert len(recorded(audit_dir)) == 1_000
    assert any("fdatasync" in line for line in ours)
    assert [line for line in ours if line.split()[0] == loop] == []
