"""Proofs: one entry was recorded, shown without any other entry.

1. The entry is in the session: its line is a leaf of the Merkle tree over the session's lines.
2. The root of that tree stands in a line of the journal, with the session's head.
3. That line is a leaf of the Merkle tree over the journal, whose root a note signs; and one of
   those directly in front of the note, of which it says that its signer wrote them. What else it
   covers may be anybody's who could append to the journal.

So a proof holds the entry's line, the line of the journal, the note, and two inclusion proofs of
RFC 6962. It is checked with the public key alone (`structlog-audit verify-proof`).
"""

from __future__ import annotations

import os
import re
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import orjson

from structlog_audit.chain import identity, line_hash
from structlog_audit.entry import Receipt
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.merkle import inclusion_proof, leaf_hash, verify_inclusion
from structlog_audit.names import SESSION_FILE, journal_name
from structlog_audit.note import Checkpoint, NoteError, VerifierKey, open_note, text_of
from structlog_audit.source import Lines, Source, Unreadable

FORMAT = "structlog-audit/proof/1"


class ProofError(AuditConfigurationError):
    """Raised when something cannot be proven, or a proof does not hold.

    Attributes:
        contradicts: the log, or the proof, says something else than it should: it was changed.
    """

    def __init__(self, reason: str, *, hint: str | None = None, contradicts: bool = False) -> None:
        super().__init__(reason, hint=hint)
        self.contradicts = contradicts


@dataclass(frozen=True, slots=True)
class Proven:
    """What a proof shows.

    Attributes:
        line: the entry's line, without its newline.
        session: identity of its session.
        sequence: its position there.
        origin: name of the log that was signed.
        keys: the keys that signed, as text.
        time: time of the line in the journal that covers it, as the signer's clock had it.
    """

    line: bytes
    session: str
    sequence: int
    origin: str
    keys: tuple[str, ...]
    time: str


def read_receipt(text: bytes) -> Receipt:
    """Read a receipt from JSON: what an audit call returned, as an object with its four fields.

    Raises:
        ProofError: it is none.
    """
    try:
        fields = orjson.loads(text)
        receipt = Receipt(
            fields["session"], fields["sequence"], fields["hash"], fields.get("time", "")
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ProofError(
            "this is no receipt",
            hint='a receipt is a JSON object: {"session": …, "sequence": …, "hash": …, "time": …}',
        ) from None
    if not (isinstance(receipt.session, str) and re.fullmatch("[a-z0-9]{20}", receipt.session)
            and type(receipt.sequence) is int and receipt.sequence > 0
            and isinstance(receipt.hash, str)):  # fmt: skip
        raise ProofError("this receipt has no usable session, sequence and hash")
    return receipt


def read_proof(text: bytes) -> dict[str, Any]:
    """Read a proof from JSON.

    Raises:
        ProofError: it is no JSON object.
    """
    try:
        proof = orjson.loads(text)
    except ValueError:
        proof = None
    if not isinstance(proof, dict):
        raise ProofError("this is no proof", hint="structlog-audit prove makes one")
    return proof


def prove(receipt: Receipt, directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Prove that the entry of a receipt is in a log.

    Args:
        receipt: what the audit call returned.
        directory: where the session files and the journal are.

    Returns:
        The proof, to be kept as JSON.

    Raises:
        ProofError: it cannot be proven: the session is not there, or nothing that covers the entry
            is signed yet; or the log contradicts the receipt.
    """
    path, journal = _find(os.fsdecode(directory), receipt.session)
    try:
        head_line, head, note = _covering(journal, receipt)
        size, index, number = int(head["sequence"]), receipt.sequence - 1, int(head["number"])
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ProofError(
            f"{journal} is no journal as it was written",
            hint="keep it, and run structlog-audit verify on the directory", contradicts=True,
        ) from None  # fmt: skip
    session_proof, line = _proof_of_line(path, index, size)
    if line_hash(line) != receipt.hash:
        raise ProofError(
            f"{path} contradicts the receipt: its line {receipt.sequence} has another hash",
            hint="keep both, and run structlog-audit verify on the directory", contradicts=True,
        )  # fmt: skip
    journal_proof, _ = _proof_of_line(journal, number - 1, Checkpoint.parse(text_of(note)).size)
    return {
        "format": FORMAT,
        "receipt": receipt._asdict(),
        "entry": line.decode(),
        "entryProof": _texts(session_proof),
        "head": head_line.decode(),
        "headProof": _texts(journal_proof),
        "checkpoint": note,
    }


def verify_proof(proof: Mapping[str, Any], keys: Sequence[VerifierKey]) -> Proven:
    """Check a proof with public keys alone.

    Args:
        proof: what `prove` returned.
        keys: the public keys to trust.

    Raises:
        ProofError: it does not hold.
    """
    try:
        if proof["format"] != FORMAT:
            raise ProofError(f"this is no proof of the format {FORMAT}")
        receipt = read_receipt(orjson.dumps(proof["receipt"]))
        line, head_line = proof["entry"].encode(), proof["head"].encode()
        text, signed_by = open_note(proof["checkpoint"], tuple(keys))
        checkpoint = Checkpoint.parse(text)
        entry_proof = _hashes(proof["entryProof"])
        head_proof = _hashes(proof["headProof"])
        named, head = identity(line), _read_head(head_line)
    except NoteError as error:
        raise ProofError(f"its checkpoint does not hold: {error}", contradicts=True) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ProofError("this proof is not whole") from None
    for holds, what in (
        (line_hash(line) == receipt.hash, "the entry is not that of the receipt"),
        (named == (receipt.session, receipt.sequence), "the entry has another place in the log"),
        (head.session == receipt.session, "the head is that of another session"),
        (
            verify_inclusion(
                leaf_hash(line), receipt.sequence - 1, head.sequence, entry_proof, head.root
            ),
            "the entry is not in the session whose head was signed",
        ),
        (
            verify_inclusion(
                leaf_hash(head_line), head.number - 1, checkpoint.size, head_proof, checkpoint.root
            ),
            "the head is not in the journal that was signed",
        ),
        (checkpoint.vouches_for(head.number), "the head is none that the signer wrote"),
    ):
        if not holds:
            raise ProofError(f"the proof does not hold: {what}", contradicts=True)
    if not any(key.valid_at(head.when) for key in signed_by):
        raise ProofError(f"the key was not valid at {head.time}", contradicts=True)
    return Proven(line, receipt.session, receipt.sequence, checkpoint.origin,
                  tuple(map(str, signed_by)), head.time)  # fmt: skip


class _Head(NamedTuple):
    """A line of the journal with the head of a session.

    Attributes:
        session: identity of the session.
        sequence: how many lines of it the head covers.
        root: of the tree over these.
        number: of the line in the journal.
        time: of the line, as it stands there.
        when: the same.
    """

    session: object
    sequence: int
    root: bytes
    number: int
    time: str
    when: datetime


def _read_head(line: bytes) -> _Head:
    """Read the head of a session.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    fields = orjson.loads(line)
    time = str(fields["time"])
    when = datetime.fromisoformat(time.replace("Z", "+00:00"))
    if when.tzinfo is None or fields["event"] not in ("Head", "Close", "Break"):
        raise ValueError(time)
    return _Head(fields.get("session"), int(fields["sequence"]), b64decode(fields["root"]),
                 int(fields["number"]), time, when)  # fmt: skip


def _find(directory: str, session: str) -> tuple[str, str]:
    """Find a session's file, and its journal."""
    try:
        names = os.listdir(directory)
    except OSError as error:
        raise ProofError(f"cannot look into {directory}: {error.strerror}") from error
    for name in sorted(names):  # the original before a copy
        found = SESSION_FILE.fullmatch(name)
        if found is not None and found["session"] == session:
            journal = os.path.join(directory, journal_name(found["prefix"]))
            if not os.path.isfile(journal):
                raise ProofError(f"there is no journal {journal}", contradicts=True)
            return os.path.join(directory, name), journal
    raise ProofError(
        f"there is no file of the session {session} in {directory}",
        hint="name the directory that holds it; if this is the one, run structlog-audit verify",
    )


def _covering(journal: str, receipt: Receipt) -> tuple[bytes, dict[str, Any], str]:
    """Find the first head of the session at or behind the entry that a signer wrote, and its note.

    What stands before another note, or is none of the signer's own lines, may be anybody's.
    """
    named = receipt.session.encode()
    heads: list[tuple[bytes, dict[str, Any]]] = []
    for line in _lines(journal):
        if named in line and b'"root":' in line:
            fields = orjson.loads(line)
            if fields["session"] == receipt.session and fields["sequence"] >= receipt.sequence:
                heads.append((line, fields))
        elif heads and b'"event":"Checkpoint"' in line:
            note = str(orjson.loads(line)["note"])
            checkpoint = Checkpoint.parse(text_of(note))
            for head in heads:
                if checkpoint.vouches_for(int(head[1]["number"])):
                    return *head, note
            heads.clear()
    raise ProofError(
        f"no checkpoint covers the entry {receipt.sequence} of the session {receipt.session}",
        hint="without a key nothing is signed; with one, the next checkpoint covers it, or, if its "
        "process was killed, that of the next one that signs there",
    )


def _proof_of_line(path: str, index: int, size: int) -> tuple[list[bytes], bytes]:
    """Return the proof that a line stands in a file, among its first lines, and that line."""
    found = b""

    def leaves() -> Iterator[bytes]:
        nonlocal found
        for number, line in enumerate(_lines(path)):
            if number == index:
                found = line
            yield leaf_hash(line)

    ahead = leaves()
    try:
        proof = inclusion_proof(ahead, index, size)
        while not found and next(ahead, None):  # it may stand behind all that the proof needs
            pass
        return proof, found
    except ValueError as error:
        raise ProofError(
            f"{path} has fewer lines than were signed: {error}",
            hint="keep it, and run structlog-audit verify on the directory", contradicts=True,
        ) from None  # fmt: skip


def _lines(path: str) -> Iterator[bytes]:
    """Return the whole lines of a file, which may be compressed."""
    try:
        with Source(path, follow=False) as source:
            for lines in Lines(source.chunks()):
                yield from lines
    except Unreadable as error:
        raise ProofError(f"cannot read {path}: {error.reason}") from None


def _texts(hashes: Sequence[bytes]) -> list[str]:
    return [b64encode(each).decode() for each in hashes]


def _hashes(texts: Sequence[str]) -> list[bytes]:
    return [b64decode(text, validate=True) for text in texts]
