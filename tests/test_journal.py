"""The journal: it tells of every session that there is one, how far it goes, and why it ended."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from reading import journal_path, read_journal, read_sessions, recorded, session_files, told_of
from running import HANG, eventually, in_child, in_threads, run_file, run_python, run_well

from structlog_audit import AllOf, AuditHandler, AuditWriteError, FileSink, FirstOf, journal
from structlog_audit.exceptions import SinkError
from structlog_audit.journal import WINDOW, Journal
from structlog_audit.merkle import Frontier, leaf_hash
from structlog_audit.sinks import _durable
from structlog_audit.testing import FailingSink, MemorySink

MakeHandler = Callable[..., AuditHandler]
posix = pytest.mark.skipif(os.name != "posix", reason="a matter of POSIX")


def events(directory: Path, prefix: str = "audit") -> list[str]:
    return [entry["event"] for entry in read_journal(directory, prefix)]


def test_a_session_is_entered_with_its_first_lines_and_its_last(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """When it begins, before anything is acknowledged; and when it ends."""
    first = handler.record({"action": "A"})
    (path,) = session_files(audit_dir)
    assert events(audit_dir) == ["Journal", "Open"]
    handler.record({"action": "B"})
    assert events(audit_dir) == ["Journal", "Open"]
    handler.close()

    head, begin, end = read_journal(audit_dir)
    assert (head["format"], head["prefix"]) == (1, "audit")
    assert head["library"].startswith("structlog-audit ")
    assert (begin["event"], begin["file"], begin["sequence"]) == ("Open", path.name, 2)
    assert (begin["session"], begin["hash"]) == (first.session, first.hash)
    assert (end["event"], end["file"], end["sequence"]) == ("Close", path.name, 4)
    assert end["reason"] == "closed"
    assert end["hash"] == sha256(path.read_bytes().split(b"\n")[-2]).hexdigest()


def test_each_prefix_has_a_journal_of_its_own(make_handler: MakeHandler, audit_dir: Path) -> None:
    """Of services that share a directory."""
    for prefix in ("shop", "shop-journal"):
        make_handler(FileSink(audit_dir, prefix)).record({"action": "A"})

    for prefix in ("shop", "shop-journal"):
        head, begin = read_journal(audit_dir, prefix)
        assert (head["prefix"], begin["event"]) == (prefix, "Open")


def test_rotation_ends_one_session_and_begins_the_next(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """All are entered, in their order."""
    handler = make_handler(max_bytes=2_000)
    for number in range(20):
        handler.record({"action": "A", "number": number, "text": "x" * 200})
    handler.close()

    sessions = [entries[0]["session"] for entries in read_sessions(audit_dir)]
    assert len(sessions) > 3
    assert events(audit_dir) == ["Journal", *["Open", "Close"] * len(sessions)]
    assert [e["session"] for e in read_journal(audit_dir) if e["event"] == "Close"] == sessions
    for session in sessions:
        assert [entry["event"] for entry in told_of(audit_dir, session)] == ["Open", "Close"]


def test_reopen_ends_a_session_with_its_reason(handler: AuditHandler, audit_dir: Path) -> None:
    """As a log rotator's signal asks for."""
    first = handler.record({"action": "A"})
    handler.reopen()
    second = handler.record({"action": "B"})

    assert [entry.get("reason") for entry in told_of(audit_dir, first.session)] == [None, "reopen"]
    assert [entry["event"] for entry in told_of(audit_dir, second.session)] == ["Open"]


def test_a_later_process_goes_on_with_the_journal(audit_dir: Path) -> None:
    """Its lines are numbered and linked behind those of the earlier one."""
    script = """
        import sys
        from structlog_audit import AuditHandler, FileSink
        handler = AuditHandler(FileSink(sys.argv[1]))
        handler.record({"action": "A"})
        handler.close()
    """
    for _ in range(3):
        run_well(script, audit_dir)

    assert events(audit_dir) == ["Journal", *["Open", "Close"] * 3]
    assert len({entry["pid"] for entry in read_journal(audit_dir)}) == 3


def test_a_broken_session_is_entered_as_broken(handler: AuditHandler, audit_dir: Path) -> None:
    """With the last line that was acknowledged, and the reason."""
    receipt = handler.record({"action": "A"})
    (path,) = session_files(audit_dir)
    with path.open("ab") as file:
        file.write(b"{}\n")
    handler.record({"action": "B"})

    begin, end = told_of(audit_dir, receipt.session)
    assert (begin["event"], end["event"]) == ("Open", "Break")
    assert (end["sequence"], end["hash"]) == (receipt.sequence, receipt.hash)
    assert "somebody else" in end["reason"]
    assert events(audit_dir) == ["Journal", "Open", "Break", "Open"]


def test_a_session_of_which_nothing_was_acknowledged_is_not_entered(
    handler: AuditHandler, audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is gone again, too."""

    def fail(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(_durable, "append", fail)
        with pytest.raises(AuditWriteError):
            handler.record({"action": "A"})

    assert list(audit_dir.iterdir()) == []


# several sinks


def test_each_directory_of_several_sinks_has_a_journal(
    make_handler: MakeHandler, tmp_path: Path
) -> None:
    """They tell the same of the same session."""
    one, two = tmp_path / "one", tmp_path / "two"
    handler = make_handler(AllOf(FileSink(one), FileSink(two)))
    receipt = handler.record({"action": "A"})
    handler.close()

    for directory in (one, two):
        assert events(directory) == ["Journal", "Open", "Close"]
        assert [e["sequence"] for e in told_of(directory, receipt.session)] == [2, 3]


def test_a_session_that_another_sink_broke_is_entered_as_broken(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """The directory confirmed, the other sink failed: the session is over there as well."""
    handler = make_handler(AllOf(FileSink(audit_dir), FailingSink(lambda number: number == 2)))
    receipt = handler.record({"action": "A"})
    with pytest.raises(AuditWriteError):
        handler.record({"action": "B"})
    handler.record({"action": "C"})

    assert events(audit_dir) == ["Journal", "Open", "Break", "Open"]
    assert told_of(audit_dir, receipt.session)[1]["sequence"] == 3  # the file has it


def test_a_session_that_another_sink_never_took_is_entered_as_broken(
    make_handler: MakeHandler, audit_dir: Path
) -> None:
    """Nothing of it was acknowledged, but the directory has it, and its begin was entered."""
    handler = make_handler(AllOf(FileSink(audit_dir), FailingSink(lambda number: number == 1)))
    with pytest.raises(AuditWriteError):
        handler.record({"action": "A"})
    handler.record({"action": "B"})
    handler.close()

    assert events(audit_dir) == ["Journal", "Open", "Break", "Open", "Close"]


def test_the_first_of_several_sinks_enters_what_went_there(
    make_handler: MakeHandler, tmp_path: Path
) -> None:
    """The directory that took over has the session in its journal, the other one has not."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("no directory")
    handler = make_handler(FirstOf(FileSink(one), FileSink(two)))
    receipt = handler.record({"action": "A"})
    handler.close()

    assert [e["event"] for e in told_of(two, receipt.session)] == ["Open", "Close"]
    assert one.read_text() == "no directory"


def test_a_sink_that_takes_over_leaves_a_break_behind(
    make_handler: MakeHandler, tmp_path: Path
) -> None:
    """The first directory is taken away; when it is there again, its journal goes on."""
    one = tmp_path / "one"
    handler = make_handler(FirstOf(FileSink(one), MemorySink()))
    receipt = handler.record({"action": "A"})
    (path,) = session_files(one)
    path.rename(tmp_path / "moved")
    handler.record({"action": "B"})

    end = read_journal(one)[2]
    assert (end["event"], end["session"]) == ("Break", receipt.session)
    assert end["hash"] == receipt.hash


# forks and processes


@posix
def test_a_forked_child_enters_its_own_sessions_alone(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """The parent's session goes on, and only the parent enters its end."""
    before = handler.record({"action": "Parent"})

    def child() -> str:
        session = handler.record({"action": "Child"}).session
        handler.close()
        return session

    session = in_child(child)
    handler.record({"action": "Parent"})
    handler.close()

    assert events(audit_dir) == ["Journal", "Open", "Open", "Close", "Close"]
    assert {e["pid"] for e in told_of(audit_dir, before.session)} == {os.getpid()}
    assert os.getpid() not in {e["pid"] for e in told_of(audit_dir, session)}


@posix
def test_a_forked_child_does_not_enter_the_end_that_its_parent_owes(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """The journal did not take it; the parent enters it with its next session, once."""
    before = handler.record({"action": "Parent"})
    path = journal_path(audit_dir)
    path.rename(path.with_suffix(".aside"))
    path.mkdir()
    handler.close()
    path.rmdir()
    path.with_suffix(".aside").rename(path)

    in_child(lambda: handler.record({"action": "Child"}).session)
    assert [e["event"] for e in told_of(audit_dir, before.session)] == ["Open"]
    handler.record({"action": "Parent"})

    _, end = told_of(audit_dir, before.session)
    assert (end["event"], end["pid"]) == ("Close", os.getpid())


def test_ten_processes_at_once_share_a_journal(audit_dir: Path, tmp_path: Path) -> None:
    """Whole lines, numbered without gaps, linked; every session has its begin and its end."""
    script = """
        import sys
        from multiprocessing import Process
        from structlog_audit import AuditHandler, FileSink

        def work(directory):
            handler = AuditHandler(FileSink(directory), max_bytes=1_500)
            for number in range(20):
                handler.record({"action": "A", "number": number})
            handler.close()

        if __name__ == "__main__":
            workers = [Process(target=work, args=(sys.argv[1],)) for _ in range(10)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            assert [worker.exitcode for worker in workers] == [0] * 10
    """
    run_file(tmp_path / "work.py", script, audit_dir)

    assert len(recorded(audit_dir)) == 200
    files = session_files(audit_dir)
    assert len(events(audit_dir)) == 1 + 2 * len(files)
    for path in files:
        told = [e["event"] for e in told_of(audit_dir, path.name[-27:-7])]
        assert told == ["Open", "Close"]


@posix
def test_forks_in_the_middle_of_an_append_hinder_nobody(audit_dir: Path) -> None:
    """One thread appends without a pause, another one forks: children append at once."""
    journal = Journal(str(audit_dir), "audit")
    audit_dir.mkdir(0o700)
    over = threading.Event()
    counts = [0, 0]

    def append() -> None:
        while not over.is_set():
            journal.append({"event": "Head"})
            counts[0] += 1

    def fork() -> None:
        try:
            for _ in range(60):
                in_child(lambda: journal.append({"event": "Head"}))
                counts[1] += 1
        finally:
            over.set()

    started = time.monotonic()
    assert in_threads([append, fork]) == [None, None]

    assert counts[1] == 60
    assert len(read_journal(audit_dir)) == 1 + sum(counts)
    assert time.monotonic() - started < HANG / 2


@posix
def test_a_child_does_not_keep_the_lock_of_a_parent_that_is_gone(
    audit_dir: Path, handler: AuditHandler, tmp_path: Path
) -> None:
    """The parent forks in the middle of an append and is killed; others record on."""
    script = """
        import os, signal, sys, threading
        from structlog_audit import AuditHandler, FileSink
        from structlog_audit.sinks import _durable

        inside, append = threading.Event(), _durable.append

        def hang(descriptor, data):
            if b'"event":"Open"' in data:
                inside.set()
                threading.Event().wait()
            return append(descriptor, data)

        _durable.append = hang
        handler = AuditHandler(FileSink(sys.argv[1]))
        work = threading.Thread(target=handler.record, args=({"action": "A"},), daemon=True)
        work.start()
        assert inside.wait(30)
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            open(sys.argv[2], "x").close()
            while True:
                signal.pause()
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = run_python(script, audit_dir, tmp_path / "alive")
    assert done.returncode == -signal.SIGKILL, done.stderr
    child = int(done.stdout)
    try:
        eventually((tmp_path / "alive").exists)
        handler.record({"action": "B"})
    finally:
        os.kill(child, signal.SIGKILL)

    assert recorded(audit_dir)[-1]["action"] == "B"


@posix
def test_a_forked_child_closes_no_foreign_file_under_the_journals_number(
    audit_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A daemon that closed every number there is has a file of its own there by now."""
    audit_dir.mkdir(0o700)
    journal = Journal(str(audit_dir), "audit")
    inside, go_on = threading.Event(), threading.Event()
    append = _durable.append

    def wait(descriptor: int, data: bytes) -> int:
        inside.set()
        go_on.wait(HANG)
        return append(descriptor, data)

    monkeypatch.setattr(_durable, "append", wait)
    thread = threading.Thread(target=journal.append, args=({"event": "Head"},))
    thread.start()
    assert inside.wait(HANG)

    def child() -> bool:
        number = journal._file.descriptor
        foreign = os.open(tmp_path / "foreign", os.O_RDWR | os.O_CREAT)
        os.dup2(foreign, number)
        journal.after_fork()
        return os.path.samestat(os.fstat(number), os.fstat(foreign))

    assert in_child(child)
    go_on.set()
    thread.join(HANG)
    assert events(audit_dir) == ["Journal", "Head"]


# what crashes and others do to it


def test_a_torn_tail_is_cut_off_and_nothing_is_glued_to_it(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """What a crash has left of a line was never acknowledged."""
    handler.record({"action": "A"})
    handler.close()
    with journal_path(audit_dir).open("ab") as file:
        file.write(b'{"time":"2026-11-' + b"x" * (WINDOW + 10))

    handler.record({"action": "B"})

    assert events(audit_dir) == ["Journal", "Open", "Close", "Open"]


@pytest.mark.parametrize("torn", [b'{"time":"2026', b"x" * (2 * WINDOW)])
def test_a_journal_of_one_torn_line_begins_anew(
    torn: bytes, handler: AuditHandler, audit_dir: Path
) -> None:
    """The crash came with its very first line."""
    audit_dir.mkdir(0o700)
    journal_path(audit_dir).write_bytes(torn)

    handler.record({"action": "A"})

    assert events(audit_dir) == ["Journal", "Open"]


def _deleted(path: Path) -> None:
    path.unlink()


def _emptied(path: Path) -> None:
    os.truncate(path, 0)


def _cut(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, len(b"".join(lines[:-1])))


def _cut_in_a_line(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def _replaced_by_a_copy(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.rename(path)


def _changed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"Open"', b'"Opon"'))


@posix
@pytest.mark.parametrize(
    "meddle", [_deleted, _emptied, _cut, _cut_in_a_line, _replaced_by_a_copy, _changed]
)
def test_a_journal_that_is_meddled_with_while_its_process_runs_is_told_of(
    meddle: Callable[[Path], None],
    handler: AuditHandler,
    audit_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the journal, with the line that was expected; and on the logger."""
    handler.record({"action": "A"})
    path = journal_path(audit_dir)
    last = path.read_bytes().splitlines()[-1]
    meddle(path)

    handler.reopen()
    handler.record({"action": "B"})

    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    (told,) = [line for line in lines if line["event"] == "Rewritten"]
    assert told["expected"] == {"number": 2, "hash": sha256(last).hexdigest()}
    assert [line["event"] for line in lines[lines.index(told) + 1 :]] == ["Close", "Open"]
    (record,) = [r for r in caplog.records if "cut or replaced" in r.getMessage()]
    assert (record.name, record.levelno) == ("structlog_audit", logging.ERROR)
    assert [entry["action"] for entry in recorded(audit_dir)] == ["A", "B"]


def test_what_another_process_appends_is_no_meddling(
    make_handler: MakeHandler, audit_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two handlers take turns."""
    one, two = make_handler(), make_handler(FileSink(audit_dir))
    for _ in range(3):
        for handler in (one, two):
            handler.record({"action": "A"})
            handler.reopen()
            eventually(lambda: events(audit_dir)[-1] == "Close")

    assert events(audit_dir) == ["Journal", *["Open", "Close"] * 6]
    assert not caplog.records


@pytest.mark.parametrize("size", [10, WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW])
def test_lines_of_any_length_are_linked(size: int, audit_dir: Path) -> None:
    """A reason may be long, and others may have written there."""
    audit_dir.mkdir(0o700)
    Journal(str(audit_dir), "audit").append({"event": "Break", "reason": "x" * size})
    Journal(str(audit_dir), "audit").append({"event": "Head"})
    one = Journal(str(audit_dir), "audit")
    one.append({"event": "Head"})
    Journal(str(audit_dir), "audit").append({"event": "Break", "reason": "x" * size})
    one.append({"event": "Head"})

    assert events(audit_dir) == ["Journal", "Break", "Head", "Head", "Break", "Head"]


@pytest.mark.parametrize(
    "foreign", [b"{}\n", b"\n", b"\xff\n", b'{"number":"x"}\n', b"[" * 9 + b"\n"]
)
def test_a_line_that_is_not_ours_is_counted_and_linked(
    foreign: bytes, handler: AuditHandler, audit_dir: Path
) -> None:
    """It stays where it is, for whoever verifies the journal."""
    handler.record({"action": "A"})
    with journal_path(audit_dir).open("ab") as file:
        file.write(foreign)
    handler.close()

    *_, other, end = journal_path(audit_dir).read_bytes().splitlines()
    assert other + b"\n" == foreign
    assert json.loads(end)["number"] == 4
    assert json.loads(end)["prev"] == sha256(other).hexdigest()


# the tree over its lines


def _tree(directory: Path) -> Frontier:
    tree = Frontier()
    for line in journal_path(directory).read_bytes().splitlines():
        tree.append(leaf_hash(line))
    return tree


def test_a_tree_that_may_have_grown_by_a_part_is_not_signed(
    audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption struck while it was carried on."""
    audit_dir.mkdir(0o700)
    ours = Journal(str(audit_dir), "audit")
    signed: list[tuple[int, bytes]] = []

    def sign(tree: Frontier, first_line: bytes) -> dict[str, Any]:
        signed.append((tree.size, tree.root()))
        return {"event": "Checkpoint"}

    ours.append_signed([{"event": "Head"}], sign, lambda line, first_line: None)
    calls = []

    def interrupted(line: bytes) -> bytes:
        calls.append(line)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return leaf_hash(line)

    with monkeypatch.context() as patched:
        patched.setattr(journal, "leaf_hash", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ours.append({"event": "Head"}, {"event": "Head"})
    before = _tree(audit_dir)
    ours.append_signed([], sign, lambda line, first_line: None)

    assert signed[1] == (before.size, before.root())
    assert events(audit_dir) == ["Journal", "Head", "Checkpoint", "Checkpoint"]


def test_a_journal_without_a_directory_says_so(audit_dir: Path) -> None:
    """The directory was removed; whoever appends is told."""
    with pytest.raises(SinkError, match="ENOENT") as caught:
        Journal(str(audit_dir), "audit").append({"event": "Head"})

    assert caught.value.persisted == "no"
