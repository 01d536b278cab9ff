"""A survey of a directory: which sessions are old enough to go, and what is known of each."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

from structlog_audit.chain import line_hash
from structlog_audit.cursor import STATE
from structlog_audit.directory import find
from structlog_audit.evidence import Evidence, read_journal
from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.facts import Facts
from structlog_audit.holds import Hold, parse_time
from structlog_audit.names import COPIES, SESSION_FILE, journal_name, session_names
from structlog_audit.note import VerifierKey
from structlog_audit.retention import Session, why_it_stays
from structlog_audit.scan import last_of
from structlog_audit.source import Lines, Source, Unreadable, first_line
from structlog_audit.spool import Spool
from structlog_audit.verify import verify

WINDOW = 2**16
"""Bytes of a file's end in which to look for its last line."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What may go, and what stays although it is old enough.

    Attributes:
        goes: the oldest first.
        stays: with the reason why.
        younger: how many sessions are not old enough.
    """

    goes: tuple[Session, ...]
    stays: tuple[tuple[Session, str], ...]
    younger: int


class Survey:
    """A directory as it is now.

    Args:
        directory: where the session files are.
        prefix: begin of their names.
        keys: by which the journal must be signed; none if that cannot be checked.

    Raises:
        AuditConfigurationError: its journal is missing, or not what was written.
    """

    def __init__(self, directory: str, prefix: str, keys: Sequence[VerifierKey]) -> None:
        self.directory = directory
        self.prefix = prefix
        self._keys = keys
        self.journal = os.path.join(directory, journal_name(prefix))
        self.evidence = self._read()

    def holds(self) -> list[Hold]:
        """Return all holds, as they stand."""
        return self.evidence.standing_holds(keyed=bool(self._keys))

    def marked(self, hold: Hold) -> list[str]:
        """Return the files that a hold covers and that are still there, but have a tombstone.

        A run that was killed leaves such files. Nobody would miss them.
        """
        return [
            facts.file
            for facts in self.evidence.sessions.values()
            if facts.prunes and hold.covers(*facts.times()) and find(self.directory, facts.file)
        ]

    def _read(self) -> Evidence:
        if not os.path.isdir(self.directory):
            raise AuditConfigurationError(f"there is no directory {self.directory}")
        if not os.path.lexists(self.journal):
            raise AuditConfigurationError(
                f"there is no journal {self.journal}",
                hint="name the directory of the session files, and their --prefix if that is "
                "another one; without a journal nothing can be kept, or go",
            )
        evidence = read_journal(self.journal, self.prefix, self._keys, ())
        unsigned = self._not_as_written("nothing in it is signed by the given keys")
        if self._keys and evidence.is_signed_by_others:
            raise unsigned  # first: what else is wrong with it may be for want of the right one
        wrong = [f for f in evidence.findings if f.kind != "torn"]
        if wrong or not evidence.readable:
            raise self._not_as_written(wrong[0].reason if wrong else "it cannot be read")
        if self._keys and not evidence.signed and evidence.unsigned_endings():
            raise unsigned
        return evidence

    def _not_as_written(self, reason: str) -> AuditConfigurationError:
        return AuditConfigurationError(
            f"the journal {self.journal} is not to be relied on: {reason}",
            hint="run structlog-audit verify on the directory, and leave all as it is; after a "
            "change of keys, --key names the earlier public key",
        )

    def plan(self, cutoff: datetime, *, compressing: bool = False) -> Plan:
        """Look at every session that is older than a time.

        Args:
            cutoff: its last entry must be older.
            compressing: nothing is to go, but its form: holds do not forbid that.

        Raises:
            AuditConfigurationError: sessions are to go, and others have gone without a trace.
        """
        forms = self._forms()
        if not compressing:
            self._check_gone(forms)
        past, younger = self._past(cutoff, forms)
        holds = self.holds()
        if compressing:
            holds = []
            past = [replace(each, doubled=False) for each in past if each.path.endswith(".ndjson")]
        sound = [session for session in past if why_it_stays(session, holds) is None]
        checked = self._verified(sound)
        goes, stays = [], []
        for session in [checked.get(each.path, each) for each in past]:
            reason = why_it_stays(session, holds)
            if reason is None:
                goes.append(session)
            else:
                stays.append((session, reason))
        return Plan(tuple(goes), tuple(stays), younger)

    def _forms(self) -> dict[str, list[str]]:
        """Return the session files that are there, and the names of each: its own, or a copy's."""
        forms: dict[str, list[str]] = {}
        named = session_names(self.prefix)
        for name in sorted(os.listdir(self.directory)):
            plain = next((name[: len(name) - len(s)] for s in COPIES if name.endswith(s)),
                         name)  # fmt: skip
            if named.fullmatch(plain):
                forms.setdefault(plain, []).append(name)
        return forms

    def _check_gone(self, there: Container[str]) -> None:
        """Make sure that no session is gone without a tombstone that counts.

        The journal was read before the files were listed, so what it knows was there; but somebody
        may have compressed or pruned it meanwhile.
        """
        if all(find(self.directory, name) for name in self._gone(there)):
            return
        self.evidence = self._read()
        gone = [name for name in self._gone(there) if find(self.directory, name) is None]
        if gone:
            more = f" and {len(gone) - 1:,} more" if len(gone) > 1 else ""
            raise AuditConfigurationError(
                f"{os.path.join(self.directory, min(gone))}{more} is gone, and the journal has no "
                "tombstone of it that can be relied on, so nothing goes",
                hint="run structlog-audit verify on the directory; put the file back if it was "
                "moved away, or else leave all as it is, and find out who it was; after a change "
                "of keys, --key names the earlier public key",
            )

    def _gone(self, there: Container[str]) -> list[str]:
        """Return the files that the journal has no tombstone of, and that were not listed."""
        counts = self.evidence.vouched if self._keys else None
        return [
            facts.file
            for facts in self.evidence.sessions.values()
            if facts.file and facts.file not in there
            and not any(counts is None or prune.line in counts for prune in facts.prunes)
        ]  # fmt: skip

    def _newest(self, forms: Container[str]) -> set[str]:
        """Return the newest session by the journal, and the newest by the names of the files.

        They differ when a clock was set back. Only files that are there count: a line of the
        journal alone may be anybody's.
        """
        here = [item for item in self.evidence.sessions.items() if item[1].file in forms]

        def by_line(item: tuple[str, Facts]) -> int:
            return item[1].points[0].line

        def by_day(item: tuple[str, Facts]) -> tuple[str, int]:
            begin = len(self.prefix) + 1
            return item[1].file[begin : begin + 8], by_line(item)

        return {max(here, key=by_line)[0], max(here, key=by_day)[0]} if here else set()

    def _past(self, cutoff: datetime, forms: Mapping[str, list[str]]) -> tuple[list[Session], int]:
        newest = self._newest(forms)
        past, younger = [], 0
        for plain, names in forms.items():
            session, known = self._facts(plain)
            ended = known.times()[1] if known is not None else None
            if ended is not None and ended >= cutoff:
                younger += 1
                continue
            found = _look(os.path.join(self.directory, names[0]), plain)
            if known is not None:
                found = self._with_facts(found, session, known)
            found = replace(found, newest=session in newest, doubled=len(names) > 1,
                            shipped=self._is_shipped(found))  # fmt: skip
            if found.is_past(cutoff):
                past.append(found)
            else:
                younger += 1
        return past, younger

    def _facts(self, plain: str) -> tuple[str, Facts | None]:
        """Return the session whose file has that name, and what the journal says of it."""
        named = SESSION_FILE.fullmatch(plain)
        session = "" if named is None else named["session"]
        known = self.evidence.sessions.get(session)
        return (session, known) if known is not None and known.file == plain else ("", None)

    def _with_facts(self, found: Session, session: str, facts: Facts) -> Session:
        """Add what the journal says; where two times are known, the span is the longer one."""
        began, ended = facts.times()
        first = min((t for t in (found.first, began) if t is not None), default=None)
        last = max((t for t in (found.last, ended) if t is not None), default=None)
        ending = facts.ending
        signed = not self._keys or ending is None or ending.line <= self.evidence.signed
        return replace(
            found, session=session, entered=True, ended=ending is not None, signed=signed,
            sequence=ending.sequence if ending else 0,
            hash=facts.hashes[ending.sequence] if ending else "",
            first=first, last=last if found.last is not None or not found.regular else None,
        )  # fmt: skip

    def _is_shipped(self, session: Session) -> bool:
        """Tell whether a forwarder, if there is one, has shipped all whole lines of a session.

        What is compressed it does not see: that was shipped before, or written before there was
        one.
        """
        state = os.path.join(self.directory, STATE)
        if not os.path.isdir(state) or not session.regular:
            return True
        compressed = not session.path.endswith(".ndjson")
        place = Spool(self.directory, self.prefix)
        with place.looked_at():
            cursor = place.load(session.file, None).cursor
        if compressed and not cursor.sequence:
            return True
        line, end = last_line(session.path)
        if end == 0:
            return True
        return cursor.refused is None and cursor.offset >= end and cursor.hash == line_hash(line)

    def _verified(self, sessions: Iterable[Session]) -> dict[str, Session]:
        """Verify files against the journal; return them with what is wrong with them."""
        checked = {session.path: session for session in sessions}
        if not checked:
            return {}
        report = verify([self.journal, *checked], keys=self._keys)
        for finding in report.findings:
            if finding.file == self.journal and finding.verdict in ("tampered", "unreadable"):
                raise self._not_as_written(finding.reason)
            session = checked.get(finding.file)
            if session is not None and session.trouble is None:
                checked[finding.file] = replace(session, trouble=finding.reason)
        return checked


def _look(path: str, plain: str) -> Session:
    """Look at a file."""
    status = os.lstat(path)
    found = Session(plain, path, status.st_size, entered=False,
                    regular=stat.S_ISREG(status.st_mode), identity=identity(status))  # fmt: skip
    if not found.regular:
        return found
    try:
        with Source(path, follow=False) as source:
            alive = source.is_alive()
            first = first_line(source)
        line, _ = last_line(path)
    except Unreadable as error:
        return replace(found, trouble=f"it cannot be read: {error.reason}")
    last = _time(line)
    if not line:  # nothing was ever acknowledged in it
        last = datetime.fromtimestamp(status.st_mtime, timezone.utc)
    return replace(found, alive=alive, first=_time(first), last=last)


def _time(line: bytes) -> datetime | None:
    try:
        return parse_time(last_of(line)[1])
    except ValueError:
        return None


def last_line(path: str) -> tuple[bytes, int]:
    """Return the last whole line of a file, and where it ends in the text; nothing without one.

    Raises:
        Unreadable: it cannot be read.
    """
    if path.endswith(".ndjson"):
        return _last_of_plain(path)
    line, end = b"", 0
    with Source(path, follow=False) as source:
        for lines in Lines(source.chunks()):
            line = lines[-1]
            end += sum(map(len, lines)) + len(lines)
    return line, end


def _last_of_plain(path: str) -> tuple[bytes, int]:
    try:
        with open(path, "rb") as file:
            size = window = file.seek(0, os.SEEK_END)
            window = WINDOW
            while True:
                start = max(0, size - window)
                file.seek(start)
                text = file.read(size - start)
                end = text.rfind(b"\n")
                before = text.rfind(b"\n", 0, max(0, end))
                if not start or (end >= 0 and before >= 0):
                    return text[before + 1 : max(0, end)], start + end + 1
                window *= 2
    except OSError as error:
        raise Unreadable(error.strerror or type(error).__name__) from error


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return what tells a file from another one, and from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
