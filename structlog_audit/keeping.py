"""Keeping: holds, tombstones, archives and compression of a directory's sessions.

1. One of these works on a directory at a time, under a lock that writers of entries do not need.
2. What is done is an entry of the log itself, before anything is done (`act.py`).
3. A file goes when its copy, if there is to be one, is durable and equal, and its tombstone is
   durable in the journal, and signed if that is. A crash before that leaves the file: the next run
   begins anew with it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

from structlog_audit import copies, holds
from structlog_audit.act import Recorder, user
from structlog_audit.copies import CopyDiffers
from structlog_audit.entry import Receipt, timestamp
from structlog_audit.exceptions import AuditConfigurationError, SinkError, from_oserror
from structlog_audit.holds import Hold, To, parse_time
from structlog_audit.journal import Event, Journal
from structlog_audit.note import VerifierKey
from structlog_audit.retention import Session
from structlog_audit.session import new_session_id
from structlog_audit.settings import Settings
from structlog_audit.sinks import _durable
from structlog_audit.sinks._lock import try_lock, unlock
from structlog_audit.spool import Directory
from structlog_audit.survey import Plan, Survey, identity
from structlog_audit.values import well_formed

LOCK = ".keeping.lock"
BATCH = 100
"""Tombstones in one write; each has some 400 bytes."""
RETAIN_ACTION = "AuditRetain"
HOLD_ACTION = "AuditHoldAdd"
RELEASE_ACTION = "AuditHoldRelease"


@dataclass(slots=True)
class Outcome:
    """What a run has done.

    Attributes:
        sessions: how many are gone, or compressed.
        bytes: of their files, as they were.
        stayed: those that could not be done, with the reason.
        after: bytes of their compressed files.
    """

    sessions: int = 0
    bytes: int = 0
    stayed: list[tuple[Session, str]] = field(default_factory=list)
    after: int = 0


class Keeping:
    """Works on the sessions of a directory.

    Args:
        directory: where they are.
        settings: who signs, and what is accepted of a directory.
        prefix: begin of the file names; that of the settings if None.
        keys: public keys that have signed the journal; those of the signer are known.

    Attributes:
        outcome: what was done, also when the rest failed.

    Raises:
        AuditConfigurationError: the directory or its journal cannot be relied on, or the signer's
            key is unusable.
    """

    def __init__(
        self,
        directory: str,
        settings: Settings,
        *,
        prefix: str | None = None,
        keys: Sequence[VerifierKey] = (),
    ) -> None:
        self._settings = settings
        self._recorder = Recorder(directory, settings, prefix=prefix, keys=keys)
        self.directory, self.prefix = self._recorder.directory, self._recorder.prefix
        self.by = user()
        self.outcome = Outcome()

    def survey(self) -> Survey:
        """Look at the directory, and change nothing.

        Raises:
            AuditConfigurationError: its journal cannot be relied on, or only with a key.
        """
        survey = self._survey()
        self._recorder.check_reader(survey.evidence)
        return survey

    def _survey(self) -> Survey:
        return Survey(self.directory, self.prefix, self._recorder.keys)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Directory]:
        """Have the directory for us alone, apart from those that record entries there.

        Raises:
            AuditConfigurationError: somebody else has it, or it is not ours.
        """
        self._recorder.check_place()
        try:
            place = Directory(self.directory, follow=self._settings.allow_unsafe_dir)
        except OSError as error:
            raise _failed(f"cannot open {self.directory}", error) from error
        lock = -1
        try:
            lock = _take_lock(place)
            copies.remove_parts(place)
            yield place
        except OSError as error:
            raise _failed(f"cannot work in {self.directory}", error) from error
        finally:
            if lock >= 0:
                with contextlib.suppress(OSError):
                    unlock(lock)
            _durable.close(lock)
            place.close()

    def _recording(
        self, action: str, data: dict[str, Any]
    ) -> contextlib.AbstractContextManager[Receipt]:
        return self._recorder.recording({"action": action, "data": {"by": self.by, **data}})

    def enter(self, events: Sequence[Event]) -> None:
        """Enter lines in the journal; if there is a key, it signs them, and that they are its own.

        Raises:
            SinkError: they are not durable.
            AuditConfigurationError: they could not be read back, and the journal would be taken
                for tampered ever after.
        """
        for event in events:
            _check_readable(event)
        journal = Journal(self.directory, self.prefix, follow=self._settings.allow_unsafe_dir)
        signer = self._recorder.signer
        if signer is None:
            journal.append(*events)
        else:
            journal.append_signed(
                events,
                lambda *tree: signer.sign(*tree, with_tree=True, acts=len(events)),
                signer.restore,
            )

    def retain(self, keep: timedelta, policy: str, archive: str | None) -> Plan:
        """Have the sessions go that are past their time.

        Args:
            keep: how long they are kept.
            policy: the same, in the words of whoever asked for it.
            archive: directory that gets them; None if they are to be removed.

        Raises:
            AuditError: it cannot be done, or not all of it. What was not done is as it was.
        """
        with self.at_work() as place:
            survey = self._survey()
            self._recorder.check_signer(survey.evidence)
            plan = survey.plan(cutoff_of(keep))
            if not plan.goes:
                return plan
            with self._archive(archive) as target:
                told = {
                    "policy": policy, "sessions": len(plan.goes), "stays": len(plan.stays),
                    "bytes": sum(session.size for session in plan.goes),
                    **({} if target is None else {"archive": target.path}),
                }  # fmt: skip
                with self._recording(RETAIN_ACTION, told):
                    for start in range(0, len(plan.goes), BATCH):
                        batch = plan.goes[start : start + BATCH]
                        self._prune(place, target, batch, policy)
            return plan

    def _prune(
        self,
        place: Directory,
        archive: Directory | None,
        sessions: Sequence[Session],
        policy: str,
    ) -> None:
        ready, outcome = [], self.outcome
        for session in sessions:
            reason = _archived(place, archive, session)
            if reason is None:
                ready.append(session)
            else:
                outcome.stayed.append((session, reason))
        if not ready:
            return
        to: To = "removed" if archive is None else "archive"
        self.enter([
            {"event": "Prune", "file": session.file, "session": session.session,
             "sequence": session.sequence, "hash": session.hash, "reason": well_formed(policy),
             "by": self.by, "to": to}
            for session in ready
        ])  # fmt: skip
        for session in ready:
            place.remove(os.path.basename(session.path))
            outcome.sessions += 1
            outcome.bytes += session.size
        _durable.sync_directory(place.base)

    @contextlib.contextmanager
    def _archive(self, path: str | None) -> Iterator[Directory | None]:
        if path is None:
            yield None
            return
        path = os.path.abspath(path)
        above = os.path.dirname(path)
        if not os.path.isdir(above):  # a disk that is not mounted must not be one on our own
            raise AuditConfigurationError(
                f"there is no directory {above}, in which the archive is to be",
                hint="mount it, or make it: only the archive itself is made if it is missing",
            )
        try:
            _durable.make_directories(path)
            target = Directory(path)
        except OSError as error:
            raise _failed(f"cannot use the archive {path}", error) from error
        try:
            if os.path.samefile(path, self.directory):
                raise AuditConfigurationError("the archive is the directory itself")
            if _durable.is_world_writable(os.stat(path).st_mode):
                raise AuditConfigurationError(
                    f"the archive {path} can be written to by anybody", hint=f"chmod o-w {path}"
                )
            yield target
        finally:
            target.close()

    def compress(self, age: timedelta) -> Plan:
        """Compress the sessions that have ended so long ago.

        Args:
            age: how long.

        Raises:
            AuditError: it cannot be done, or not all of it. What was not done is as it was.
        """
        copies.require_zstandard()
        with self.at_work() as place:
            plan = self.plan_compression(age)
            outcome = self.outcome
            for session in plan.goes:
                reason = _compressed(place, session)
                if reason is not None:
                    outcome.stayed.append((session, reason))
                    continue
                outcome.sessions += 1
                outcome.bytes += session.size
                outcome.after += place.status(session.file + copies.ZST).st_size
            return plan

    def plan_compression(self, age: timedelta) -> Plan:
        """Tell what would be compressed."""
        return self._survey().plan(cutoff_of(age), compressing=True)

    def add_hold(
        self, reason: str, since: datetime | None = None, until: datetime | None = None
    ) -> Hold:
        """Have sessions stay until the hold is released.

        Args:
            reason: why.
            since: begin of the period that it covers; None if that is open.
            until: end of it, exclusive; None if that is open.

        Raises:
            AuditError: it is not in force, as far as is known.
        """
        if not reason.strip():
            raise AuditConfigurationError("a hold needs a reason")
        if since is not None and until is not None and since >= until:
            raise AuditConfigurationError("the period of the hold ends before it begins")
        period = {
            name: _written(time)
            for name, time in (("since", since), ("until", until))
            if time is not None
        }
        told = {"id": new_session_id()[:8], "reason": well_formed(reason), **period}
        event = {"event": "Hold", **told, "by": self.by}
        _check_readable(event)  # before anything is recorded
        with self.at_work():
            self._recorder.check_signer(self._survey().evidence)
            with self._recording(HOLD_ACTION, told):
                self.enter([event])
        return self._survey().evidence.holds[told["id"]]

    def release_hold(self, name: str, reason: str) -> Hold:
        """Release a hold.

        Raises:
            AuditError: there is none of that name in force, or it is still in force, as far as is
                known.
        """
        if not reason.strip():
            raise AuditConfigurationError("a release needs a reason")
        with self.at_work():
            survey = self._survey()
            self._recorder.check_signer(survey.evidence)
            hold = next((each for each in survey.holds() if each.id == name), None)
            if hold is None or hold.released is not None:
                raise AuditConfigurationError(
                    f"there is no hold {name!r} in force", hint="structlog-audit hold list"
                )
            told = {"id": name, "reason": well_formed(reason)}
            with self._recording(RELEASE_ACTION, told):
                self.enter([{"event": "Release", **told, "by": self.by}])
        return self._survey().evidence.holds[name]


def _written(time: datetime) -> str:
    """Return a time as a line of the journal has it.

    Raises:
        AuditConfigurationError: it could not be read from there.
    """
    text = timestamp(int(time.timestamp()) * 1_000_000)
    try:
        parse_time(text)
    except ValueError:
        raise AuditConfigurationError(
            f"the time {time.isoformat()} is out of the range of the journal",
            hint="give one of the years 1000 to 9999, in UTC; or none, if the period is open",
        ) from None
    return text


def _check_readable(event: Event) -> None:
    try:
        holds.check(event)
    except (KeyError, TypeError, ValueError):
        raise AuditConfigurationError(
            f"a line {event['event']} like that could not be read back, so it is not written"
        ) from None


def _archived(place: Directory, archive: Directory | None, session: Session) -> str | None:
    """Copy a session's file, if it is to be; tell why it must stay, or None."""
    name = os.path.basename(session.path)
    try:
        if archive is not None:
            copies.copy(place, name, archive)
        return _changed(place, session)
    except CopyDiffers as error:
        return str(error)
    except OSError as error:
        where = place if archive is None else archive
        raise _failed(f"cannot copy {name} to {where.path}", error) from error


def _compressed(place: Directory, session: Session) -> str | None:
    """Compress a session's file; tell why that was not done, or None."""
    try:
        copies.compress(place, session.file)
        reason = _changed(place, session)
        if reason is None:
            place.remove(session.file)
            _durable.sync_directory(place.base)
        return reason
    except CopyDiffers as error:
        return str(error)
    except OSError as error:
        raise _failed(f"cannot compress {session.path}", error) from error


def _changed(place: Directory, session: Session) -> str | None:
    """Tell whether a file is not the one that was verified any more."""
    try:
        now = identity(place.status(os.path.basename(session.path)))
    except FileNotFoundError:
        return "it is gone"
    return None if now == session.identity else "it was changed meanwhile"


def _failed(doing: str, error: OSError) -> SinkError:
    failed = from_oserror(doing, error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        failed.hint = "free some space there and run it again: it goes on with what is left to do"
    return failed


def _take_lock(place: Directory) -> int:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(place.status(LOCK).st_mode):
            raise AuditConfigurationError(
                f"{os.path.join(place.path, LOCK)} is no regular file",
                hint="find out who put it there, and move it away",
            )
    descriptor = place.open(LOCK, os.O_RDWR | os.O_CREAT)
    try:
        if not try_lock(descriptor):
            text = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            raise AuditConfigurationError(
                f"{text or 'another process'} is at work in {place.path}",
                hint="wait until it has finished; it may also be stopped at any moment, and goes "
                "on when it is started again",
            )
        os.ftruncate(descriptor, 0)
        _durable.append(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def cutoff_of(age: timedelta) -> datetime:
    """Return the time that something of that age was written before."""
    try:
        return datetime.now(timezone.utc) - age
    except OverflowError:
        return datetime.min.replace(tzinfo=timezone.utc)
