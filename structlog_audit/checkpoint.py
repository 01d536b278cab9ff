"""Checkpoints: signatures over the journal and the heads of sessions, off the path of callers.

1. A checkpoint is a signed note (C2SP signed-note, tlog-checkpoint): the number of lines in the
   journal, and the root of the Merkle tree over them (RFC 6962). It stands in a line of the journal
   itself, behind the lines that it signs.
2. In front of it stands the head of our session: its last acknowledged line, and the root of the
   Merkle tree over the session's lines up to it. So one signature covers both. The note says how
   many lines in front of it are its signer's: others may have appended what it covers as well.
3. There is one at a session's end, after so many entries, and after so many seconds even if
   nothing happened. A thread of our own does it; callers do not wait, except at a session's end.
4. The session's lines are read back from its file, and must be linked up to the last one that was
   acknowledged. Otherwise the file was changed, which is said, and its root is not signed.
5. A session that was left without an end, because its process was killed, gets one as it is
   found, by whoever signs next (`orphans.py`): by the thread, or at the latest when we close.
6. A note may be sent elsewhere, as an entry, by a handler of its own: an anchor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from structlog_audit.anchoring import Anchor, Anchoring, Trouble, wait_for
from structlog_audit.chain import line_hash
from structlog_audit.exceptions import AuditConfigurationError, AuditError, SinkError
from structlog_audit.helper import Helper
from structlog_audit.journal import Event, Journal, journal_origin
from structlog_audit.merkle import Frontier
from structlog_audit.note import (
    Checkpoint,
    NoteError,
    SigningKey,
    load_signing_keys,
    open_note,
    read_signing_keys,
    sign,
)
from structlog_audit.orphans import ends_as_found
from structlog_audit.session_tree import SessionTree

DEFAULT_ENTRIES = 10_000
DEFAULT_INTERVAL = 900.0
"""Seconds; systemd-journald seals as often (`journald.conf`, FSS)."""
TREE_EVERY = 64
"""Checkpoints between those that carry the tree's hashes, from which another process goes on."""
PATIENCE = 10.0
"""Seconds to wait for a checkpoint that is under way."""

_log = logging.getLogger("structlog_audit")


class Head(NamedTuple):
    """The last acknowledged line of a session, with its newline."""

    session: str
    sequence: int
    line: bytes

    def as_dict(self) -> dict[str, object]:
        """Return what a line of the journal says of it."""
        return {
            "session": self.session,
            "sequence": self.sequence,
            "hash": line_hash(self.line[:-1]),
        }


class Signer:
    """Signs checkpoints with a key, or with several during a rotation.

    Args:
        key_file: file with the private keys, as `structlog-audit keygen` writes them.
        entries: a checkpoint after so many entries of a session.
        interval: a checkpoint after so many seconds, also when nothing happened.
        anchor: a handler that records the notes elsewhere.

    Raises:
        AuditConfigurationError: the file holds no usable key, or others may read it; or the
            package `cryptography` is missing.
    """

    _key_file: str | None = None
    keys: tuple[SigningKey, ...] = ()

    def __init__(
        self,
        key_file: str | os.PathLike[str],
        *,
        entries: int = DEFAULT_ENTRIES,
        interval: float = DEFAULT_INTERVAL,
        anchor: Anchor | None = None,
    ) -> None:
        self._configure(load_signing_keys(key_file), entries, interval, anchor)
        self._key_file = os.path.abspath(os.fsdecode(key_file))

    @classmethod
    def from_text(
        cls,
        keys: str,
        *,
        entries: int = DEFAULT_ENTRIES,
        interval: float = DEFAULT_INTERVAL,
        anchor: Anchor | None = None,
    ) -> Signer:
        """Take the private keys as text, as a variable of the environment may hold them.

        Args:
            keys: one or several, each on a line.
            entries: see the class.
            interval: see the class.
            anchor: see the class.

        Raises:
            AuditConfigurationError: it holds no usable key.
        """
        signer, problem = cls.__new__(cls), None
        loaded: tuple[SigningKey, ...] = ()
        try:
            loaded = read_signing_keys(keys)
        except AuditConfigurationError as error:
            problem = error
        del keys  # a traceback that shows variables shall not show this one
        if problem is not None:
            raise problem.with_traceback(None) from None
        signer._configure(loaded, entries, interval, anchor)
        return signer

    def _configure(
        self, keys: Sequence[SigningKey], entries: int, interval: float, anchor: Anchor | None
    ) -> None:
        if not keys:
            raise AuditConfigurationError("there is no key to sign with")
        if not isinstance(entries, int) or entries < 1:
            raise AuditConfigurationError(f"entries must be a number above 0, not {entries!r}")
        if not 0 < interval <= threading.TIMEOUT_MAX:
            raise AuditConfigurationError(f"interval must be seconds above 0, not {interval!r}")
        self.keys = tuple(keys)
        self.entries = entries
        self.interval = float(interval)
        self.anchor = anchor

    def __repr__(self) -> str:
        return f"Signer({', '.join(repr(key) for key in self.keys)})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._key_file is None:
            raise TypeError("a signer is pickled by its key file, and this one has none")
        return _signer, (self._key_file, self.entries, self.interval, self.anchor)

    def check(self) -> None:
        """Make sure that the anchor can record, if there is one.

        Raises:
            SinkError: it cannot.
        """
        try:
            if self.anchor is not None:
                self.anchor.check()
        except AuditError as error:
            reason = f"the anchor for checkpoints: {error.reason}"
            raise SinkError(reason, persisted="no", hint=error.hint) from error

    def sign(self, tree: Frontier, first_line: bytes, *, with_tree: bool, acts: int) -> Event:
        """Return what a line with a checkpoint tells.

        Args:
            tree: the tree over all lines before it.
            first_line: the journal's first line.
            with_tree: put the tree's hashes into it, for another process to go on from.
            acts: how many lines in front of it are ours, written together with it: we vouch for
                what they tell.
        """
        origin = journal_origin(self.keys[0].name, first_line)
        text = Checkpoint(origin, tree.size, tree.root(), acts).text()
        hashes = [b64encode(item).decode() for item in tree.hashes]
        return {
            "event": "Checkpoint",
            "note": sign(text, self.keys),
            "entries": self.entries,
            "interval": self.interval,
            **({"tree": hashes} if with_tree else {}),
        }

    def restore(self, line: bytes, first_line: bytes) -> Frontier | None:
        """Return the tree that stands in a line, if we have signed it for this journal."""
        try:
            fields = orjson.loads(line)
            text, _ = open_note(fields["note"], tuple(key.verifier for key in self.keys))
            checkpoint = Checkpoint.parse(text)
            tree = Frontier.restore(
                checkpoint.size, [b64decode(item, validate=True) for item in fields["tree"]]
            )
        except (ValueError, KeyError, TypeError, NoteError):
            return None
        ours = checkpoint.origin == journal_origin(self.keys[0].name, first_line)
        return tree if ours and tree.root() == checkpoint.root else None


def _signer(key_file: str, entries: int, interval: float, anchor: Anchor | None) -> Signer:
    return Signer(key_file, entries=entries, interval=interval, anchor=anchor)


class Checkpoints:
    """The checkpoints of one sink: one session at a time.

    Args:
        journal: where they stand.
        signer: signs them.
    """

    def __init__(self, journal: Journal, signer: Signer) -> None:
        self._journal = journal
        self._signer = signer
        self._signed = 0
        self._count = 0
        of, anchor = journal.path, signer.anchor
        self._signing = Trouble(f"signing of {of}")
        self._looking = Trouble(f"looking for sessions without a process in {of}")
        self._anchoring = None if anchor is None else Anchoring(anchor, of)
        self._looked = False  # for sessions whose process is gone: once is enough
        self._own = ""  # name of our last file, which is none of these, locked or not
        self._renew()

    def _renew(self) -> None:
        """Have locks that nobody holds, and no thread, as a forked child must."""
        self._pid = os.getpid()
        self._work = threading.Lock()
        self._helper = Helper(self._turn)
        self._session: SessionTree | None = None
        self._head: Head | None = None
        self._ended = False  # the last session of ours has its end in the journal
        if self._anchoring is not None:
            self._anchoring.after_fork()

    def begin(self, path: str) -> None:
        """Begin with a session's file."""
        self._session = SessionTree(path)
        self._own = os.path.basename(path)
        self._ended = False
        self._signed = 0
        self._head = None

    def notice(self, head: Head) -> None:
        """Learn what was acknowledged."""
        is_first, self._head = self._head is None, head
        if is_first or head.sequence - self._signed >= self._signer.entries:
            self._signed = head.sequence  # one order is enough
            with contextlib.suppress(RuntimeError):  # no more threads: the session's end is signed
                self._helper.order(0.0)

    def end(self, events: Sequence[Event]) -> None:
        """Enter the ends of sessions, and sign them.

        Raises:
            SinkError: the journal does not take them.
        """
        with self._working():
            *before, last = events
            session, head = self._session, self._head
            if session is not None and head is not None:
                last = {**last, **self._root(session, head, gently=False)}
            self._ended = False
            self._append([*before, last])
            self._ended = True
            self._session = self._head = None

    def forget(self) -> None:
        """Let go of the session: it is over, or another process's."""
        if os.getpid() != self._pid:
            self._renew()
        self._session = self._head = None

    def settle(self) -> None:
        """Wait until the thread has left the directory alone, and the last note is anchored.

        A session may have been too short for the thread to look for others without an end. It does
        so now, unless the journal took no end of ours: it would take that for such a one.

        Raises:
            SinkError: it is not.
        """
        wait_for(self._helper, lambda: self._look() if self._ended else None)
        self._helper.stop()
        if self._anchoring is not None:
            self._anchoring.settle()

    def _turn(self) -> float | None:
        """Sign where the session is; return when to do so again, also when nothing happens."""
        if self._session is None:
            return None
        self._signing.guard(self._checkpoint)
        self._look()
        return self._signer.interval

    def _look(self) -> None:
        if not self._looked:
            self._looking.guard(self._enter_orphans)

    def _checkpoint(self) -> None:
        with self._working():
            session, head = self._session, self._head
            if session is not None and head is not None:
                root = self._root(session, head, gently=True)
                self._append([{"event": "Head", **head.as_dict(), **root}])
                self._signed = head.sequence

    def _enter_orphans(self) -> None:
        """Enter the ends of sessions whose process is gone, as they are found."""
        self._looked = True
        found = ends_as_found(os.path.dirname(self._journal.path), self._journal.path)
        ends = [end for end in found if end["file"] != self._own]
        if ends:
            with self._working():
                if self._session is None and not self._ended:  # somebody else looks again
                    self._looked = False
                else:
                    self._append(ends)

    def _root(self, session: SessionTree, head: Head, *, gently: bool) -> dict[str, object]:
        """Return the root over a session's lines; nothing if the file does not hold them."""
        try:
            if session.covers(head.sequence, line_hash(head.line[:-1]), gently=gently):
                return {"root": session.root_text()}
            reason = f"was changed: its line {session.size + 1:,} is not the one that was recorded"
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
        _log.error("the session file of %s in %s %s; keep it for an investigation",
                   head.session, os.path.dirname(self._journal.path), reason)  # fmt: skip
        return {}

    def _append(self, events: Sequence[Event]) -> None:
        note = ""

        def signed(tree: Frontier, first_line: bytes) -> Event:
            nonlocal note
            with_tree = self._count % TREE_EVERY == 0
            event = self._signer.sign(tree, first_line, with_tree=with_tree, acts=len(events))
            note = str(event["note"])
            return event

        self._journal.append_signed(events, signed, self._signer.restore)
        self._count += 1
        if self._anchoring is not None:
            self._anchoring.offer(note)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        if not self._work.acquire(timeout=PATIENCE):
            raise SinkError(f"a checkpoint has been under way for {PATIENCE:g} s", persisted="no")
        try:
            yield
        finally:
            self._work.release()
