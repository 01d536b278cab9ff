"""Make the vectors: small logs, each with the verdict that a verifier must come to.

Everything in them is fixed: keys, times, identities. So they can be made again byte for byte, and
by others. `python tests/vectors/make.py DIRECTORY` writes them there; without a directory, here.

Each vector is a directory: `log` is what is verified, `key.pub` the public keys, `anchors` the
notes that were kept elsewhere, `expected.json` the verdict and the kinds of findings: with the
`chain` alone, with the `key`, and with the `anchor` as well.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from structlog_audit.chain import line_hash, link
from structlog_audit.journal import journal_origin
from structlog_audit.merkle import Frontier, leaf_hash
from structlog_audit.note import Checkpoint, SigningKey, sign

HOME = Path(__file__).parent
NAME = "example.com/vectors"
FIRST, SECOND, THIRD = "first000000000000000", "second00000000000000", "third000000000000000"
OWN = {"level": 35, "pid": 7, "hostname": "node-7", "name": "audit-log"}


def key(number: int) -> SigningKey:
    """Return a key, made of a number: for tests, and nothing else."""
    return SigningKey(NAME, Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)))


OLD, NEW, STRANGER = key(1), key(2), key(3)


def dumped(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()


def time(second: int) -> str:
    return f"2026-11-22T07:{second // 60:02}:{second % 60:02}.000000Z"


def name(session: str, suffix: str = "") -> str:
    return f"audit-20261122-{session}.ndjson{suffix}"


class Log:
    """A log of two sessions that ended, signed at each end; to be changed."""

    def __init__(self) -> None:
        self.second = 0
        self.sessions: dict[str, list[bytes]] = {}
        self.journal: list[bytes] = []
        self.tails: dict[str, bytes] = {}
        self.names: dict[str, str] = {}
        self.notes: list[str] = []
        self.keys = [OLD]
        self.public = f"{OLD.verifier}\n"
        self.enter("Journal", format=1, prefix="audit", library="structlog-audit 0.1.0")

    def tick(self) -> str:
        self.second += 1
        return time(self.second)

    def line(self, session: str, action: str, event: str, data: dict[str, Any]) -> None:
        """Append a line to a session."""
        lines = self.sessions.setdefault(session, [])
        fields = {**OWN, "time": self.tick(), "action": action, "event": event, "data": data}
        prev = line_hash(lines[-1]) if lines else ""
        lines.append(link(dumped(fields)[:-1], session, len(lines) + 1, prev))

    def begin(self, session: str, follows: str | None = None) -> None:
        """Begin a session, with one entry in its first write."""
        data: dict[str, Any] = {"format": 1, "library": "structlog-audit 0.1.0"}
        if follows is not None:
            lines = self.sessions[follows]
            data["follows"] = {"session": follows, "sequence": len(lines),
                               "hash": line_hash(lines[-1]), "ended": "max_age"}  # fmt: skip
        self.line(session, "AuditSession", "Begin", data)
        self.record(session)
        self.enter("Open", file=name(session), **self.head(session))

    def record(self, session: str, count: int = 1) -> None:
        for _ in range(count):
            self.line(session, "InvoiceDelete", "Record", {"invoiceId": f"inv_{self.second}"})

    def complete(self, session: str) -> None:
        count = len(self.sessions[session]) + 1
        self.line(session, "AuditSession", "Complete", {"reason": "closed", "entries": count})

    def head(self, session: str) -> dict[str, Any]:
        lines = self.sessions[session]
        return {"session": session, "sequence": len(lines), "hash": line_hash(lines[-1])}

    def end(self, session: str, event: str = "Close") -> None:
        if event == "Close":
            self.complete(session)
        self.enter(event, file=name(session), **self.head(session), reason="closed")

    def enter(self, event: str, **fields: Any) -> None:
        """Append a line to the journal."""
        number = len(self.journal) + 1
        prev = line_hash(self.journal[-1]) if self.journal else ""
        own = {"time": self.tick(), "pid": 7, "hostname": "node-7", "event": event}
        self.journal.append(dumped({**own, **fields, "number": number, "prev": prev}))

    def sign(self, acts: int = 1) -> None:
        """Append a checkpoint, and say how many lines in front of it are the signer's own."""
        tree = Frontier()
        for line in self.journal:
            tree.append(leaf_hash(line))
        origin = journal_origin(NAME, self.journal[0])
        text = Checkpoint(origin, tree.size, tree.root(), acts).text()
        self.notes.append(sign(text, self.keys))
        self.enter("Checkpoint", note=self.notes[-1], entries=10_000, interval=900.0)

    def fill(self) -> Log:
        """Record two sessions."""
        self.begin(FIRST)
        self.record(FIRST, 2)
        self.end(FIRST)
        self.sign()
        self.begin(SECOND, FIRST)
        self.end(SECOND)
        self.sign()
        return self

    def write(self, home: Path) -> None:
        """Write it into a directory."""
        (home / "log").mkdir(parents=True)
        for session, lines in self.sessions.items():
            data = b"".join([line + b"\n" for line in lines]) + self.tails.get(session, b"")
            file = self.names.get(session, name(session))
            (home / "log" / file).write_bytes(stored(data) if file.endswith(".gz") else data)
        if self.journal:
            data = b"".join([line + b"\n" for line in self.journal]) + self.tails.get("", b"")
            (home / "log" / "audit-journal.ndjson").write_bytes(data)
        (home / "key.pub").write_bytes(self.public.encode())
        (home / "anchors").mkdir()
        for number, note in enumerate(self.notes, 1):
            (home / "anchors" / f"{number}.note").write_bytes(note.encode())


def stored(data: bytes) -> bytes:
    """Return a gzip member without compression, which looks the same with every zlib."""
    assert len(data) < 2**16
    block = struct.pack("<BHH", 1, len(data), len(data) ^ 0xFFFF) + data
    head = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    return head + block + struct.pack("<II", zlib.crc32(data), len(data))


def relinked(lines: list[bytes], session: str) -> list[bytes]:
    done: list[bytes] = []
    for number, line in enumerate(lines, 1):
        prev = line_hash(done[-1]) if done else ""
        done.append(link(line[: line.rindex(b',"session":')], session, number, prev))
    return done


def forged(line: bytes) -> bytes:
    assert b"inv_" in line
    return line.replace(b"inv_", b"INV_")


Expected = tuple[str, ...]
"""Verdict and kinds of findings."""
VALID: Expected = ("valid",)
Vector = tuple[Callable[[], Log], Expected, Expected, Expected]


def valid() -> Log:
    return Log().fill()


def broken_session() -> Log:
    log = valid()
    log.begin(THIRD)
    log.record(THIRD)
    log.end(THIRD, "Break")
    log.sign()
    log.record(THIRD)  # whole, but never acknowledged
    log.tails[THIRD] = b'{"level":35,"ti'
    return log


def compressed() -> Log:
    log = valid()
    log.names[FIRST] = name(FIRST, ".gz")
    return log


def rotated_keys() -> Log:
    log = Log()
    log.begin(FIRST)
    log.end(FIRST)
    log.sign()
    log.keys = [OLD, NEW]
    log.begin(SECOND, FIRST)
    log.end(SECOND)
    log.sign()
    log.keys = [NEW]
    log.begin(THIRD, SECOND)
    log.end(THIRD)
    log.sign()
    log.public = (
        f"# the old one, and the new one\n{OLD.verifier} until=2026-11-22T07:00:16Z\n"
        f"{NEW.verifier} since=2026-11-22T07:00:08Z\n"
    )
    return log


def expired_key() -> Log:
    log = valid()
    log.public = f"{OLD.verifier} until=2026-11-22T07:00:10Z\n"
    return log


def crash() -> Log:
    log = valid()
    log.begin(THIRD)
    log.enter("Head", **log.head(THIRD))
    log.sign()
    log.record(THIRD, 3)
    return log


def torn() -> Log:
    log = crash()
    log.tails[THIRD] = b'{"level":35,"time":"2026-11-22T07:'
    return log


def power_failure() -> Log:
    log = crash()
    log.tails[THIRD] = b"\0" * 64
    return log


def not_entered() -> Log:
    log = valid()
    journal = list(log.journal)
    log.begin(THIRD)
    log.journal = journal
    return log


def empty_file() -> Log:
    log = valid()
    log.sessions[THIRD] = []
    return log


def torn_journal() -> Log:
    log = valid()
    log.tails[""] = b'{"time":"2026-11-22T07:00:'
    return log


def unsigned_end() -> Log:
    log = valid()
    log.begin(THIRD)
    log.end(THIRD)
    return log


def unsigned() -> Log:
    log = Log()
    log.begin(FIRST)
    log.end(FIRST)
    return log


def edited() -> Log:
    log = valid()
    log.sessions[FIRST][2] = forged(log.sessions[FIRST][2])
    return log


def edited_last_line() -> Log:
    log = valid()
    log.sessions[FIRST][-1] = log.sessions[FIRST][-1].replace(b"closed", b"max_age")
    return log


def deleted() -> Log:
    log = valid()
    del log.sessions[FIRST][2]
    return log


def inserted() -> Log:
    log = valid()
    log.sessions[FIRST].insert(2, forged(log.sessions[FIRST][2]))
    return log


def forged_root() -> Log:
    """Whoever has no key appends a head with another root, just before the next one signs."""
    log = valid()
    log.enter("Head", **log.head(FIRST), root="A" * 43 + "=")
    log.begin(THIRD, SECOND)
    log.end(THIRD)
    log.sign()
    return log


def duplicated() -> Log:
    log = valid()
    log.sessions[FIRST].insert(2, log.sessions[FIRST][1])
    return log


def reordered() -> Log:
    log = valid()
    lines = log.sessions[FIRST]
    lines[2], lines[3] = lines[3], lines[2]
    return log


def cut() -> Log:
    log = valid()
    del log.sessions[FIRST][-2:]
    return log


def appended() -> Log:
    log = valid()
    log.record(FIRST)
    return log


def missing_file() -> Log:
    log = valid()
    del log.sessions[FIRST]
    return log


def renamed_file() -> Log:
    log = valid()
    log.names[FIRST] = name(FIRST).replace("20261122", "20261121")
    return log


def planted_file() -> Log:
    log = not_entered()
    log.complete(THIRD)
    return log


def missing_journal() -> Log:
    log = valid()
    log.journal = []
    return log


def edited_journal() -> Log:
    log = valid()
    log.journal[1] = log.journal[1].replace(b"node-7", b"node-8")
    return log


def rewritten_journal() -> Log:
    log = valid()
    lost = log.journal.pop()
    log.enter("Rewritten", expected={"number": len(log.journal) + 1, "hash": line_hash(lost)})
    log.sign()
    return log


def recomputed(keys: list[SigningKey] | None) -> Log:
    """Record the same again, but for one entry; sign with other keys, or not at all."""
    log = Log()
    log.keys = keys or []
    log.begin(FIRST)
    log.record(FIRST, 2)
    log.sessions[FIRST][3] = forged(log.sessions[FIRST][3])
    log.sessions[FIRST] = relinked(log.sessions[FIRST], FIRST)
    log.end(FIRST)
    if keys:
        log.sign()
    log.notes = valid().notes
    return log


def wrong_signature() -> Log:
    log = valid()
    text, _, signature = log.notes[-1].rpartition(" ")
    wrong = "A" * 10 if signature[10:20] != "A" * 10 else "B" * 10
    bad = f"{text} {signature[:10]}{wrong}{signature[20:]}"
    log.journal.pop()
    log.enter("Checkpoint", note=bad, entries=10_000, interval=900.0)
    return log


def rolled_back() -> Log:
    log = valid()
    del log.sessions[SECOND]
    log.journal = log.journal[:4]
    return log


def two_histories() -> Log:
    log = valid()
    other = Log()
    other.begin(THIRD)
    other.end(THIRD)
    other.sign()
    log.notes = other.notes
    return log


def newer() -> Log:
    log = Log()
    log.begin(FIRST)
    log.sessions[FIRST][0] = log.sessions[FIRST][0].replace(b'"format":1', b'"format":2')
    log.sessions[FIRST] = relinked(log.sessions[FIRST], FIRST)
    log.journal.pop()
    log.enter("Open", file=name(FIRST), **log.head(FIRST))
    log.record(FIRST, 2)
    log.end(FIRST)
    log.sign()
    return log


def tampered(*kinds: str) -> Expected:
    return ("tampered", *kinds)


def everywhere(make: Callable[[], Log], *expected: str) -> Vector:
    return make, expected, expected, expected


UNSIGNED = ("incomplete", "unsigned")
VECTORS: dict[str, Vector] = {
    "valid": everywhere(valid, "valid"),
    "valid-broken-session": everywhere(broken_session, "valid"),
    "valid-compressed": everywhere(compressed, "valid"),
    "valid-rotated-keys": everywhere(rotated_keys, "valid"),
    "incomplete-crash": everywhere(crash, "incomplete", "unfinished"),
    "incomplete-torn": everywhere(torn, "incomplete", "unfinished"),
    "incomplete-power-failure": everywhere(power_failure, "incomplete", "unfinished"),
    "incomplete-not-entered": everywhere(not_entered, "incomplete", "not-entered"),
    "incomplete-empty-file": everywhere(empty_file, "incomplete", "empty"),
    "incomplete-torn-journal": everywhere(torn_journal, "incomplete", "torn"),
    "incomplete-unsigned-end": (unsigned_end, VALID, UNSIGNED, UNSIGNED),
    "tampered-unsigned": (unsigned, VALID, tampered("not-signed"), tampered("not-signed")),
    "tampered-edited": everywhere(edited, "tampered", "edited"),
    "tampered-edited-last-line": everywhere(edited_last_line, "tampered", "altered"),
    "tampered-deleted": everywhere(deleted, "tampered", "deleted"),
    "tampered-inserted": everywhere(inserted, "tampered", "inserted"),
    "tampered-forged-root": (forged_root, VALID, tampered("inserted"), tampered("inserted")),
    "tampered-duplicated": everywhere(duplicated, "tampered", "duplicated"),
    "tampered-reordered": everywhere(reordered, "tampered", "reordered"),
    "tampered-cut": everywhere(cut, "tampered", "cut"),
    "tampered-appended": everywhere(appended, "tampered", "appended"),
    "tampered-missing-file": everywhere(missing_file, "tampered", "missing"),
    "tampered-renamed-file": everywhere(renamed_file, "tampered", "renamed"),
    "tampered-planted-file": everywhere(planted_file, "tampered", "planted"),
    "tampered-missing-journal": everywhere(missing_journal, "tampered", "journal-missing",
                                           "planted"),
    "tampered-edited-journal": everywhere(edited_journal, "tampered", "edited"),
    "tampered-rewritten-journal": everywhere(rewritten_journal, "tampered", "rewritten"),
    "tampered-recomputed": (lambda: recomputed(None), VALID, tampered("not-signed"),
                            tampered("anchor")),
    "tampered-other-key": (lambda: recomputed([STRANGER]), VALID, tampered("not-signed"),
                           tampered("anchor")),
    "tampered-own-key": (lambda: recomputed([OLD]), VALID, VALID, tampered("anchor")),
    "tampered-expired-key": (expired_key, VALID, tampered("key-expired"),
                             tampered("key-expired")),
    "tampered-wrong-signature": (wrong_signature, VALID, tampered("signature"),
                                 tampered("signature")),
    "tampered-rolled-back": (rolled_back, VALID, VALID, tampered("anchor")),
    "tampered-two-histories": (two_histories, VALID, VALID, tampered("anchor")),
    "unreadable-newer": everywhere(newer, "unreadable", "newer"),
}  # fmt: skip


def make(home: Path) -> None:
    """Write all vectors into a directory."""
    for vector, (build, *expected) in VECTORS.items():
        shutil.rmtree(home / vector, ignore_errors=True)
        build().write(home / vector)
        names = ("chain", "key", "anchor")
        verdicts = {
            each: {"verdict": verdict, "kinds": sorted(kinds)}
            for each, (verdict, *kinds) in zip(names, expected, strict=True)
        }
        text = json.dumps(verdicts, indent=1) + "\n"
        (home / vector / "expected.json").write_bytes(text.encode())


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else HOME)
