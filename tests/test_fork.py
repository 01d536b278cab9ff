"""Forked processes: a session of their own, whatever another thread did at the fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from reading import is_own, read_sessions, recorded, session_files
from running import HANG, in_child

from structlog_audit import (
    AuditHandler,
    AuditTimeoutError,
    FileSink,
    audit_log,
    audit_processors,
    settings,
)

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    # Python 3.12 warns of what is tried here on purpose
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

MakeHandler = Callable[..., AuditHandler]


class StuckInParent(FileSink):
    """Hangs in a write, in the process that made it, until `gate` opens."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.home = os.getpid()

    def write(self, lines: Sequence[bytes]) -> None:
        if os.getpid() == self.home and self._size:
            self.entered.set()
            assert self.gate.wait(HANG)
        super().write(lines)


def test_a_forked_child_begins_a_session_of_its_own(handler: AuditHandler, audit_dir: Path) -> None:
    """It names its parent's session, and the parent's goes on without it."""
    parent = handler.record({"action": "Before"})

    child = in_child(lambda: handler.record({"action": "Child"}))
    after = handler.record({"action": "After"})

    first, second = read_sessions(audit_dir)
    assert [e["action"] for e in first] == ["AuditSession", "Before", "After"]
    assert [e["action"] for e in second] == ["AuditSession", "Child"]
    assert (after.session, after.sequence) == (parent.session, 3)
    assert (child.session, child.sequence) == (second[0]["session"], 2)
    assert second[0]["pid"] != first[0]["pid"]
    assert second[0]["data"]["follows"] == {
        "session": parent.session,
        "sequence": parent.sequence,
        "hash": parent.hash,
        "ended": "fork",
    }


def test_a_child_of_a_child_begins_a_session_of_its_own(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """Three generations, three sessions, each following the one it came from."""
    handler.record({"action": "Parent"})

    def child() -> Any:
        own = handler.record({"action": "Child"})
        return own.session, in_child(lambda: handler.record({"action": "Grandchild"}).session)

    sessions = in_child(child)

    parent, second, third = read_sessions(audit_dir)
    assert sessions == (second[0]["session"], third[0]["session"])
    assert second[0]["data"]["follows"]["session"] == parent[0]["session"]
    assert third[0]["data"]["follows"]["session"] == second[0]["session"]


def test_a_child_that_records_nothing_leaves_no_trace(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """No file, and no end in the parent's file; even if it closes its handler."""
    handler.record({"action": "Parent"})

    in_child(handler.close)
    handler.record({"action": "Parent"})

    ((begin, *entries),) = read_sessions(audit_dir)
    assert is_own(begin)
    assert [entry["action"] for entry in entries] == ["Parent", "Parent"]


def test_a_child_does_not_keep_its_parents_file_open(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """The descriptor is closed in the child."""
    handler.record({"action": "Parent"})
    (path,) = session_files(audit_dir)
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc")

    def still_open() -> list[str]:
        targets = [os.readlink(d) for d in descriptors.iterdir() if d.is_symlink()]
        return [target for target in targets if target.startswith(str(audit_dir))]

    assert str(path) in still_open()
    assert in_child(still_open) == []


def test_a_fork_in_the_middle_of_another_threads_commit(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """The lead is held, callers wait, an outcome is queued: the child starts with nothing."""
    sink = StuckInParent(audit_dir)
    handler = make_handler(sink)
    handler.record({"action": "Before"})
    threads = [
        threading.Thread(target=handler.record, args=({"action": "Waiting"},)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert sink.entered.wait(HANG)
    handler.submit({"action": "Outcome"}, "Complete")

    def child() -> list[int]:
        with_outcome = handler.record({"action": "Child"})
        handler.submit({"action": "ChildOutcome"}, "Complete")
        handler.close()
        return [with_outcome.sequence]

    assert in_child(child) == [2]
    sink.gate.set()
    for thread in threads:
        thread.join(HANG)
    handler.close()

    actions = [entry["action"] for entry in recorded(audit_dir)]
    assert sorted(actions) == ["Before", "Child", "ChildOutcome", "Outcome", *["Waiting"] * 3]


def test_forks_in_a_loop_among_busy_threads(handler: AuditHandler, audit_dir: Path) -> None:
    """Whatever the other threads hold at the moment of the fork, each child records."""
    stop = threading.Event()
    made = [0] * 4

    def work(number: int) -> None:
        while not stop.is_set():
            handler.record({"action": "Parent"})
            with handler_operation(handler):
                made[number] += 1

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()

    def child() -> list[int]:
        return [handler.record({"action": "Child"}).sequence for _ in range(3)]

    answers = [in_child(child) for _ in range(30)]
    stop.set()
    for thread in threads:
        thread.join(HANG)
    handler.close()

    assert answers == [[2, 3, 4]] * 30
    actions = [entry["action"] for entry in recorded(audit_dir)]
    assert actions.count("Child") == 90
    assert actions.count("Parent") == actions.count("Outcome") == sum(made)


class handler_operation:  # noqa: N801 - reads like a function
    """Queue an outcome at the end of a block."""

    def __init__(self, handler: AuditHandler) -> None:
        self.handler = handler

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.handler.submit({"action": "Outcome"}, "Complete")


def test_a_gap_of_the_parent_is_not_the_childs(make_handler: MakeHandler, audit_dir: Path) -> None:
    """Calls that failed in the parent are told once, by the parent."""
    sink = StuckInParent(audit_dir)
    handler = make_handler(sink, timeout=0.1)
    handler.record({"action": "Before"})
    leader = threading.Thread(target=handler.record, args=({"action": "Stuck"},))
    leader.start()
    assert sink.entered.wait(HANG)
    with pytest.raises(AuditTimeoutError):
        handler.record({"action": "Late"})

    in_child(lambda: handler.record({"action": "Child"}))
    sink.gate.set()
    leader.join(HANG)
    handler.record({"action": "After"})

    gaps = [session[0]["data"].get("gap") for session in read_sessions(audit_dir)]
    assert [gap["failedCalls"] for gap in gaps if gap] == [1]


def test_operations_and_loggers_work_in_a_child(handler: AuditHandler, audit_dir: Path) -> None:
    """Configured in the parent, used in the child: what a preforking server does."""
    structlog.configure(processors=[*audit_processors(handler=handler)])
    audit_log.info(action="Parent")

    def child() -> None:
        with audit_log.operation(action="Child"):
            pass
        handler.close()

    in_child(child)

    _, session = read_sessions(audit_dir)
    assert [(e["action"], e["event"]) for e in session] == [
        ("AuditSession", "Begin"),
        ("Child", "Begin"),
        ("Child", "Complete"),
        ("AuditSession", "Complete"),
    ]


def test_an_outcome_of_a_child_is_durable_without_a_close(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """The thread that flushes outcomes is the parent's; the child starts one of its own."""
    handler.submit({"action": "Parent"}, "Complete")

    def child() -> None:
        handler.submit({"action": "Child"}, "Complete")
        patience = threading.Event()
        while handler.current is None:
            patience.wait(0.01)

    in_child(child)
    handler.close()

    assert sorted(entry["action"] for entry in recorded(audit_dir)) == ["Child", "Parent"]


def test_a_fork_while_another_thread_reads_the_settings(
    audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child can ask for the host's handler, although its lock was held at the fork."""
    monkeypatch.setenv("AUDIT_LOG_DIR", str(audit_dir))
    held, done = threading.Event(), threading.Event()
    read = settings.Settings.from_environ

    def slowly(*args: Any) -> settings.Settings:
        if threading.current_thread() is not threading.main_thread():
            held.set()
            assert done.wait(HANG)
        return read(*args)

    monkeypatch.setattr(settings.Settings, "from_environ", slowly)
    reader = threading.Thread(target=audit_processors)
    reader.start()
    assert held.wait(HANG)

    try:
        receipt = in_child(lambda: settings.audit_handler().record({"action": "Child"}))
    finally:
        done.set()
        reader.join(HANG)

    assert receipt.sequence == 2
