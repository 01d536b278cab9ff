"""The helper takes every turn that it was told to, on a busy machine and whatever interrupts it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from reading import recorded, session_files
from running import HANG, run_well

from structlog_audit.helper import Helper

ROUNDS = 20_000


@pytest.fixture
def busy() -> Iterator[None]:
    """Have more work than processors: threads are suspended anywhere, and for long."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    yield
    for hog in hogs:
        hog.kill()
        hog.wait()


def test_every_order_gets_its_turn_on_a_busy_machine(busy: None) -> None:
    """A thread suspended at the wrong instant must not sleep for ever."""
    took = threading.Semaphore(0)
    helper = Helper(lambda: took.release())  # type: ignore[func-returns-value]

    for number in range(ROUNDS):
        helper.order(0.0)
        assert took.acquire(timeout=HANG), f"turn {number} was not taken"
    helper.stop()


def test_a_turn_may_ask_for_another() -> None:
    """As often as it likes, with nobody ordering."""
    answers = iter([0.001, 0.0, 0.002, None])
    done = threading.Event()

    def turn() -> float | None:
        answer = next(answers)
        if answer is None:
            done.set()
        return answer

    helper = Helper(turn)
    helper.order(0.0)

    assert done.wait(HANG)
    helper.stop()


STORM = """
    import random, signal, sys, time
    from structlog_audit import AuditHandler, FileSink

    class Interrupted(Exception):
        pass

    def interrupt(*_):
        global armed, interrupted
        if armed:
            armed = False  # two timers may have gone off: one exception is enough
            interrupted += 1
            raise Interrupted

    armed, interrupted = False, 0
    handler = AuditHandler(FileSink(sys.argv[1]))
    signal.signal(signal.SIGALRM, interrupt)
    while interrupted < 2_000:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 1e-4))
            for _ in range(3):
                handler.submit({"action": "Storm"}, "Complete")
            armed = False
        except Interrupted:
            armed = False
        if interrupted % 50 == 0:
            handler.close()  # all is written: the next outcome has to order anew
    signal.setitimer(signal.ITIMER_REAL, 0)
    handler.submit({"action": "Last"}, "Complete")
    time.sleep(3)
    import os
    os._exit(0)  # without closing: it was written by itself, or it is not there
"""


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no such signals")
def test_outcomes_are_written_by_themselves_after_exceptions_from_signals(audit_dir: Path) -> None:
    """Two thousand times something is raised while an outcome is being queued."""
    run_well(STORM, audit_dir)

    for path in session_files(audit_dir):
        if not path.stat().st_size:  # interrupted before its first line: nothing was promised
            path.unlink()
    assert "Last" in [entry["action"] for entry in recorded(audit_dir)]


def test_what_is_ordered_while_it_goes_is_done() -> None:
    """It has rung once for both, the end and what came behind it."""
    helper = Helper(lambda: None)
    for _ in range(2_000):
        done = threading.Event()
        helper.order(lambda: None)
        helper.stop()
        helper.order(done.set)
        assert done.wait(HANG)
    helper.stop()
