"""The journal, broken from outside: each of its system calls, its place, its lock."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from faults.checker import check_run, read_files
from faults.disks import NOBODY, linux, needs_root, small_disk
from faults.runner import JOURNAL, PATIENCE, environment, needs, run, run_traced
from faults.table import CALLS, FAULTS, JOURNAL_POINTS, NAMED, Point, prepare, run_case
from reading import journal_path, read_journal, recorded, session_files

from structlog_audit import AuditConfigurationError, AuditHandler, AuditWriteError, journal
from structlog_audit.sinks._lock import try_lock, unlock

strace = pytest.mark.fault


@strace
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("point", JOURNAL_POINTS, ids=str)
def test_what_was_acknowledged_is_entered_and_what_failed_raised(
    point: Point, fault: str, tmp_path: Path
) -> None:
    """One system call fails, or the process dies there; the promise holds, the next start works."""
    run_case(point, fault, tmp_path)


@strace
@pytest.mark.parametrize("taken", [0, 1, 100])
@pytest.mark.parametrize(
    "name", ["first write of the journal", "write of an end", "write of a begin", "last end"]
)
def test_a_short_write_of_the_journal_is_cut_off(name: str, taken: int, tmp_path: Path) -> None:
    """The kernel takes fewer bytes than it was given; nothing is glued to them."""
    run_case(NAMED[name], f"short {taken}", tmp_path)


@strace
@pytest.mark.parametrize(
    ("verb", "when", "record"),
    [("fsync", 4, 0), ("fsync", 5, 0), ("fdatasync", 4, None), ("fdatasync", 5, 3)],
)
def test_a_sync_of_the_journal_that_was_done_and_reported_as_failed_counts_as_failed(
    verb: str, when: int, record: int | None, tmp_path: Path
) -> None:
    """It is cut, the session's file is removed, and so the entry is not stored."""
    directory = prepare(tmp_path)
    result = run_traced(
        directory, tmp_path / "journal", calls=CALLS, pretend=[verb, when], reopen=[3]
    )
    expected = [] if record is None else [(record, "no")]  # nobody fails with an end
    assert [(line["error"], line["persisted"]) for line in result.errors] == expected
    check_run(result)


@strace
def test_each_process_makes_the_name_of_the_journal_durable_for_itself(tmp_path: Path) -> None:
    """Whoever made the file may have been killed before that."""
    directory = prepare(tmp_path)
    run_traced(directory, tmp_path / "journal", calls=1)
    result = run_traced(directory, tmp_path / "again", names="m", calls=1)

    paths = [(call.name, call.path) for call in result.trace if call.name in ("write", "fsync")]
    written = paths.index(("write", str(directory / JOURNAL)))
    assert paths[written + 1 : written + 3] == [
        ("fsync", str(directory / JOURNAL)),
        ("fsync", str(directory)),
    ]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a session's file, and for nothing else."""
    with small_disk(tmp_path / "disk") as place:
        place.mkdir(0o700)
        place.with_name("big").write_bytes(b"x" * 15 * 4096)
        yield place


def test_a_disk_without_room_for_the_journal_takes_no_entry(
    tiny_disk: Path, tmp_path: Path
) -> None:
    """No session file is left, and no more than an empty journal; with room, it goes on."""
    result = run(tiny_disk, tmp_path / "journal", calls=20)
    assert {(line["errno"], line["persisted"]) for line in result.errors} == {(28, "no")}
    assert len(result.errors) == 20
    assert JOURNAL in result.errors[0]["text"]
    assert [(path.name, path.stat().st_size) for path in tiny_disk.iterdir()] == [(JOURNAL, 0)]

    (tiny_disk.parent / "big").unlink()
    again = run(tiny_disk, tmp_path / "again", calls=2)
    assert len(again.acknowledged) == 2
    check_run(again)


@linux
def test_a_file_size_limit_on_the_journal_fails_the_call(tmp_path: Path) -> None:
    """A real short write: what was written of the line is cut off again."""
    directory = prepare(tmp_path)
    for first in range(12):
        run(directory, tmp_path / "journal", calls=1, first=first)
    size = (directory / JOURNAL).stat().st_size
    before = read_files(directory).keys()

    limits = {"FSIZE": size + 20}
    result = run(directory, tmp_path / "journal", calls=3, first=100, limits=limits)

    assert [line["persisted"] for line in result.errors] == ["no"] * 3
    assert JOURNAL in result.errors[0]["text"]
    assert (directory / JOURNAL).stat().st_size == size
    assert read_files(directory).keys() == before
    check_run(result)
    check_run(run(directory, tmp_path / "again", calls=3, first=200))


def _a_directory(path: Path) -> None:
    path.mkdir()


def _a_link(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))


def _a_link_to_a_file(path: Path) -> None:
    path.with_name("elsewhere").touch()
    path.symlink_to(path.with_name("elsewhere"))


def _a_fifo(path: Path) -> None:
    os.mkfifo(path)


IN_PLACE = [_a_directory, _a_link, _a_link_to_a_file, _a_fifo]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX links")
@pytest.mark.parametrize("put", IN_PLACE)
def test_what_stands_in_the_place_of_the_journal_fails_the_call(
    put: Callable[[Path], None], handler: AuditHandler, audit_dir: Path
) -> None:
    """At the check and at the call; it is left alone, no session file is left, and nobody hangs."""
    audit_dir.mkdir(0o700)
    path = journal_path(audit_dir)
    put(path)

    with pytest.raises(AuditConfigurationError, match="journal"):
        handler.check()
    for _ in range(2):
        with pytest.raises(AuditWriteError, match="journal") as caught:
            handler.record({"action": "A"})
        assert caught.value.persisted == "no"
    assert session_files(audit_dir) == []
    elsewhere = path.with_name("elsewhere")
    assert elsewhere.exists() is (put is _a_link_to_a_file)
    assert not elsewhere.exists() or elsewhere.read_bytes() == b""

    path.rmdir() if path.is_dir() else path.unlink()
    handler.record({"action": "B"})
    assert [entry["action"] for entry in recorded(audit_dir)] == ["B"]
    assert [entry["event"] for entry in read_journal(audit_dir)] == ["Journal", "Open"]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX links")
@pytest.mark.parametrize("put", IN_PLACE)
def test_what_takes_the_place_of_the_journal_costs_no_entry_of_the_session(
    put: Callable[[Path], None], handler: AuditHandler, audit_dir: Path
) -> None:
    """The session goes on; its end cannot be entered, and is when the next one begins."""
    handler.record({"action": "A"})
    path = journal_path(audit_dir)
    path.rename(path.with_name("aside"))
    put(path)
    handler.record({"action": "B"})
    handler.reopen()
    with pytest.raises(AuditWriteError, match="journal") as caught:
        handler.record({"action": "C"})
    assert caught.value.persisted == "no"

    path.rmdir() if path.is_dir() else path.unlink()
    path.with_name("aside").rename(path)
    handler.record({"action": "D"})

    assert [entry["action"] for entry in recorded(audit_dir)] == ["A", "B", "D"]
    told = [entry["event"] for entry in read_journal(audit_dir)]
    assert told == ["Journal", "Open", "Close", "Open"]


def test_a_journal_that_refuses_an_ordinary_user_fails_the_call(tmp_path: Path) -> None:
    """It belongs to another user, as after one start as root."""
    needs_root()
    with TemporaryDirectory() as place:  # pytest's own directories let no other user in
        os.chmod(place, 0o755)
        directory = Path(place, "audit")
        directory.mkdir(mode=0o700)
        run(directory, tmp_path / "journal", calls=1)
        os.chown(directory, NOBODY, NOBODY)
        before = sorted(directory.iterdir())
        result = run(directory, tmp_path / "journal", calls=2, limits={"uid": NOBODY})
        assert sorted(directory.iterdir()) == before
    assert [(line["errno"], line["persisted"]) for line in result.errors] == [(13, "no")] * 2
    assert JOURNAL in result.errors[0]["text"]


@pytest.fixture
def locked(audit_dir: Path) -> Iterator[int]:
    """A journal that somebody has locked, and does not give up."""
    audit_dir.mkdir(0o700)
    descriptor = os.open(journal_path(audit_dir), os.O_RDWR | os.O_CREAT, 0o600)
    assert try_lock(descriptor)
    yield descriptor
    with suppress(OSError):
        os.close(descriptor)


def test_a_lock_that_is_never_given_up_fails_the_call(
    locked: int, handler: AuditHandler, audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while; no session file is left, and when it is given up, the next call works."""
    monkeypatch.setattr(journal, "PATIENCE", 0.2)
    for _ in range(2):
        with pytest.raises(AuditWriteError, match="locked for") as caught:
            handler.record({"action": "A"})
        assert caught.value.persisted == "no"
    assert session_files(audit_dir) == []

    unlock(locked)
    handler.record({"action": "B"})

    assert [entry["action"] for entry in recorded(audit_dir)] == ["B"]


def test_a_lock_that_is_given_up_soon_is_waited_for(
    locked: int, handler: AuditHandler, audit_dir: Path
) -> None:
    """Another process was at work, or its file was taken away meanwhile."""
    path = journal_path(audit_dir)
    timer = threading.Timer(0.2, path.unlink)
    timer.start()
    handler.record({"action": "A"})
    timer.join()

    assert [entry["event"] for entry in read_journal(audit_dir)] == ["Journal", "Open"]


def test_the_end_of_a_session_waits_for_a_lock_and_is_entered_later(
    handler: AuditHandler, audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was acknowledged is durable; nobody's call fails with it."""
    monkeypatch.setattr(journal, "PATIENCE", 0.2)
    handler.record({"action": "A"})
    descriptor = os.open(journal_path(audit_dir), os.O_RDWR)
    assert try_lock(descriptor)
    handler.close()
    os.close(descriptor)
    handler.record({"action": "B"})

    told = [entry["event"] for entry in read_journal(audit_dir)]
    assert told == ["Journal", "Open", "Close", "Open"]


@strace
def test_a_file_system_without_locks_is_refused_at_the_check(
    audit_dir: Path, tmp_path: Path
) -> None:
    """As some network mounts are: not only the first entry tells of it."""
    needs("strace")
    script = """
        import sys
        from structlog_audit import AuditConfigurationError, AuditHandler, AuditWriteError, FileSink
        handler = AuditHandler(FileSink(sys.argv[1]))
        for call in (handler.check, lambda: handler.record({"action": "A"})):
            try:
                call()
            except (AuditConfigurationError, AuditWriteError) as error:
                print(error)
    """
    strace_it = ("strace", "-f", "-o", str(tmp_path / "trace"), "-e", "trace=flock",
                 "-e", "inject=flock:error=ENOLCK")  # fmt: skip
    done = subprocess.run(
        [*strace_it, sys.executable, "-c", textwrap.dedent(script), str(audit_dir)],
        env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=True,
    )  # fmt: skip
    at_check, at_call = done.stdout.splitlines()
    assert "cannot lock a file in" in at_check
    assert "cannot lock the journal" in at_call
    assert "not stored" in at_call
    assert [path.name for path in audit_dir.iterdir()] == [JOURNAL]
