"""The signed heads of a journal: what its newest checkpoint vouches for in each session."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.holds import parse_time
from structlog_audit.journal import journal_origin
from structlog_audit.merkle import Tree, leaf_hash
from structlog_audit.note import Checkpoint, NoteError, VerifierKey, open_note
from structlog_audit.source import Lines, Source, Unreadable


@dataclass(frozen=True, slots=True)
class Head:
    """A head of a session.

    Attributes:
        line: the line of the journal that tells it.
        number: of that line.
        session: the session.
        sequence: number of its last line.
        root: of the tree over its lines up to that one.
    """

    line: bytes
    number: int
    session: str
    sequence: int
    root: bytes


@dataclass(slots=True)
class SignedHeads:
    """What a checkpoint vouches for.

    Attributes:
        first: the journal's first line.
        note: the checkpoint; None if there is none.
        heads: the last head of each session that it covers.
        last: the last line that it covers, which tells when that was.
        tree: over all lines that it covers.
    """

    first: bytes = b""
    note: str | None = None
    heads: dict[str, Head] = field(default_factory=dict)
    last: bytes = b""
    tree: Tree = field(default_factory=lambda: Tree([]))


@dataclass(frozen=True, slots=True)
class _Note:
    """A checkpoint, the number of lines before it, the last of these, and when it was written."""

    note: str
    size: int
    before: bytes
    time: str


def read_signed_heads(path: str, keys: Sequence[VerifierKey]) -> SignedHeads:
    """Read a journal up to the newest checkpoint that can be relied on.

    Args:
        path: the journal.
        keys: one of them must have signed it, in its time; without keys, anybody may.

    Raises:
        AuditConfigurationError: it cannot be read as a journal.
    """
    leaves: list[bytes] = []
    heads: list[Head] = []
    notes: list[_Note] = []
    first = before = b""
    try:
        for line in _lines(path):
            fields = orjson.loads(line)
            if "root" in fields:
                heads.append(_head(line, len(leaves) + 1, fields))
            if fields.get("event") == "Checkpoint":
                notes.append(_Note(str(fields["note"]), len(leaves), before, str(fields["time"])))
            leaves.append(leaf_hash(line))
            first, before = first or line, line
    except (Unreadable, ValueError, KeyError, TypeError, AttributeError):
        raise AuditConfigurationError(
            f"{path} cannot be read as a journal", hint="run structlog-audit verify on the log"
        ) from None
    origins = {journal_origin(key.name, first) for key in keys}
    for note in reversed(notes):
        checkpoint = _opened(note, keys, origins)
        if checkpoint is None or checkpoint.size != note.size:
            continue
        tree = Tree(leaves[: note.size])
        if tree.root() == checkpoint.root:
            covered = {head.session: head for head in heads if head.number <= note.size}
            return SignedHeads(first, note.note, covered, note.before, tree)
    return SignedHeads(first)


def _lines(path: str) -> Iterator[bytes]:
    with Source(path) as source:
        for lines in Lines(source.chunks()):
            yield from lines


def _head(line: bytes, number: int, fields: dict[str, Any]) -> Head:
    try:
        root = b64decode(fields["root"], validate=True)
    except (ValueError, TypeError):
        root = b""  # anybody may have written it: it fits no session
    return Head(line, number, str(fields["session"]), int(fields["sequence"]), root)


def _opened(note: _Note, keys: Sequence[VerifierKey], origins: set[str]) -> Checkpoint | None:
    """Return a checkpoint, if a key has signed it in its time."""
    try:
        if not keys:
            return Checkpoint.parse(note.note[: note.note.rindex("\n\n") + 1])
        text, signers = open_note(note.note, keys)
        checkpoint = Checkpoint.parse(text)
        times = [parse_time(note.time), parse_time(orjson.loads(note.before)["time"])]
    except (NoteError, ValueError, KeyError, TypeError, AttributeError):
        return None
    in_time = any(all(map(key.valid_at, times)) for key in signers)
    return checkpoint if in_time and checkpoint.origin in origins else None
