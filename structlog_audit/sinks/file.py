"""Session files: one new file a session, durable before the first acknowledgement.

1. `PREFIX-YYYYMMDD-SESSION.ndjson`, UTC date of creation, opened with `O_EXCL|O_APPEND|O_NOFOLLOW`
   and mode 0600. It is created with the first write, and never opened for writing again.
2. A write is acknowledged after all its bytes were written in one call and a sync returned. For
   the first one, the file and its directory are synced as a whole.
3. After a failed or short write, or a failed sync, the file is left alone: not cut, not appended
   to, not synced. A file that could not take its first line is removed again.
4. A session is entered in the directory's journal (`journal.py`) when its first lines are durable,
   before they are acknowledged, and so is its end. An end of which nobody can tell whether the
   journal has it is entered again, in the same words.
5. Before each write, the path must still lead to our file, and the file must be as long as we
   left it. Otherwise it was deleted, moved, replaced, cut or written by someone else, and the
   session is over.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from structlog_audit.alarm import Space
from structlog_audit.checkpoint import Checkpoints, Head, Signer
from structlog_audit.exceptions import (
    AuditConfigurationError,
    Persisted,
    SessionOver,
    SinkError,
    from_oserror,
)
from structlog_audit.journal import Event, Journal
from structlog_audit.names import PREFIX, session_name
from structlog_audit.sinks import _durable
from structlog_audit.sinks._lock import mark_alive, try_lock
from structlog_audit.values import well_formed


class FileSink:
    """Writes each session to a file of its own in a directory.

    Args:
        directory: where to write. It is made if it is missing, for its owner alone.
        prefix: begin of the file names: letters, digits, dot, dash, underscore.
        allow_unsafe_directory: accept a directory that is a symbolic link or that anybody may
            write to, as some mounted volumes are.
        signer: signs the journal and the sessions now and then.

    Raises:
        AuditConfigurationError: the prefix or the directory's name is unusable.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        prefix: str = "audit",
        *,
        allow_unsafe_directory: bool = False,
        signer: Signer | None = None,
    ) -> None:
        if not isinstance(prefix, str) or not PREFIX.fullmatch(prefix):
            raise AuditConfigurationError(
                f"a prefix is made of letters, digits, '.', '-' and '_', not {prefix!r}",
                hint="directories belong into the directory, not into the prefix",
            )
        given = os.fsdecode(directory)
        if not given or "\0" in given:
            raise AuditConfigurationError("the directory for session files has no usable name")
        if given in ("/dev/stdout", "/dev/stderr"):
            raise AuditConfigurationError(
                f"{given} is no directory", hint="use ConsoleSink, or name it in AUDIT_LOG_DIR"
            )
        if given.startswith("~"):
            raise AuditConfigurationError(
                f"the directory {given!r} begins with '~', which nobody expands here",
                hint="write the path out (a shell expands '~' outside quotes alone; "
                "in Python, os.path.expanduser does)",
            )
        try:
            self.directory = os.path.abspath(given)
        except OSError as error:
            raise AuditConfigurationError(
                f"the directory {given!r} is relative to a working directory that is gone"
            ) from error
        self.prefix = prefix
        self.allow_unsafe_directory = allow_unsafe_directory
        self.path: str | None = None
        self.on_sent: Callable[[], None] | None = None
        self.signer = signer
        self._journal = Journal(self.directory, prefix, follow=allow_unsafe_directory)
        self._checkpoints = None if signer is None else Checkpoints(self._journal, signer)
        self._owed: list[Event] = []  # what the journal could not take yet
        self._pid = os.getpid()
        self._identity: tuple[int, int] | None = None
        self._head: Head | None = None
        self._forget()

    def __repr__(self) -> str:
        return f"FileSink({self.directory!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _file_sink, (self.directory, self.prefix, self.allow_unsafe_directory, self.signer)

    def check(self) -> None:
        """Try whether a session file could be made; leaves no trace but the directory.

        Raises:
            SinkError: it could not.
        """
        base = self._open_directory()
        name = f".{self.prefix}-check-{os.getpid()}-{time.monotonic_ns()}"
        doing = "create"
        try:
            descriptor = _durable.create(self.directory, base, name)
            doing = "lock"  # as the journal must be
            try:
                try_lock(descriptor)
            finally:
                _durable.close(descriptor)
                _durable.remove(self.directory, base, name)
        except OSError as error:
            raise from_oserror(
                f"cannot {doing} a file in {self.directory}", error, path=self.directory
            ) from error
        finally:
            _durable.close(base)
        self._journal.check()
        if self.signer is not None:
            self.signer.check()

    def space(self) -> Space:
        """Return the room that is left for an ordinary user, in bytes."""
        if hasattr(os, "statvfs"):
            stats = os.statvfs(self.directory)
            return Space(stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize,
                         self.directory)  # fmt: skip
        import shutil

        usage = shutil.disk_usage(self.directory)
        return Space(usage.free, usage.total, self.directory)

    def open(self, session: str) -> None:
        """Create the session's file.

        Raises:
            SinkError: it cannot be created, or the directory is not safe.
        """
        self.close()
        self._base = self._open_directory()
        self._name = session_name(self.prefix, time.strftime("%Y%m%d", time.gmtime()), session)
        self.path = os.path.join(self.directory, self._name)
        try:
            self._descriptor = _durable.create(self.directory, self._base, self._name)
            self._session = session
            mark_alive(self._descriptor)
            self._identity = _identity(os.fstat(self._descriptor))
        except OSError as error:
            path = self.path
            if self._descriptor >= 0:
                self._discard_unless_used()
            self.close()
            raise from_oserror(f"cannot create {path}", error, path=path) from error

    def write(self, lines: Sequence[bytes]) -> None:
        """Append lines and sync.

        Raises:
            SinkError: they are not durable.
            SessionOver: the file is not ours any more.
        """
        self.ready()
        data = b"".join(lines)
        self._append(data, len(lines[0]))
        if self.on_sent is not None:
            self.on_sent()
        try:
            if self._size:
                _durable.sync(self._descriptor)
            else:
                _durable.sync_new_file(self._descriptor, self._base)
        except OSError as error:
            raise self._failed("sync of", error, "unknown") from error
        before = self._head.sequence if self._head else 0
        head = Head(self._session, before + len(lines), lines[-1])
        if not self._size:
            self._enter(head)
        self._size += len(data)
        self._head = head
        if self._checkpoints is not None:
            self._checkpoints.notice(head)
        base, self._base = self._base, -1
        with contextlib.suppress(OSError):
            _durable.close(base)  # it was needed until the file's name was durable

    def ended(self, reason: str, *, clean: bool) -> None:
        """Enter in the journal how far the session goes, and why it ended.

        Raises:
            SinkError: the journal does not take it; it is tried again with the next session.
        """
        head = self._head
        if head is None:
            return
        self._owed.append({
            "event": "Close" if clean else "Break", "file": self._name, **head.as_dict(),
            "reason": well_formed(reason),
        })  # fmt: skip
        self._pay()

    def settle(self) -> None:
        """Wait for what goes elsewhere apart from the lines: the anchors.

        Raises:
            SinkError: they do not arrive.
        """
        if self._checkpoints is not None:
            self._checkpoints.settle()

    def _enter(self, head: Head) -> None:
        """Enter the session in the journal, after the ends that are owed to it."""
        entered = {"event": "Open", "file": self._name, **head.as_dict()}
        try:
            if self._owed and self._checkpoints is not None:
                self._pay()  # signed: an end that nobody signs looks like a forged one
            self._journal.append(*self._owed, entered)
        except SinkError as error:
            if error.persisted == "no" and not self._discard_durably():
                error.persisted = "unknown"
            raise
        self._owed = []
        if self._checkpoints is not None:
            assert self.path is not None
            self._checkpoints.begin(self.path)

    def _pay(self) -> None:
        owed = self._owed
        if self._checkpoints is None:
            self._journal.append(*owed)
        else:
            self._checkpoints.end(owed)
        self._owed = []

    def ready(self) -> None:
        """Look whether the file is still there, and ours.

        Raises:
            SessionOver: it is not.
        """
        if self._size:
            self._check_ownership()

    def close(self) -> None:
        """Close the file; nothing is written.

        Errors are left alone: all that was acknowledged was synced before.
        """
        descriptor, base, identity = self._descriptor, self._base, self._identity
        self._forget()
        if os.getpid() != self._pid:
            self._pid = os.getpid()
            self._owed = []  # by the parent
            self._journal.after_fork()
        with contextlib.suppress(OSError):
            _durable.close(base)
        with contextlib.suppress(OSError):
            if descriptor >= 0 and identity in (None, _identity(os.fstat(descriptor))):
                _durable.close(descriptor)  # else somebody closed it, and the number is theirs

    def _forget(self) -> None:
        self._descriptor = -1
        self._base = -1
        self._name = ""
        self._size = 0
        self._session = ""
        self._head = None
        self._identity = None
        if self._checkpoints is not None:
            self._checkpoints.forget()

    def _open_directory(self) -> int:
        base = -1
        try:
            _durable.make_directories(self.directory)
            base = _durable.open_directory(self.directory, follow=self.allow_unsafe_directory)
            mode = os.fstat(base).st_mode if base >= 0 else os.stat(self.directory).st_mode
        except OSError as error:
            _durable.close(base)
            if os.path.islink(self.directory) and not self.allow_unsafe_directory:
                raise self._unsafe("is a symbolic link") from error
            raise from_oserror(
                f"cannot open the directory {self.directory}", error, path=self.directory
            ) from error
        if not self.allow_unsafe_directory and _durable.is_world_writable(mode):
            _durable.close(base)
            raise self._unsafe("can be written to by anybody")
        return base

    def _unsafe(self, why: str) -> SinkError:
        return SinkError(
            f"the directory {self.directory} {why}",
            persisted="no",
            path=self.directory,
            hint="use a directory of the service's own, chmod 0700; where that cannot be had, "
            "allow_unsafe_directory=True or AUDIT_LOG_ALLOW_UNSAFE_DIR=1 accepts it",
        )

    def _check_ownership(self) -> None:
        assert self.path is not None
        try:
            now = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            raise SessionOver("its file was deleted or moved", path=self.path) from None
        except OSError as error:
            raise self._failed("cannot look at", error, "no") from error
        if _identity(now) != self._identity:
            raise SessionOver("its file was replaced", path=self.path)
        if now.st_size != self._size:
            raise SessionOver("its file was cut or written by somebody else", path=self.path)
        self._check_descriptor()

    def _check_descriptor(self) -> None:
        try:
            ours = _identity(os.fstat(self._descriptor)) == self._identity
        except OSError:
            ours = False
        if not ours:
            raise SessionOver("its descriptor was closed by somebody else", path=self.path)

    def _append(self, data: bytes, first: int) -> None:
        try:
            written = _durable.append(self._descriptor, data)
        except OSError as error:
            raise self._failed("write to", error, "no") from error
        if written != len(data):
            # what stands whole in the part that was written may be read as recorded
            removed = self._discard_unless_used()
            persisted: Persisted = "unknown" if written >= first and not removed else "no"
            raise SinkError(
                f"short write to {self.path}: {written} of {len(data)} bytes",
                persisted=persisted,
                path=self.path,
                hint="the disk, a quota or a file size limit is full: free some space there",
            )

    def _failed(self, doing: str, error: OSError, persisted: Persisted) -> SinkError:
        failed = from_oserror(f"{doing} {self.path}", error, path=self.path, persisted=persisted)
        self._discard_unless_used()
        return failed

    def _discard_durably(self) -> bool:
        """Remove a file that is durable with its first lines; tell whether that is as durable."""
        try:
            _durable.remove(self.directory, self._base, self._name)
            _durable.sync_directory(self._base)
        except OSError:
            return False
        return True

    def _discard_unless_used(self) -> bool:
        """Remove a file that could not take its first line; tell whether it is gone."""
        if self._size:
            return False
        try:
            _durable.remove(self.directory, self._base, self._name)
        except OSError:
            return False
        return True


def _identity(stats: os.stat_result) -> tuple[int, int]:
    return stats.st_dev, stats.st_ino


def _file_sink(
    directory: str, prefix: str, allow_unsafe_directory: bool, signer: Signer | None
) -> FileSink:
    return FileSink(directory, prefix, allow_unsafe_directory=allow_unsafe_directory, signer=signer)
