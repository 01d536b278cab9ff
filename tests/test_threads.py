"""Threads share commits: nothing interleaved, nothing lost, nothing twice."""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from doubles import BrokenSink, CountingSink, HangingSink, SendingSink, begins
from reading import read_lines, read_sessions, recorded, session_files
from running import HANG, eventually, in_threads, run_loop

from structlog_audit import (
    AuditEntryError,
    AuditHandler,
    AuditTimeoutError,
    AuditWriteError,
    Receipt,
    commit,
)
from structlog_audit.testing import MemorySink

MakeHandler = Callable[..., AuditHandler]


def test_threads_leave_one_unbroken_session(handler: AuditHandler, audit_dir: Path) -> None:
    """Every receipt names a line of its own, each thread's entries stand in its order."""

    def work(thread: int) -> list[Receipt]:
        return [handler.record({"action": "A", "thread": thread, "n": n}) for n in range(40)]

    answers = in_threads([lambda thread=thread: work(thread) for thread in range(12)])

    (session,) = read_sessions(audit_dir)
    (path,) = session_files(audit_dir)
    lines = path.read_bytes().split(b"\n")
    order = defaultdict(list)
    for entry in session[1:]:
        order[entry["data"]["thread"]].append(entry["data"]["n"])
    assert order == {thread: list(range(40)) for thread in range(12)}
    receipts = [receipt for answer in answers for receipt in answer]
    assert len({receipt.sequence for receipt in receipts}) == 12 * 40
    for receipt in receipts:
        line = lines[receipt.sequence - 1]
        assert hashlib.sha256(line).hexdigest() == receipt.hash
        assert session[receipt.sequence - 1]["time"] == receipt.time


def while_it_hangs(
    handler: AuditHandler, sink: HangingSink, works: list[Callable[[], Any]]
) -> list[Any]:
    """Have a commit hang, let calls queue up behind it, go on; return their answers."""
    sink.hang()
    first = threading.Thread(target=handler.record, args=({"action": "First"},))
    first.start()
    assert sink.entered.wait(HANG)
    answers: list[Any] = []
    callers = threading.Thread(target=lambda: answers.extend(in_threads(works)))
    callers.start()
    wait_until_queued(handler, len(works))
    sink.go_on()
    callers.join(HANG)
    first.join(HANG)
    return answers


def wait_until_queued(handler: AuditHandler, number: int) -> None:
    """Wait until so many calls stand in the queue."""
    patience = threading.Event()
    while len(handler._commits._queue) < number:
        patience.wait(0.001)


def test_calls_that_wait_share_the_next_commit(make_handler: MakeHandler) -> None:
    """Thirty callers behind a slow write: one write for all of them."""
    sink = HangingSink()
    handler = make_handler(sink)
    batches: list[int] = []
    write = sink.write
    sink.write = lambda lines: (batches.append(len(lines)), write(lines))  # type: ignore[method-assign]

    answers = while_it_hangs(handler, sink, [lambda: handler.record({"action": "A"})] * 30)

    assert batches == [2, 30]  # the session's own first line and the first entry, then the others
    assert sorted(receipt.sequence for receipt in answers) == list(range(3, 33))


def test_an_uncontended_call_costs_one_write(make_handler: MakeHandler) -> None:
    """No timer, no second write for the session's own first line."""
    sink = CountingSink()
    handler = make_handler(sink)

    for _ in range(5):
        handler.record({"action": "A"})

    assert (sink.opens, sink.writes) == (1, 5)


def test_one_bad_entry_fails_alone(make_handler: MakeHandler) -> None:
    """An entry without an action and a big one, among the others of a batch."""
    sink = HangingSink()
    handler = make_handler(sink)
    good = [lambda: handler.record({"action": "Good"})] * 10
    big = [lambda: handler.record({"action": "Big", "text": "x" * 9_000_000})] * 2

    with pytest.raises(AuditEntryError):
        handler.record({"noaction": 1})
    answers = while_it_hangs(handler, sink, good + big)

    assert all(isinstance(answer, Receipt) for answer in answers)
    assert [e["action"] for e in sink.entries].count("Good") == 10
    assert [e["action"] for e in sink.entries].count("Big") == 2


def test_many_big_entries_go_in_several_commits(
    make_handler: MakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is bounded in bytes; whoever does not fit in goes with the next."""
    monkeypatch.setattr(commit, "MAX_BATCH_BYTES", 5_000)
    sink = HangingSink()
    handler = make_handler(sink)
    big = [lambda: handler.record({"action": "Big", "text": "x" * 4_000})] * 12

    answers = while_it_hangs(handler, sink, big)

    assert sorted(receipt.sequence for receipt in answers) == list(range(3, 15))
    assert len(read_lines(b"".join(sink.lines))) == 14


def test_a_failed_commit_fails_all_its_callers_and_the_next_call_works(
    make_handler: MakeHandler,
) -> None:
    """Each caller gets an exception of its own; the gap says how many there were."""
    sink = BrokenSink()
    handler = make_handler(sink)
    handler.record({"action": "Before"})
    sink.error = OSError(5, "no more")

    answers = in_threads([lambda: handler.record({"action": "A"})] * 20)
    sink.error = None
    handler.record({"action": "After"})

    assert all(type(answer) is AuditWriteError for answer in answers)
    assert len(set(map(id, answers))) == 20
    begin = begins(sink)[-1]
    assert begin["data"]["gap"]["failedCalls"] == 20


def test_who_waits_behind_a_stuck_sink_times_out_and_is_never_written(
    make_handler: MakeHandler,
) -> None:
    """The time-out is told with `persisted="no"`, and that stays true after the sink recovered."""
    sink = HangingSink()
    handler = make_handler(sink, timeout=0.1)
    leader = sink.hang_in(handler, "Stuck")

    answers = in_threads([lambda: handler.record({"action": "Late"})] * 5)
    sink.go_on()
    leader.join(HANG)
    handler.record({"action": "After"})

    assert all(isinstance(answer, AuditTimeoutError) for answer in answers)
    assert {answer.persisted for answer in answers} == {"no"}
    assert [entry["action"] for entry in sink.entries] == ["Stuck", "After"]
    begin = begins(sink)[-1]
    assert begin["data"]["gap"]["failedCalls"] == 5
    assert "0.1 s" in begin["data"]["gap"]["reason"]


def test_a_call_that_was_taken_by_a_stuck_leader_says_unknown(make_handler: MakeHandler) -> None:
    """Its line may yet be written, so the error does not claim that it was not."""
    sink = HangingSink()
    late: list[Any] = []

    def note(error: Exception) -> None:
        late.append(error)
        if len(late) == 3:
            sink.go_on()

    handler = make_handler(sink, timeout=1, on_failure=note)
    first_write = threading.Event()
    write = sink.write

    def hang_again(lines: Sequence[bytes]) -> None:
        write(lines)
        if not first_write.is_set():
            first_write.set()
            sink.hang()

    sink.write = hang_again  # type: ignore[method-assign]

    answers = while_it_hangs(handler, sink, [lambda: handler.record({"action": "Late"})] * 4)

    assert [type(error) for error in late] == [AuditTimeoutError] * 3
    assert {error.persisted for error in late} == {"unknown"}
    assert len([answer for answer in answers if isinstance(answer, Receipt)]) == 1
    assert len(sink.entries) == 5


def test_new_calls_fail_at_once_while_the_sink_is_stuck(
    make_handler: MakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an hour's time-out that is over for the leader, a new caller does not wait an hour."""
    sink = HangingSink()
    handler = make_handler(sink, timeout=3600)
    leader = sink.hang_in(handler, "Stuck")
    now = commit.monotonic()
    monkeypatch.setattr(commit, "monotonic", lambda: now + 4000)

    (answer,) = in_threads([lambda: handler.record({"action": "New"})])

    sink.go_on()
    leader.join(HANG)
    assert isinstance(answer, AuditTimeoutError)
    assert answer.persisted == "no"


def test_an_audit_call_from_within_a_sink_raises_instead_of_waiting_for_itself(
    make_handler: MakeHandler,
) -> None:
    """A sink that logs what it does, by way of the audit log, gets an error and no deadlock."""

    class Chatty(MemorySink):
        def write(self, lines: Sequence[bytes]) -> None:
            with pytest.raises(AuditWriteError, match="within a commit") as caught:
                handler.record({"action": "Chat"})
            assert caught.value.persisted == "no"
            super().write(lines)

    sink = Chatty()
    handler = make_handler(sink)

    (answer,) = in_threads([lambda: handler.record({"action": "A"})])

    assert answer.sequence == 2
    assert [entry["action"] for entry in sink.entries] == ["A"]


def test_a_sink_may_record_at_another_handler(make_handler: MakeHandler) -> None:
    """Only one's own commit is refused."""

    class Copying(MemorySink):
        def write(self, lines: Sequence[bytes]) -> None:
            other.record({"action": "Copy"})
            super().write(lines)

    other = make_handler(MemorySink())
    handler = make_handler(Copying())

    (answer,) = in_threads([lambda: handler.record({"action": "A"})])

    assert answer.sequence == 2
    other.close()
    handler.close()


def test_closing_among_threads_loses_nothing(handler: AuditHandler, audit_dir: Path) -> None:
    """`close` ends a session; whoever comes later begins another, and all are whole."""
    works: list[Callable[[], Any]] = [
        lambda: [handler.record({"action": "A"}) for _ in range(20)] for _ in range(6)
    ]

    answers = in_threads([*works, lambda: [handler.close() for _ in range(10)]])

    assert sum(len(answer) for answer in answers[:6]) == 120
    assert len(recorded(audit_dir)) == 120


@pytest.mark.parametrize("tells", [True, False])
def test_who_is_durable_returns_although_the_next_commit_hangs(
    make_handler: MakeHandler, tells: bool
) -> None:
    """The next leader wakes them when its lines are sent; or they look for themselves."""
    sink = SendingSink(tells=tells)
    handler = make_handler(sink, timeout=HANG)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(handler.record, {"action": "First"})
        eventually(lambda: sink.writes == 1)
        leads = pool.submit(handler.record, {"action": "Leads"})
        eventually(lambda: len(handler._commits._queue) == 1)
        follows = pool.submit(handler.record, {"action": "Follows"})
        awaits = pool.submit(run_loop, handler.arecord({"action": "Awaits"}))
        eventually(lambda: len(handler._commits._queue) == 3)
        sink.permits.release()
        eventually(lambda: sink.writes == 2)
        hangs = pool.submit(handler.record, {"action": "Hangs"})
        eventually(lambda: len(handler._commits._queue) == 1)
        sink.permits.release()

        receipts = [call.result(HANG) for call in (first, leads, follows, awaits)]

        assert sink.writes == 3
        assert not hangs.done()
        assert [receipt.sequence for receipt in receipts] == [2, 3, 4, 5]
        sink.permits.release()
        assert hangs.result(HANG).sequence == 6
        sink.permits.release()  # for the session's end
