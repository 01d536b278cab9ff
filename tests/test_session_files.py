"""Session files: names, modes, rotation, and what happens when somebody meddles with them."""

from __future__ import annotations

import datetime
import errno
import itertools
import os
import re
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from doubles import HangingSink
from reading import ends, is_own, only_file, read_session, read_sessions, recorded, session_files
from running import HANG, eventually, run_python, run_well

from structlog_audit import (
    AuditConfigurationError,
    AuditHandler,
    AuditWriteError,
    FileSink,
    reopen_on_signal,
    session,
)

MakeHandler = Callable[..., AuditHandler]
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes and links")


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """Set the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_a_file_is_named_by_prefix_date_and_session(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """`PREFIX-YYYYMMDD-SESSION.ndjson`, UTC."""
    days = {today()}
    receipt = make_handler(FileSink(audit_dir, "shop.v1_a-b")).record({"action": "A"})
    days.add(today())

    names = {f"shop.v1_a-b-{day}-{receipt.session}.ndjson" for day in days}
    assert only_file(audit_dir).name in names
    assert re.fullmatch("[a-z0-9]{20}", receipt.session)


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d")


@pytest.mark.parametrize(
    "prefix",
    [5, None, b"audit", "", "a/b", "../x", "a\\b", ".hidden", "a b", "a\nb", "a\0b", "ä", "a" * 65],
)
def test_a_prefix_that_is_no_plain_name_is_refused(prefix: Any, audit_dir: Path) -> None:
    """Above all one with a path separator."""
    with pytest.raises(AuditConfigurationError, match="prefix"):
        FileSink(audit_dir, prefix)


def test_a_directory_may_be_given_as_bytes(audit_dir: Path) -> None:
    """As `os.fsencode` and others give it."""
    handler = AuditHandler(FileSink(os.fsencode(audit_dir)))  # type: ignore[arg-type]

    handler.record({"action": "A"})
    handler.close()

    assert len(recorded(audit_dir)) == 1


@posix
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_files_and_directories_are_their_owners_alone(
    mask: int, audit_dir: Path, handler: AuditHandler, umask: Callable[[int], int]
) -> None:
    """0600 and 0700 whatever the umask; of the journal as well."""
    umask(mask)
    nested = AuditHandler(FileSink(audit_dir / "a" / "b"))

    nested.record({"action": "A"})
    nested.close()

    modes = [stat.S_IMODE(path.stat().st_mode) for path in sorted(audit_dir.rglob("*"))]
    assert modes == [0o700, 0o700, 0o600, 0o600]
    assert stat.S_IMODE(audit_dir.stat().st_mode) == 0o700


def test_a_file_is_never_opened_twice(
    handler: AuditHandler, audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should a session's name be taken already, the call raises; the next one takes another."""
    first = handler.record({"action": "A"})
    handler.close()
    content = only_file(audit_dir).read_bytes()
    names = iter([first.session, "b" * 20])
    monkeypatch.setattr(session, "new_session_id", lambda: next(names))

    with pytest.raises(AuditWriteError) as caught:
        handler.record({"action": "B"})
    handler.record({"action": "C"})

    assert (caught.value.errno, caught.value.persisted) == (errno.EEXIST, "no")
    assert next(audit_dir.glob(f"*{first.session}*")).read_bytes() == content
    assert [entry["action"] for entry in recorded(audit_dir)] == ["A", "C"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fdinfo"), reason="needs Linux's /proc")
def test_a_file_is_open_for_appending_and_not_inherited(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """Nobody who truncates it makes us leave a hole; no child process keeps it open."""
    handler.record({"action": "A"})
    path = str(only_file(audit_dir))
    (number,) = [
        int(d.name)
        for d in Path("/proc/self/fd").iterdir()
        if d.is_symlink() and os.readlink(d) == path
    ]

    text = Path(f"/proc/self/fdinfo/{number}").read_text()

    flags = int(re.findall(r"flags:\s+(\d+)", text)[0], 8)
    assert flags & os.O_APPEND
    assert flags & os.O_ACCMODE == os.O_WRONLY
    assert not os.get_inheritable(number)


@posix
def test_a_link_under_the_files_name_is_not_followed(
    handler: AuditHandler, audit_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone who guessed the name cannot lead the entries elsewhere."""
    monkeypatch.setattr(session, "new_session_id", lambda: "c" * 20)
    audit_dir.mkdir(0o700)
    elsewhere = tmp_path / "elsewhere"
    (audit_dir / f"audit-{today()}-{'c' * 20}.ndjson").symlink_to(elsewhere)

    with pytest.raises(AuditWriteError):
        handler.record({"action": "A"})

    assert not elsewhere.exists()


def test_the_first_line_tells_of_the_session_itself(handler: AuditHandler, audit_dir: Path) -> None:
    """Format, library; and nothing of a session before it, as there was none."""
    receipt = handler.record({"action": "A"})
    handler.close()

    begin, entry, complete = read_session(only_file(audit_dir))
    assert set(begin["data"]) == {"format", "library"}
    assert begin["data"]["library"].startswith("structlog-audit ")
    assert (receipt.sequence, entry["event"]) == (2, "Record")
    assert complete["event"] == "Complete"
    assert complete["data"] == {"reason": "closed", "entries": 3}


def test_a_session_of_which_nothing_was_written_leaves_no_trace(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """Made, asked, closed: no directory, no file."""
    handler.flush()
    handler.close()
    handler.close()

    assert not audit_dir.exists()


def test_a_check_leaves_no_file(handler: AuditHandler, audit_dir: Path) -> None:
    """Only the directory that it made."""
    handler.check()

    assert list(audit_dir.iterdir()) == []


def test_a_closed_handler_begins_another_session(handler: AuditHandler, audit_dir: Path) -> None:
    """It names the one before it, which ended cleanly."""
    first = handler.record({"action": "A"})
    handler.close()
    second = handler.record({"action": "B"})
    handler.close()

    sessions = read_sessions(audit_dir)
    assert [s[0]["session"] for s in sessions] == [first.session, second.session]
    follows = sessions[1][0]["data"]["follows"]
    assert (follows["session"], follows["ended"]) == (first.session, "closed")
    assert follows["sequence"] == sessions[0][-1]["sequence"]
    assert ends(audit_dir) == ["closed", "closed"]


def test_a_session_ends_before_it_grows_too_big(make_handler: MakeHandler, audit_dir: Path) -> None:
    """Rotation by size: files stay below the limit but for their own last line."""
    handler = make_handler(max_bytes=4_000)

    for number in range(40):
        handler.record({"action": "A", "number": number, "text": "x" * 200})

    sessions = read_sessions(audit_dir)
    assert len(sessions) > 3
    assert set(ends(audit_dir)[:-1]) == {"max_bytes"}
    assert [e["data"]["number"] for e in recorded(audit_dir)] == list(range(40))
    for before, after in itertools.pairwise(sessions):
        assert after[0]["data"]["follows"]["session"] == before[0]["session"]
    assert all(path.stat().st_size < 4_000 + 600 for path in session_files(audit_dir))


def test_a_session_ends_when_it_is_old(
    make_handler: MakeHandler, audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotation by age, with the next entry."""
    handler = make_handler(max_age=100)
    handler.record({"action": "A"})
    handler.record({"action": "B"})
    now = session.monotonic()
    monkeypatch.setattr(session, "monotonic", lambda: now + 101)

    handler.record({"action": "C"})

    assert [len(s) for s in read_sessions(audit_dir)] == [4, 2]
    assert ends(audit_dir) == ["max_age", None]


def test_reopen_ends_the_session_before_the_next_entry(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """What a log rotator asks for."""
    first = handler.record({"action": "A"})
    handler.reopen()
    second = handler.record({"action": "B"})

    assert first.session != second.session
    assert ends(audit_dir) == ["reopen", None]


def test_reopen_without_a_session_changes_nothing(handler: AuditHandler, audit_dir: Path) -> None:
    """It is not remembered for a session that began afterwards."""
    handler.reopen()
    handler.record({"action": "A"})
    handler.record({"action": "B"})

    assert len(read_sessions(audit_dir)) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_sighup_reopens_and_calls_who_was_there_before(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """The helper leaves other handlers of the signal their turn."""
    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, frame: heard.append(number))
    try:
        reopen_on_signal(handler)
        first = handler.record({"action": "A"})
        signal.raise_signal(signal.SIGHUP)
        second = handler.record({"action": "B"})
    finally:
        signal.signal(signal.SIGHUP, before)

    assert first.session != second.session
    assert heard == [signal.SIGHUP]


def test_a_directory_becomes_absolute_when_it_is_named(
    make_handler: MakeHandler, audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later `chdir` does not move the audit log."""
    monkeypatch.chdir(audit_dir.parent)
    handler = make_handler(FileSink("audit"))
    (audit_dir.parent / "other").mkdir()
    monkeypatch.chdir(audit_dir.parent / "other")

    handler.record({"action": "A"})

    assert len(recorded(audit_dir)) == 1


@pytest.mark.parametrize("directory", ["", "a\0b"])
def test_a_directory_without_a_usable_name_is_refused(directory: str) -> None:
    """When the sink is made."""
    with pytest.raises(AuditConfigurationError, match="directory"):
        FileSink(directory)


def test_a_torn_file_of_an_older_run_hinders_nobody(handler: AuditHandler, audit_dir: Path) -> None:
    """It is left as it is."""
    audit_dir.mkdir(0o700)
    torn = audit_dir / f"audit-20200101-{'t' * 20}.ndjson"
    torn.write_bytes(b'{"level":35,"ti')

    receipt = handler.record({"action": "A"})

    assert torn.read_bytes() == b'{"level":35,"ti'
    assert [e["action"] for e in read_session(*audit_dir.glob(f"*{receipt.session}*"))][1:] == ["A"]


def test_two_handlers_in_one_directory_do_not_meet(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """Each has files of its own."""
    one, two = make_handler(), make_handler()
    for _ in range(5):
        one.record({"action": "One"})
        two.record({"action": "Two"})

    actions = [{e["action"] for e in s if not is_own(e)} for s in read_sessions(audit_dir)]
    assert sorted(map(str, actions)) == ["{'One'}", "{'Two'}"]


def test_a_process_that_ends_cleanly_ends_its_session(audit_dir: Path) -> None:
    """Without anybody closing anything."""
    run_well(
        """
        import structlog, structlog_audit
        structlog.configure(processors=[*structlog_audit.audit_processors()])
        structlog_audit.audit_log.info(action="A")
        """,
        AUDIT_LOG_DIR=str(audit_dir),
    )

    assert ends(audit_dir) == ["closed"]


def test_a_lost_handler_warns_and_ends_its_session(audit_dir: Path) -> None:
    """Nobody refers to it any more: its outcomes and its last line are written all the same."""
    lost: Any = AuditHandler(FileSink(audit_dir))
    lost.record({"action": "A"})
    lost.submit({"action": "B"}, "Complete")

    with pytest.warns(ResourceWarning, match="not closed"):
        del lost

    eventually(lambda: ends(audit_dir) == ["closed"])
    assert [entry["action"] for entry in recorded(audit_dir)] == ["A", "B"]


def test_a_lost_handler_is_ended_although_warnings_are_errors(audit_dir: Path) -> None:
    """`python -W error`."""
    run_python(
        """
        import sys, warnings
        from structlog_audit import AuditHandler, FileSink
        warnings.simplefilter("error")
        lost = AuditHandler(FileSink(sys.argv[1]))
        lost.submit({"action": "A"}, "Complete")
        del lost
        """,
        audit_dir,
    )

    assert [entry["action"] for entry in recorded(audit_dir)] == ["A"]
    assert ends(audit_dir) == ["closed"]


def test_a_lost_handler_whose_sink_hangs_does_not_stop_whoever_lost_it() -> None:
    """The collector may strike in any thread; the helper waits instead."""
    sink = HangingSink()
    lost: Any = AuditHandler(sink)
    sink.hang()
    lost.submit({"action": "A"}, "Complete")
    assert sink.entered.wait(HANG)

    def lose() -> None:
        nonlocal lost
        del lost

    with pytest.warns(ResourceWarning, match="not closed"):
        lose()
    assert sink.entries == []
    sink.go_on()

    eventually(lambda: len(sink.lines) == 3)  # Begin, A, Complete


def test_a_handler_says_where_it_stands(handler: AuditHandler, audit_dir: Path) -> None:
    """In a debugger: session, sequence, sink."""
    assert repr(handler) == f"<AuditHandler no session sink=FileSink({str(audit_dir)!r})>"

    receipt = handler.record({"action": "A"})

    assert f"session={receipt.session} sequence=2 " in repr(handler)
