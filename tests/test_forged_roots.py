"""A root that somebody without the key appends to the journal, just before the next one signs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from aging import command
from forging import (
    append_event,
    append_head,
    edited,
    events_of,
    inclusion,
    journal_path,
    lines_of,
    relinked,
    rest,
    root_of,
    session_paths,
)
from signing import make_key

from structlog_audit import AuditHandler, FileSink, Receipt, Signer, proof
from structlog_audit.chain import identity, line_hash
from structlog_audit.note import VerifierKey
from structlog_audit.proof import ProofError, prove, verify_proof
from structlog_audit.report import Report
from structlog_audit.verify import verify

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")


class Log:
    """A signed log."""

    def __init__(self, home: Path) -> None:
        self.home, self.directory, self.key_file = home, home / "audit", home / "audit.key"
        self.key = make_key(self.key_file)
        (home / "audit.key.pub").write_text(str(self.key.verifier))

    def record(self, count: int = 3, key_file: Path | None = None) -> list[Receipt]:
        """Record a session, which is signed at its end and perhaps before."""
        signer = Signer(key_file or self.key_file, entries=10_000)
        handler = AuditHandler(FileSink(self.directory, signer=signer))
        receipts = [
            handler.record({"action": "Order", "data": {"number": each}}) for each in range(count)
        ]
        handler.close()
        rest(self.directory)
        return receipts

    def claim(self, lines: list[bytes], sequence: int) -> None:
        """Append a head of the first session, with the root over other lines than its own."""
        append_head(self.directory, lines[:sequence])

    def lines(self) -> list[bytes]:
        """Return the lines of the first session."""
        return lines_of(session_paths(self.directory)[0])

    def forged(self) -> list[bytes]:
        """Return the lines of the first session, of which one is another."""
        first, second, *others = self.lines()
        return relinked([first, edited(second), *others])

    def verify(self, *keys: VerifierKey) -> Report:
        return verify(self.directory, keys=keys or [self.key.verifier])


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """With one session that has ended."""
    log = Log(tmp_path)
    log.record()
    return log


def known_sequences(log: Log) -> list[int]:
    """Return the lines of the first session that the journal knows."""
    session, _ = identity(log.lines()[0])
    return sorted({e["sequence"] for e in events_of(log.directory) if e.get("session") == session})


@pytest.mark.parametrize("at", [0, -1], ids=["an earlier line", "the last line"])
def test_a_root_that_no_signer_wrote_is_tampered(log: Log, at: int) -> None:
    """With the place of its line; a signature over it is none by whoever wrote it."""
    log.claim(log.forged(), known_sequences(log)[at])
    line, offset = len(events_of(log.directory)), journal_path(log.directory).read_bytes()
    assert log.verify().verdict == "valid"  # nothing signs it so far
    log.record()

    report = log.verify()

    (found,) = report.findings
    assert (report.verdict, found.kind, found.line) == ("tampered", "inserted", line)
    assert found.offset == offset[:-1].rindex(b"\n") + 1
    assert "its root of session" in found.reason
    assert "none that a signer wrote" in found.reason


def test_a_root_of_a_session_that_never_was_is_tampered(log: Log) -> None:
    """No file can tell that it is none, and no signer tells of such a session."""
    close = next(event for event in events_of(log.directory) if event["event"] == "Close")
    append_event(log.directory, {**close, "event": "Head", "session": "a" * 20})
    log.record()

    (found,) = log.verify().findings
    assert (found.verdict, found.kind) == ("tampered", "inserted")
    assert "none that a signer wrote" in found.reason


@pytest.mark.parametrize("root", ["", "x", 7, None, ["A"]])
def test_a_root_that_is_none_is_tampered(log: Log, root: object) -> None:
    """Whatever stands there, and for whatever line."""
    close = next(event for event in events_of(log.directory) if event["event"] == "Close")
    append_event(log.directory, {**close, "event": "Head", "root": root})
    log.record()

    assert [found.kind for found in log.verify().findings] == ["inserted"]


def test_a_write_that_a_crash_cut_behind_its_head_is_not_tampered(log: Log) -> None:
    """The next process signs that head as well; its root is true, and counts for nothing."""
    receipts = log.record()
    lines = journal_path(log.directory).read_bytes().splitlines(keepends=True)
    journal_path(log.directory).write_bytes(b"".join(lines[:-1]) + lines[-1][:100])
    log.record()

    assert log.verify().verdict == "valid"
    last = json.loads(lines[-2])
    assert (last["event"], "root" in last) == ("Close", True)
    with pytest.raises(ProofError, match="no checkpoint covers"):
        prove(receipts[-1]._replace(sequence=last["sequence"]), log.directory)


def test_what_another_key_signed_is_not_tampered(log: Log, tmp_path: Path) -> None:
    """A root by a key that is not given counts for nothing, and accuses nobody."""
    other = tmp_path / "other.key"
    make_key(other)
    log.record(key_file=other)
    log.record()

    assert log.verify().verdict == "valid"


def lie(log: Log, sequence: int = 2) -> dict[str, Any]:
    """Return a proof of a forged entry that shows all that a signature covers."""
    forged = log.forged()
    log.claim(forged, len(forged))
    log.record()
    claimed = next(line for line in lines_of(journal_path(log.directory))
                   if root_of(forged).encode() in line)  # fmt: skip
    note = [event["note"] for event in events_of(log.directory) if "note" in event][-1]
    journal = lines_of(journal_path(log.directory))
    size = proof.Checkpoint.parse(note.split("\n\n")[0] + "\n").size
    session, _ = identity(forged[0])
    return {
        "format": proof.FORMAT,
        "receipt": Receipt(session, sequence, line_hash(forged[sequence - 1]), "")._asdict(),
        "entry": forged[sequence - 1].decode(),
        "entryProof": inclusion(forged, sequence, len(forged)),
        "head": claimed.decode(),
        "headProof": inclusion(journal, json.loads(claimed)["number"], size),
        "checkpoint": note,
    }


def test_a_proof_from_such_a_root_does_not_hold(log: Log) -> None:
    """The signature covers the line; that its signer wrote it, the note does not say."""
    forged = lie(log)

    with pytest.raises(ProofError, match="none that the signer wrote") as caught:
        verify_proof(forged, [log.key.verifier])
    assert caught.value.contradicts
    (log.home / "proof.json").write_text(json.dumps(forged))
    ran = command("verify-proof", log.home / "proof.json", "--key", log.home / "audit.key.pub")
    assert ran.returncode == 1


def test_a_root_that_comes_before_the_own_one_is_passed_over(log: Log) -> None:
    """It stands behind an entry that is not signed yet, and before the note that signs it."""
    handler = AuditHandler(FileSink(log.directory, signer=Signer(log.key_file)))
    receipt = handler.record({"action": "Order"})
    last = lines_of(journal_path(log.directory))[-1]
    known = {"session": receipt.session, "sequence": 2, "hash": receipt.hash}
    append_event(
        log.directory, {**json.loads(last), **known, "event": "Head", "root": "A" * 43 + "="}
    )
    handler.close()

    proven = verify_proof(prove(receipt, log.directory), [log.key.verifier])

    assert json.loads(proven.line)["action"] == "Order"
