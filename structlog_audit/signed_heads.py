"""The signed heads of a journal: what its signers vouch for in each session.

A checkpoint covers all lines before it, also those that somebody else appended. Of these its signer
vouches for the ones that it says are its own, directly in front of it.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.holds import parse_time
from structlog_audit.journal import journal_origin
from structlog_audit.merkle import Frontier, Tree, leaf_hash
from structlog_audit.note import Checkpoint, NoteError, VerifierKey, open_note, text_of
from structlog_audit.source import Lines, Source, Unreadable


@dataclass(frozen=True, slots=True)
class Head:
    """A head of a session, which the signer of a note wrote in front of it.

    Attributes:
        line: the line of the journal that tells it.
        number: of that line.
        session: the session.
        sequence: number of its last line.
        root: of the tree over its lines up to that one.
        time: of the line.
        note: the note.
        size: how many lines that covers.
    """

    line: bytes
    number: int
    session: str
    sequence: int
    root: bytes
    time: str
    note: str = ""
    size: int = 0


@dataclass(slots=True)
class SignedHeads:
    """What checkpoints vouch for.

    Attributes:
        first: the journal's first line.
        note: the newest checkpoint; None if there is none.
        heads: the last head of each session that a signer wrote.
        last: the last line that the newest one covers, which tells when that was.
        tree: over all lines that the newest one covers.
    """

    first: bytes = b""
    note: str | None = None
    heads: dict[str, Head] = field(default_factory=dict)
    last: bytes = b""
    tree: Tree = field(default_factory=lambda: Tree([]))


def read_signed_heads(path: str, keys: Sequence[VerifierKey]) -> SignedHeads:
    """Read a journal up to the newest checkpoint that can be relied on.

    Args:
        path: the journal.
        keys: one of them must have signed a checkpoint, in its time, so that it counts; without
            keys, anybody may.

    Raises:
        AuditConfigurationError: it cannot be read as a journal.
    """
    reading = _Reading(keys)
    try:
        for line in _lines(path):
            reading.take(line, orjson.loads(line))
    except (Unreadable, ValueError, KeyError, TypeError, AttributeError):
        raise AuditConfigurationError(
            f"{path} cannot be read as a journal", hint="run structlog-audit verify on the log"
        ) from None
    return reading.result()


class _Reading:
    """A journal that is read, line by line."""

    def __init__(self, keys: Sequence[VerifierKey]) -> None:
        self._keys = keys
        self._signed = SignedHeads()
        self._leaves: list[bytes] = []
        self._tree = Frontier()
        self._size = 0  # lines that the newest checkpoint covers
        self._heads: list[Head] = []  # in front of the next one
        self._before = b""

    def take(self, line: bytes, fields: dict[str, Any]) -> None:
        """Take a line in, and what it tells."""
        self._signed.first = self._signed.first or line
        if "root" in fields:
            self._heads.append(_head(line, self._tree.size + 1, fields))
        if fields.get("event") == "Checkpoint":
            self._vouch(str(fields["note"]), str(fields.get("time")))
            self._heads.clear()
        self._leaves.append(leaf_hash(line))
        self._tree.append(self._leaves[-1])
        self._before = line

    def _vouch(self, note: str, time: str) -> None:
        opened = self._opened(note)
        if opened is None:
            return
        checkpoint, signers = opened
        known = (checkpoint.size, checkpoint.root) == (self._tree.size, self._tree.root())
        if not known or not _in_time(signers, time, _time_of(self._before)):
            return
        self._signed.note, self._signed.last = note, self._before
        self._size = checkpoint.size
        for head in self._heads:
            if checkpoint.vouches_for(head.number) and _in_time(signers, head.time):
                signed = replace(head, note=note, size=checkpoint.size)
                self._signed.heads[head.session] = signed

    def _opened(self, note: str) -> tuple[Checkpoint, Sequence[VerifierKey] | None] | None:
        """Return a checkpoint and who signed it, if it is one of this journal by a given key."""
        try:
            if not self._keys:
                return Checkpoint.parse(text_of(note)), None
            text, signers = open_note(note, self._keys)
            checkpoint = Checkpoint.parse(text)
        except NoteError:
            return None
        origins = {journal_origin(key.name, self._signed.first) for key in self._keys}
        return (checkpoint, signers) if checkpoint.origin in origins else None

    def result(self) -> SignedHeads:
        """Return what was found."""
        self._signed.tree = Tree(self._leaves[: self._size])
        return self._signed


def _lines(path: str) -> Iterator[bytes]:
    with Source(path) as source:
        for lines in Lines(source.chunks()):
            yield from lines


def _head(line: bytes, number: int, fields: dict[str, Any]) -> Head:
    try:
        root = b64decode(fields["root"], validate=True)
    except (ValueError, TypeError):
        root = b""  # anybody may have written it: it fits no session
    return Head(line, number, str(fields["session"]), int(fields["sequence"]), root,
                str(fields.get("time")))  # fmt: skip


def _time_of(line: bytes) -> str:
    return str(orjson.loads(line).get("time"))


def _in_time(signers: Sequence[VerifierKey] | None, *times: str) -> bool:
    """Tell whether one of those who signed may sign at these times; without keys, anybody may."""
    if signers is None:
        return True
    try:
        moments = [parse_time(time) for time in times]
    except ValueError:
        return False
    return any(all(map(key.valid_at, moments)) for key in signers)
