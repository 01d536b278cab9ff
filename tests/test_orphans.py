"""Sessions whose process was killed: whoever signs next enters their ends, as they are found."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson
import pytest
from reading import session_files
from running import eventually, run_python, run_well
from signing import make_key

from structlog_audit import AuditHandler, FileSink, Signer, SinkError
from structlog_audit.checkpoint import Checkpoints
from structlog_audit.journal import Journal
from structlog_audit.note import SigningKey
from structlog_audit.orphans import ends_as_found, without_end
from structlog_audit.report import Report
from structlog_audit.verify import verify

KILLED = """
    import os, signal, sys
    from structlog_audit import AuditHandler, FileSink, Signer
    handler = AuditHandler(FileSink(sys.argv[1], signer=Signer(sys.argv[2])))
    for number in range(9):
        handler.record({"action": "A", "data": {"n": number}})
    os.kill(os.getpid(), signal.SIGKILL)
"""
NEXT = """
    import sys, time
    from structlog_audit import AuditHandler, FileSink, Signer
    from structlog_audit.orphans import without_end
    sink = FileSink(sys.argv[1], signer=Signer(sys.argv[2]))
    handler = AuditHandler(sink)
    handler.record({"action": "B"})
    end = time.monotonic() + 30
    journal = sys.argv[1] + "/audit-journal.ndjson"
    while not sink._checkpoints._looked or sys.argv[3] in without_end(journal):
        assert time.monotonic() < end
        time.sleep(0.01)
    handler.close()
"""


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return make_key(tmp_path / "audit.key")


@pytest.fixture
def killed(audit_dir: Path, tmp_path: Path, key: SigningKey) -> Path:
    """The file of a session whose process was killed."""
    assert run_python(KILLED, audit_dir, tmp_path / "audit.key").returncode == -9
    (path,) = session_files(audit_dir)
    return path


def session_of(path: Path) -> str:
    return path.name[-27:-7]


def found(directory: Path) -> list[dict[str, object]]:
    lines = (directory / "audit-journal.ndjson").read_bytes().splitlines()
    return [event for event in map(orjson.loads, lines) if event.get("found")]


def verified(directory: Path, key: SigningKey) -> Report:
    return verify(directory, keys=[key.verifier])


def test_the_next_one_that_signs_enters_the_end(
    audit_dir: Path, tmp_path: Path, key: SigningKey, killed: Path
) -> None:
    """From then on it is covered, and whoever changes it is seen."""
    assert verified(audit_dir, key).verdict == "incomplete"

    run_well(NEXT, audit_dir, tmp_path / "audit.key", session_of(killed))

    report = verified(audit_dir, key)
    assert report.verdict == "valid"
    assert any("entered as they were found" in sentence for sentence in report.not_checked)
    (event,) = found(audit_dir)
    assert (event["event"], event["sequence"]) == ("Break", 10)
    killed.write_bytes(killed.read_bytes().replace(b'"n":8', b'"n":7'))
    assert verified(audit_dir, key).verdict == "tampered"


@pytest.fixture
def thread_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions end before the thread that signs takes its first turn."""
    monkeypatch.setattr(Checkpoints, "_turn", lambda _: None)


@pytest.mark.usefixtures("thread_is_late")
def test_a_session_that_is_over_at_once_enters_the_end_when_it_closes(
    audit_dir: Path, tmp_path: Path, key: SigningKey, killed: Path
) -> None:
    """As an export or a hold has one; once is enough."""
    handler = AuditHandler(FileSink(audit_dir, signer=Signer(tmp_path / "audit.key")))
    for _ in range(2):
        handler.record({"action": "B"})
        handler.close()

    assert [event["session"] for event in found(audit_dir)] == [session_of(killed)]
    assert verified(audit_dir, key).verdict == "valid"


@pytest.mark.usefixtures("thread_is_late")
def test_a_close_whose_end_the_journal_does_not_take_enters_none_as_found(
    audit_dir: Path, tmp_path: Path, key: SigningKey, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own session would be one of them. The next close enters both."""
    handler = AuditHandler(FileSink(audit_dir, signer=Signer(tmp_path / "audit.key")))
    handler.record({"action": "B"})
    real = Journal.append_signed

    def full(*_: object) -> None:
        monkeypatch.setattr(Journal, "append_signed", real)
        raise SinkError("the disk is full", persisted="no")

    monkeypatch.setattr(Journal, "append_signed", full)
    handler.close()
    assert found(audit_dir) == []

    handler.record({"action": "C"})
    handler.close()
    assert [event["session"] for event in found(audit_dir)] == [session_of(killed)]
    assert verified(audit_dir, key).verdict == "valid"


@pytest.mark.usefixtures("thread_is_late")
def test_a_close_that_cannot_enter_the_end_of_others_says_so_and_is_done(
    audit_dir: Path, tmp_path: Path, killed: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Its own session has ended; the disk became full behind that."""
    handler = AuditHandler(FileSink(audit_dir, signer=Signer(tmp_path / "audit.key")))
    handler.record({"action": "B"})
    real = Journal.append_signed

    def full(journal: Journal, events: list[dict[str, object]], *rest: Any) -> None:
        if any(event.get("found") for event in events):
            raise SinkError("the disk is full", persisted="no")
        real(journal, events, *rest)

    monkeypatch.setattr(Journal, "append_signed", full)
    handler.close()

    assert "looking for sessions without a process" in caplog.text
    assert without_end(str(audit_dir / "audit-journal.ndjson")).keys() == {session_of(killed)}


def test_several_that_find_it_at_once_agree(
    audit_dir: Path, tmp_path: Path, key: SigningKey, killed: Path
) -> None:
    """It may be entered twice, in the same words."""
    with ThreadPoolExecutor(4) as pool:
        arguments = audit_dir, tmp_path / "audit.key", session_of(killed)
        list(pool.map(lambda _: run_well(NEXT, *arguments), range(4)))

    assert {(e["session"], e["sequence"]) for e in found(audit_dir)} == {(session_of(killed), 10)}
    assert verified(audit_dir, key).verdict == "valid"


def test_a_torn_line_is_left_out(
    audit_dir: Path, tmp_path: Path, key: SigningKey, killed: Path
) -> None:
    """Nobody was told that it is recorded."""
    killed.write_bytes(killed.read_bytes() + b'{"level":35')

    run_well(NEXT, audit_dir, tmp_path / "audit.key", session_of(killed))

    assert [event["sequence"] for event in found(audit_dir)] == [10]
    assert verified(audit_dir, key).verdict == "valid"


@pytest.mark.parametrize(
    ("change", "kind"),
    [("edited", "edited"), ("cut", "cut"), ("missing", "missing"), ("not linked", "edited")],
)
def test_what_contradicts_the_journal_is_not_entered(
    audit_dir: Path,
    key: SigningKey,
    tmp_path: Path,
    killed: Path,
    caplog: pytest.LogCaptureFixture,
    change: str,
    kind: str,
) -> None:
    """It stays what it is: evidence."""
    lines = killed.read_bytes().splitlines(keepends=True)
    if change == "edited":
        lines[1] = lines[1].replace(b'"n":0', b'"n":1')
    elif change == "not linked":
        lines[5] = lines[5].replace(b'"n":4', b'"n":1')
    killed.write_bytes(b"".join(lines[:1] if change == "cut" else lines))
    if change == "missing":
        killed.unlink()
    signer = Signer(tmp_path / "audit.key")
    handler = AuditHandler(FileSink(audit_dir, signer=signer))
    with caplog.at_level(logging.ERROR, "structlog_audit"):
        handler.record({"action": "B"})
        if change != "missing":
            eventually(lambda: "was changed" in caplog.text)
        handler.close()

    assert found(audit_dir) == []
    report = verified(audit_dir, key)
    assert report.verdict == "tampered"
    assert [finding.kind for finding in report.findings] == [kind]


def test_an_invented_session_gets_no_end_from_the_file_of_another(
    audit_dir: Path, tmp_path: Path, key: SigningKey, killed: Path
) -> None:
    """The key would sign a line that verification takes for inserted."""
    journal = Journal(str(audit_dir), "audit")
    (opened,) = without_end(journal.path).values()
    told = {"sequence": opened.sequence, "hash": opened.hash}
    for file in (opened.file, 5):
        journal.append({"event": "Open", "file": file, "session": "z" * 20, **told})

    run_well(NEXT, audit_dir, tmp_path / "audit.key", session_of(killed))

    assert [event["session"] for event in found(audit_dir)] == [session_of(killed)]


@pytest.mark.usefixtures("thread_is_late")
@pytest.mark.parametrize("rest", ["", ',"sequence":"2","hash":"x"', ',"sequence":2,"hash":null'])
@pytest.mark.parametrize("event", ["Open", "Head"])
def test_a_line_that_is_not_whole_keeps_nobody_from_looking(
    event: str, rest: str, audit_dir: Path, tmp_path: Path, killed: Path
) -> None:
    """Anybody may have written it; verification tells of it."""
    about = f'"session":"{session_of(killed)}","file":"{killed.name}"'
    with open(audit_dir / "audit-journal.ndjson", "a") as journal:
        journal.write(f'{{"event":"{event}",{about}{rest}}}\n')

    handler = AuditHandler(FileSink(audit_dir, signer=Signer(tmp_path / "audit.key")))
    handler.record({"action": "B"})
    handler.close()

    assert [end["session"] for end in found(audit_dir)] == [session_of(killed)]


def test_a_session_that_ends_while_it_is_looked_at_is_left_alone(
    audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is in the journal before its lock is free."""
    handler = AuditHandler(FileSink(audit_dir))  # without a key, no thread looks as well
    handler.record({"action": "A"})

    def just_ended(path: str) -> bool:
        handler.close()
        return False

    monkeypatch.setattr("structlog_audit.orphans.is_locked", just_ended)
    assert ends_as_found(str(audit_dir), str(audit_dir / "audit-journal.ndjson")) == []


def test_its_own_session_is_none_although_it_could_not_be_locked(
    audit_dir: Path, tmp_path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock failed, as on a file system with errors."""
    monkeypatch.setattr("structlog_audit.sinks.file.mark_alive", lambda _: None)
    sink = FileSink(audit_dir, signer=Signer(tmp_path / "audit.key"))
    handler = AuditHandler(sink)
    handler.record({"action": "A"})
    eventually(lambda: sink._checkpoints._looked)
    sink.settle()  # it was looking, and has done so
    handler.record({"action": "B"})
    handler.close()

    assert found(audit_dir) == []
    assert verified(audit_dir, key).verdict == "valid"


def test_a_session_that_is_being_written_is_left_alone(
    audit_dir: Path, tmp_path: Path, key: SigningKey
) -> None:
    """Its process holds a lock."""
    signer = Signer(tmp_path / "audit.key")
    alive = AuditHandler(FileSink(audit_dir, signer=signer))
    alive.record({"action": "A"})

    run_well(NEXT, audit_dir, tmp_path / "audit.key", "nobody's")

    assert found(audit_dir) == []
    assert len(without_end(str(audit_dir / "audit-journal.ndjson"))) == 1
    alive.close()
    assert verified(audit_dir, key).verdict == "valid"
