"""Descriptors that change hands: closed and reused by others, shared by handlers, forked in C."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from reading import ends, is_own, read_sessions, recorded, session_files
from running import in_threads, run_well

from structlog_audit import AuditHandler, AuditWriteError, FileSink, Receipt

MakeHandler = Callable[..., AuditHandler]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs descriptors as POSIX has them")


def descriptors_of(path: Path) -> Iterator[int]:
    """Yield this process's descriptors of a file."""
    wanted = path.stat()
    for number in range(3, 1024):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(number), wanted):
                yield number


@pytest.fixture
def taken(handler: AuditHandler, audit_dir: Path, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A foreign file that took over the number of the session's descriptor."""
    handler.record({"action": "Before"})
    (session,) = session_files(audit_dir)
    (number,) = descriptors_of(session)
    path = tmp_path / "customers.db"
    foreign = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(foreign, number)
    os.close(foreign)
    yield number, path
    with contextlib.suppress(OSError):
        os.close(number)


def test_a_foreign_file_under_our_number_gets_no_entry(
    taken: tuple[int, Path], handler: AuditHandler, audit_dir: Path
) -> None:
    """Somebody closed our descriptor and opened another file: a new session takes the entry."""
    handler.record({"action": "After"})

    assert taken[1].read_bytes() == b""
    assert [entry["action"] for entry in recorded(audit_dir)] == ["Before", "After"]
    assert len(read_sessions(audit_dir)) == 2


@pytest.mark.parametrize("records", [0, 1])
def test_a_foreign_file_under_our_number_stays_open(
    records: int, taken: tuple[int, Path], handler: AuditHandler
) -> None:
    """Our end does not close what is not ours."""
    for _ in range(records):
        handler.record({"action": "After"})
    handler.close()

    assert os.path.samestat(os.fstat(taken[0]), taken[1].stat())


def test_a_descriptor_that_somebody_closed_ends_the_session(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """As a daemon does that closes every number there is; the next line tells why."""
    handler.record({"action": "Before"})
    (session,) = session_files(audit_dir)
    for number in descriptors_of(session):
        os.close(number)
    handler.record({"action": "After"})

    first, second = read_sessions(audit_dir)
    assert [entry["action"] for entry in first] == ["AuditSession", "Before"]
    assert "descriptor" in second[0]["data"]["follows"]["ended"]


CONSOLE = """
    import os, sys
    from structlog_audit import AuditHandler, AuditWriteError, ConsoleSink
    handler = AuditHandler(ConsoleSink())
    for number in range(int(sys.argv[2])):
        handler.record({"action": "Before"})
    os.close(1)
    foreign = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    assert foreign == 1
    try:
        handler.record({"action": "After"})
    except AuditWriteError as error:
        assert error.persisted == "no", error
    else:
        raise SystemExit("it was acknowledged")
    os._exit(0)
"""


@pytest.mark.parametrize("before", [0, 1])
def test_a_file_in_the_place_of_stdout_gets_no_entry(before: int, tmp_path: Path) -> None:
    """Number 1 was closed after the configuration, and the next file to be opened took it."""
    path = tmp_path / "customers.db"

    run_well(CONSOLE, path, before)

    assert path.read_bytes() == b""


def test_two_handlers_at_one_sink_do_not_write_into_each_others_session(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """One for structlog, one for logging: the second is refused until the first is closed."""
    sink = FileSink(audit_dir)
    first, second = make_handler(sink), make_handler(sink)
    first.record({"action": "A"})
    with pytest.raises(AuditWriteError, match="another handler") as refused:
        second.record({"action": "B"})
    first.record({"action": "C"})
    first.close()
    second.record({"action": "D"})
    second.close()

    assert refused.value.persisted == "no"
    assert [entry["action"] for entry in recorded(audit_dir)] == ["A", "C", "D"]
    assert ends(audit_dir) == ["closed", "closed"]


def test_threads_with_two_handlers_at_one_sink_lose_nothing(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """Whatever is refused: what was acknowledged stands in a whole session."""
    sink = FileSink(audit_dir)

    def work(handler: AuditHandler) -> list[Receipt]:
        receipts = []
        for number in range(60):
            with contextlib.suppress(AuditWriteError):
                receipts.append(handler.record({"action": "A"}))
            if number % 20 == 19:
                handler.close()
        return receipts

    pair = [make_handler(sink), make_handler(sink)]
    works = [lambda handler=handler: work(handler) for handler in pair for _ in range(2)]
    receipts = [receipt for result in in_threads(works) for receipt in result]

    told = sorted((entry["session"], entry["sequence"]) for entry in recorded(audit_dir))
    assert told == sorted((receipt.session, receipt.sequence) for receipt in receipts)
    assert told


RAW_FORKS = """
    import ctypes, mmap, os, sys
    from structlog_audit import AuditHandler, FileSink
    fork = ctypes.PyDLL(None).fork
    for _ in range(25):
        handler = AuditHandler(FileSink(sys.argv[1]))
        handler.record({"action": "A", "in": os.getpid()})
        ready = mmap.mmap(-1, 2)
        for child in range(2):
            if fork() == 0:
                ready[child] = 1
                while not ready[1 - child]:
                    os.sched_yield()
                handler.record({"action": "A", "in": os.getpid()})
                os._exit(0)
        for _ in range(2):
            assert os.wait()[1] == 0
        handler.record({"action": "A", "in": os.getpid()})
        handler.close()
"""


@pytest.mark.skipif(
    not hasattr(ctypes.PyDLL(None), "fork") or not hasattr(os, "sched_yield"),
    reason="needs the fork of a C library",
)
def test_children_that_were_forked_in_c_have_sessions_of_their_own(audit_dir: Path) -> None:
    """No hook of Python's runs there, as in uWSGI, and two children record at the same moment."""
    run_well(RAW_FORKS, audit_dir)

    sessions = read_sessions(audit_dir)
    assert len(sessions) == 75
    entries = [entry for session in sessions for entry in session if not is_own(entry)]
    assert len(entries) == 100
    assert {entry["pid"] - entry["data"]["in"] for entry in entries} == {0}
    assert ends(audit_dir).count("closed") == 25


HOOK = """
    import os, sys
    os.register_at_fork(after_in_child=lambda: handler.record({"action": "A", "in": os.getpid()}))
    from structlog_audit import AuditHandler, FileSink
    handler = AuditHandler(FileSink(sys.argv[1]))
    handler.record({"action": "A", "in": os.getpid()})
    if os.fork() == 0:
        handler.record({"action": "A", "in": os.getpid()})
        os._exit(0)
    assert os.wait()[1] == 0
    handler.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_hook_that_audits_in_the_child_before_ours_is_in_the_childs_session(
    audit_dir: Path,
) -> None:
    """It was registered before the import, so it runs first."""
    run_well(HOOK, audit_dir)

    sessions = read_sessions(audit_dir)
    entries = [entry for session in sessions for entry in session if not is_own(entry)]
    assert {entry["pid"] - entry["data"]["in"] for entry in entries} == {0}
    assert sorted(len(session) for session in sessions) == [3, 3]


HOSTILE = """
    import os, sys
    from structlog_audit import AuditHandler, FileSink
    from structlog_audit.testing import MemorySink

    class Hostile(MemorySink):
        def close(self):
            if os.getpid() != parent:
                raise SystemExit("close")

    parent = os.getpid()
    hostile = AuditHandler(Hostile())
    hostile.record({"action": "A"})
    handler = AuditHandler(FileSink(sys.argv[1]))
    handler.record({"action": "A", "in": os.getpid()})
    sys.unraisablehook = lambda *_: None
    if os.fork() == 0:
        handler.record({"action": "A", "in": os.getpid()})
        os._exit(0)
    assert os.wait()[1] == 0
    handler.close()
    hostile.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_sink_that_exits_in_the_child_does_not_leave_others_in_the_parents_session(
    audit_dir: Path,
) -> None:
    """Its `close` raises SystemExit in the fork's hook, before the next handler's turn."""
    run_well(HOSTILE, audit_dir)

    sessions = read_sessions(audit_dir)
    entries = [entry for session in sessions for entry in session if not is_own(entry)]
    assert {entry["pid"] - entry["data"]["in"] for entry in entries} == {0}
    assert len(sessions) == 2
