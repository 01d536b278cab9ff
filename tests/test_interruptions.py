"""Signals and exceptions in the middle of an audit call leave a handler that works."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from doubles import BrokenSink, HangingSink
from reading import read_lines, recorded, session_files
from running import HANG, in_threads, run_well

from structlog_audit import AuditError, AuditHandler, AuditWriteError, FileSink
from structlog_audit.testing import MemorySink

MakeHandler = Callable[..., AuditHandler]
pytestmark = pytest.mark.skipif(
    not hasattr(signal, "pthread_kill"), reason="this system has no such signals"
)


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Have SIGUSR1 call a function."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda work: signal.signal(signal.SIGUSR1, lambda *_: work())  # type: ignore[func-returns-value]
    signal.signal(signal.SIGUSR1, before)


class Interrupted(BaseException):
    """What a signal handler raises."""


def interrupt() -> None:
    raise Interrupted


class SignallingSink(MemorySink):
    """Gets a signal in the middle of its next write."""

    def __init__(self) -> None:
        super().__init__()
        self.signal = False

    def write(self, lines: Sequence[bytes]) -> None:
        if self.signal:
            self.signal = False
            signal.raise_signal(signal.SIGUSR1)
        super().write(lines)


def test_a_signal_handler_that_audits_during_a_commit_raises(
    make_handler: MakeHandler, on_signal: Callable[..., None]
) -> None:
    """It would wait for the very thread that it interrupted."""
    sink = SignallingSink()
    handler = make_handler(sink)
    caught: list[AuditError] = []

    def audit() -> None:
        try:
            handler.record({"action": "FromSignal"})
        except AuditWriteError as error:
            caught.append(error)

    on_signal(audit)
    sink.signal = True

    handler.record({"action": "A"})
    handler.record({"action": "B"})

    assert [error.persisted for error in caught] == ["no"]
    assert "signal handler" in str(caught[0])
    assert [entry["action"] for entry in sink.entries] == ["A", "B"]


def test_a_signal_handler_may_queue_an_outcome_and_ask_for_a_new_session(
    make_handler: MakeHandler, on_signal: Callable[..., None]
) -> None:
    """Neither waits for anything."""
    sink = SignallingSink()
    handler = make_handler(sink)

    def work() -> None:
        handler.submit({"action": "FromSignal"}, "Complete")
        handler.reopen()

    on_signal(work)
    sink.signal = True

    first = handler.record({"action": "A"})
    second = handler.record({"action": "B"})

    assert first.session != second.session
    handler.close()
    assert sorted(entry["action"] for entry in sink.entries) == ["A", "B", "FromSignal"]


def test_a_signal_handler_that_audits_between_calls_records(
    handler: AuditHandler, audit_dir: Path, on_signal: Callable[..., None]
) -> None:
    """Outside of a commit, a signal handler is a caller like any other."""
    on_signal(lambda: handler.record({"action": "FromSignal"}))

    signal.raise_signal(signal.SIGUSR1)

    assert [entry["action"] for entry in recorded(audit_dir)] == ["FromSignal"]


def test_an_interrupted_commit_ends_the_session_and_leaves_a_usable_handler(
    audit_dir: Path, make_handler: MakeHandler, on_signal: Callable[..., None]
) -> None:
    """Nobody can tell what was written: the next entry begins a new session and says why."""
    on_signal(interrupt)
    armed: list[bool] = []

    class Interrupting(FileSink):
        def write(self, lines: Sequence[bytes]) -> None:
            super().write(lines)
            if armed:
                armed.clear()
                signal.raise_signal(signal.SIGUSR1)

    handler = make_handler(Interrupting(audit_dir))
    before = handler.record({"action": "Before"})
    armed.append(True)

    with pytest.raises(Interrupted):
        handler.record({"action": "Cut"})
    after = handler.record({"action": "After"})

    assert after.session != before.session
    begin = read_lines((audit_dir / _name(audit_dir, after.session)).read_bytes())[0]
    assert begin["data"]["follows"]["session"] == before.session
    assert begin["data"]["follows"]["sequence"] == before.sequence
    assert "interrupted" in begin["data"]["follows"]["ended"]
    assert begin["data"]["gap"]["failedCalls"] == 1


def _name(directory: Path, session: str) -> str:
    (path,) = directory.glob(f"*{session}*")
    return path.name


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(3), Interrupted()])
def test_an_interrupted_leader_leaves_nobody_waiting(
    interruption: BaseException, make_handler: MakeHandler
) -> None:
    """Whoever shared its commit gets an error of his own, not a time-out."""
    sink = BrokenSink()
    handler = make_handler(sink, timeout=HANG * 10)
    handler.record({"action": "Before"})
    sink.error = interruption

    answers = in_threads([lambda: handler.record({"action": "A"})] * 8)
    sink.error = None
    handler.record({"action": "After"})

    assert all(isinstance(a, (AuditWriteError, type(interruption))) for a in answers), answers
    told = [a for a in answers if isinstance(a, AuditWriteError)]
    assert {error.persisted for error in told} <= {"unknown"}


def test_an_interrupted_waiter_is_not_written(
    make_handler: MakeHandler, on_signal: Callable[..., None]
) -> None:
    """The main thread waits behind a stuck leader, is interrupted, and its entry is withdrawn."""
    on_signal(interrupt)
    sink = HangingSink()
    handler = make_handler(sink, timeout=HANG * 10)
    main = threading.main_thread().ident
    assert main is not None
    leader = sink.hang_in(handler, "Leader")

    def interrupt_the_waiter() -> None:
        patience = threading.Event()
        while not handler._commits._queue:
            patience.wait(0.001)
        patience.wait(0.05)
        signal.pthread_kill(main, signal.SIGUSR1)

    helper = threading.Thread(target=interrupt_the_waiter)
    helper.start()
    with pytest.raises(Interrupted):
        handler.record({"action": "Waiter"})
    helper.join(HANG)
    sink.go_on()
    leader.join(HANG)
    handler.record({"action": "After"})

    assert [entry["action"] for entry in sink.entries] == ["Leader", "After"]


STORM = """
    import random, signal, sys, threading
    from structlog_audit import AuditError, AuditHandler, AuditTimeoutError, FileSink

    class Interrupted(Exception):
        pass

    def interrupt(*_):
        global interrupted
        if armed:
            interrupted += 1
            raise Interrupted

    armed, interrupted, calls, stop = False, 0, 0, False
    handler = AuditHandler(FileSink(sys.argv[1]), timeout=10)
    stuck = []

    def work():
        while not stop:
            try:
                handler.record({"action": "Other"})
            except AuditTimeoutError as error:
                stuck.append(error)
            except AuditError:
                pass  # shared a commit that was interrupted

    threads = [threading.Thread(target=work, daemon=True) for _ in range(int(sys.argv[2]))]
    for thread in threads:
        thread.start()
    signal.signal(signal.SIGALRM, interrupt)
    while interrupted < 400 and not stuck:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 5e-4))
            for _ in range(10):
                handler.record({"action": "Main"})
            armed = False
        except Interrupted:
            armed = False
        except AuditError as error:
            armed = False
            if "interrupted" not in str(error) and "Interrupted" not in str(error):
                stuck.append(error)
    stop = True
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert not stuck, stuck
    for thread in threads:
        thread.join()
    for _ in range(3):
        handler.record({"action": "Last"})
    handler.close()
    print("usable")
"""


@pytest.mark.parametrize("threads", [0, 3])
def test_exceptions_from_signals_at_any_point_leave_a_usable_handler(
    threads: int, audit_dir: Path
) -> None:
    """A time limit that raises anywhere in a call, hundreds of times, alone and among threads."""
    assert run_well(STORM, audit_dir, threads) == "usable\n"

    for path in session_files(audit_dir):
        if not path.stat().st_size:  # interrupted before its first line: nothing was promised
            path.unlink()
    assert [e["action"] for e in recorded(audit_dir)].count("Last") == 3
