"""What an attacker tried on verification itself: forged endings, long junk, stray copies."""

from __future__ import annotations

import contextlib
import datetime
import gzip
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from forging import (
    events_of,
    journal_path,
    lines_of,
    put,
    put_events,
    relinked,
    session_paths,
    signing_key,
    write_log,
)

from structlog_audit.anchors import notes_in
from structlog_audit.chain import identity, line_hash
from structlog_audit.checkpoint import Signer
from structlog_audit.note import VerifierKey
from structlog_audit.report import Report
from structlog_audit.scan import Task, scan
from structlog_audit.verify import verify
from structlog_audit.verify_command import verify_command

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("original")
    write_log(home / "audit")
    return home / "audit"


@pytest.fixture
def log(original: Path, tmp_path: Path) -> Path:
    """A log of two sessions that ended cleanly, without a key."""
    shutil.copytree(original, tmp_path / "audit")
    return tmp_path / "audit"


def kinds(report: Report) -> set[str]:
    return {finding.kind for finding in report.findings}


def last_session(log: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of the session that none follows, and its Close."""
    path = session_paths(log)[-1]
    session, _ = identity(lines_of(path)[0])
    (close,) = [e for e in events_of(log) if (e["event"], e.get("session")) == ("Close", session)]
    return path, close


def extended(path: Path) -> dict[str, Any]:
    """Append an entry behind a session's Complete; return its number and hash."""
    lines = lines_of(path)
    lines = relinked([*lines, lines[1]])
    put(path, lines)
    return {"sequence": len(lines), "hash": line_hash(lines[-1])}


@pytest.mark.parametrize("event", ["Break", "Close", "Open", "Head"])
def test_a_closed_session_is_not_opened_again(event: str, log: Path) -> None:
    """Entries behind its Complete, and a line of the journal that vouches for them."""
    path, close = last_session(log)
    put_events(log, [*events_of(log), {**close, "event": event, **extended(path)}])

    report = verify(log)

    assert report.verdict == "tampered"
    assert "inserted" in kinds(report)


def test_a_second_ending_of_the_same_line_is_of_the_same_kind(log: Path) -> None:
    """A Break behind a Close would excuse whatever stands behind it."""
    path, close = last_session(log)
    extended(path)
    put_events(log, [*events_of(log), {**close, "event": "Break"}])

    assert "inserted" in kinds(verify(log))


def test_a_line_is_known_by_one_hash(log: Path) -> None:
    """A second one is no repetition."""
    _, close = last_session(log)
    put_events(log, [*events_of(log), {**close, "hash": "0" * 64}])

    report = verify(log)

    assert report.verdict == "tampered"
    assert kinds(report) == {"inserted"}


@pytest.mark.parametrize("reverse", [False, True])
def test_an_end_that_two_enter_at_once_is_none_of_an_attacker(reverse: bool, log: Path) -> None:
    """A process that ends, and another one that takes it for killed; or a line written twice."""
    _, close = last_session(log)
    events = events_of(log)
    at = events.index(close)
    found = {key: value for key, value in close.items() if key not in ("number", "prev")}
    race = [{**found, "event": "Break", "found": True}, close]
    put_events(log, [*events[:at], *(reversed(race) if reverse else race), *events[at + 1 :]])

    report = verify(log)

    assert (report.verdict, report.closed) == ("valid", 2)


def test_a_line_of_the_journal_that_was_written_twice(log: Path) -> None:
    """Its writer could not know that the first one had arrived."""
    events = events_of(log)
    sessions = [event for event in events if "session" in event]
    put_events(log, [*events, *sessions])

    assert verify(log).verdict == "valid"


@pytest.mark.parametrize("event", ["Open", "Close", "Break"])
@pytest.mark.parametrize("whose", ["another session's", "another prefix's", "a copy", "no name"])
def test_a_session_has_no_file_but_its_own(event: str, whose: str, log: Path) -> None:
    """An invented session would have the file of a real one go, or not be looked into."""
    path, close = last_session(log)
    invented = "z" * 20
    name = {
        "another session's": path.name,
        "another prefix's": path.name.replace("audit-", "other-").replace(
            close["session"], invented
        ),
        "a copy": path.name.replace(close["session"], invented) + ".zst",
        "no name": "notes.txt",
    }[whose]
    told = {"sequence": 1, "hash": "0" * 64, "reason": "closed"}
    put_events(log, [*events_of(log), {**close, **told, "event": event, "file": name,
                                       "session": invented}])  # fmt: skip
    (finding,) = verify(log).findings
    assert (finding.verdict, finding.kind, finding.found) == ("tampered", "inserted", name)


def took(begin: float) -> float:
    """Return the seconds of processor time since then: others may keep this machine busy."""
    return time.process_time() - begin


def test_anchors_in_a_long_access_log_are_found_in_linear_time(tmp_path: Path) -> None:
    """Whoever captures standard output has the lines of the server around each note."""
    signing_key(tmp_path / "key")
    write_log(tmp_path / "signed", Signer(tmp_path / "key"))
    note = next(e["note"] for e in events_of(tmp_path / "signed") if e["event"] == "Checkpoint")
    access = f'10.0.0.1 - - [01/Jan/2026:00:00:00 +0000] "GET /?q={"x" * 2_000}" 200\n' * 300
    (tmp_path / "stdout").write_text(f"{access}\n{note}\n{access}")

    begin = time.process_time()
    notes = notes_in(str(tmp_path / "stdout"))

    assert notes == [note]
    assert took(begin) < 1


@pytest.fixture
def lock() -> Iterator[Callable[[Path], None]]:
    """Hold the lock that a writer holds, as anybody can."""
    import fcntl

    with contextlib.ExitStack() as files:

        def hold(path: Path) -> None:
            fcntl.flock(files.enter_context(path.open("rb")), fcntl.LOCK_EX)

        yield hold


Lock = Callable[[Path], None]


@pytest.mark.parametrize("recent", [False, True])
def test_a_lock_does_not_excuse_a_missing_journal(recent: bool, lock: Lock, log: Path) -> None:
    """Its sessions have an end, so there was a journal."""
    journal_path(log).unlink()
    for path in session_paths(log):
        lock(path)
        if recent:
            os.utime(path)

    report = verify(log)

    assert report.verdict == "tampered"
    assert kinds(report) == {"journal-missing", "planted"}


@pytest.mark.parametrize("recent", [False, True])
def test_a_lock_does_not_excuse_a_file_that_is_planted(
    recent: bool, lock: Lock, log: Path, tmp_path: Path
) -> None:
    """It has an end, and a writer enters its session before that."""
    write_log(tmp_path / "other", sessions=1)
    (path,) = session_paths(tmp_path / "other")
    planted = log / path.name
    shutil.copy(path, planted)
    lock(planted)

    assert kinds(verify(log)) == {"planted"}

    put(planted, lines_of(planted)[:2])
    if recent:
        os.utime(planted)
    assert kinds(verify(log)) == (set() if recent else {"not-entered"})


def test_a_first_write_has_no_journal_yet(lock: Lock, tmp_path: Path) -> None:
    """Without keys it is as good as any; keys and anchors demand one."""
    key = signing_key(tmp_path / "key")
    log = tmp_path / "audit"
    write_log(log, Signer(tmp_path / "key"), sessions=1)
    notes = [e["note"] for e in events_of(log) if e["event"] == "Checkpoint"]
    journal_path(log).unlink()
    (path,) = session_paths(log)
    put(path, lines_of(path)[:1])
    os.utime(path)
    lock(path)

    assert verify(log).verdict == "valid"
    assert verify(log, keys=[key.verifier]).verdict == "incomplete"
    assert verify(log, keys=[key.verifier], anchors=notes).verdict == "tampered"
    journal_path(log).touch()
    assert verify(log, keys=[key.verifier], anchors=notes).verdict == "tampered"


def test_lines_behind_a_failure_are_not_counted(log: Path) -> None:
    """Nobody acknowledged them, and whoever can write the file could have put them there."""
    path, close = last_session(log)
    lines = lines_of(path)
    events = [event for event in events_of(log) if event != close]
    head = {"sequence": 3, "hash": line_hash(lines[2])}
    put_events(log, [*events, {**close, "event": "Break", **head}])

    report = verify(log)

    assert (report.verdict, report.broken, report.entries) == ("valid", 1, 8)
    assert any("2 lines stand behind a failure" in said for said in report.not_checked)


def test_a_checkpoint_out_of_its_time_that_a_later_one_covers(tmp_path: Path) -> None:
    """A host used the old key for a while; the new one vouches for all of it."""
    log, since = tmp_path / "audit", datetime.datetime.now(datetime.timezone.utc)
    old, new = signing_key(tmp_path / "old"), signing_key(tmp_path / "new")
    write_log(log, Signer(tmp_path / "old"), sessions=1)
    expired = VerifierKey(
        old.verifier.name, old.verifier.public, until=since - datetime.timedelta(hours=1)
    )
    keys = [expired, new.verifier]
    count = len([event for event in events_of(log) if event["event"] == "Checkpoint"])

    assert kinds(verify(log, keys=keys)) == {"key-expired"}

    write_log(log, Signer(tmp_path / "new"), sessions=1)
    report = verify(log, keys=keys)
    assert report.verdict == "valid", report.findings
    assert report.checkpoints > 0
    assert any(f"{count:,} checkpoints were signed by a key out" in s for s in report.not_checked)


JUNK = 400_000
"""Lines; in quadratic time they take minutes."""


@pytest.mark.parametrize("junk", [b"", b"x", b"{}"])
@pytest.mark.parametrize("journal", [False, True])
def test_junk_behind_a_file_is_read_in_linear_time(journal: bool, junk: bytes, log: Path) -> None:
    """Whoever can append newlines cannot keep an auditor waiting."""
    path = journal_path(log) if journal else session_paths(log)[0]
    put(path, [*lines_of(path), *[junk] * JUNK])

    begin = time.process_time()
    report = verify(log)

    assert report.verdict == "tampered"
    assert len(report.findings) < 100
    assert took(begin) < 10


def test_junk_in_a_session_that_the_journal_knows_well(log: Path) -> None:
    """Each broken line asks what comes next of what is known."""
    session = "a" * 20
    points = dict.fromkeys(range(1, JUNK, 4), "0" * 64)
    path = session_paths(log)[0]
    put(path, [b"x"] * JUNK)

    begin = time.process_time()
    found = scan(Task(str(path), session, points))

    assert found.lines == JUNK
    assert took(begin) < 10


def test_a_broken_line_far_behind_is_found_at_its_place(log: Path) -> None:
    """Lines are followed in strides, and offsets counted from one finding to the next."""
    path = session_paths(log)[0]
    lines = relinked(lines_of(path)[:1] + lines_of(path)[1:2] * 3_000)
    for at in (700, 255, 2_600):
        lines[at] = lines[at][:1] + b" " + lines[at][1:]
    put(path, lines)

    found = [f for f in verify(path).findings if f.kind == "edited"]

    begins = [0, *itertools.accumulate(len(line) + 1 for line in lines)]
    assert [f.line for f in found] == [256, 701, 2_601]
    assert [f.offset for f in found] == [begins[255], begins[700], begins[2_600]]


def test_zeros_in_the_last_line_of_the_journal(log: Path) -> None:
    """A power failure leaves blocks of them, also within a line that has its end."""
    lines = lines_of(journal_path(log))
    torn = lines[-1][:30] + bytes(40) + lines[-1][70:]
    put(journal_path(log), [*lines[:-1], torn])

    report = verify(log)

    assert report.verdict == "incomplete"
    assert kinds(report) == {"torn", "unfinished"}
    put(journal_path(log), [*lines[:-2], lines[-2][:30] + bytes(40) + lines[-2][70:], lines[-1]])
    assert verify(log).verdict == "tampered"


def packed(path: Path) -> Path:
    """Compress a file, as gzip does: the copy has its time."""
    copy = path.with_name(path.name + ".gz")
    copy.write_bytes(gzip.compress(path.read_bytes()))
    shutil.copystat(path, copy)
    return copy


def test_a_directory_in_which_all_was_compressed(tmp_path: Path) -> None:
    """Its journal as well; and it is compared as before."""
    key = signing_key(tmp_path / "key")
    log = tmp_path / "audit"
    write_log(log, Signer(tmp_path / "key"))
    notes = [e["note"] for e in events_of(log) if e["event"] == "Checkpoint"]
    for path in list(log.iterdir()):
        packed(path)
        path.unlink()

    report = verify(log, keys=[key.verifier], anchors=notes)
    assert (report.verdict, report.closed) == ("valid", 2), report.findings

    next(log.glob("audit-2*")).unlink()
    assert verify(log, keys=[key.verifier]).verdict == "tampered"


def test_copies_that_were_not_read_are_mentioned(log: Path) -> None:
    """Of a session and of the journal; what is in them may be anything."""
    packed(session_paths(log)[0])
    packed(journal_path(log))

    report = verify(log)

    assert report.verdict == "valid"
    assert any("2 compressed copies beside" in said for said in report.not_checked)


def test_a_newer_format_does_not_excuse_what_the_journal_contradicts(log: Path) -> None:
    """Else an edited file would only be one that this version cannot read."""
    path, _ = last_session(log)
    lines = lines_of(path)
    lines[0] = lines[0].replace(b'"format":1', b'"format":2')
    put(path, relinked(lines))

    report = verify(log)

    assert report.verdict == "tampered"
    assert kinds(report) == {"altered"}


def test_a_name_that_is_no_text_is_spelled_out_in_json(log: Path) -> None:
    """Half a surrogate is none that other programs take."""
    directory = Path(os.fsdecode(os.fsencode(log) + b"\xff"))
    log.rename(directory)
    journal_path(directory).unlink()

    result = CliRunner().invoke(verify_command, ["--json", str(directory)])

    assert result.exit_code == 1
    files = [finding["file"] for finding in json.loads(result.stdout)["findings"]]
    assert all("\\udcff" in file and file.isprintable() for file in files)
