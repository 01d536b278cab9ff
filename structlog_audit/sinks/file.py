"""Session files: one new file a session, durable before the first acknowledgement.

1. `PREFIX-YYYYMMDD-SESSION.ndjson`, UTC date of creation, opened with `O_EXCL|O_APPEND|O_NOFOLLOW`
   and mode 0600. It is created with the first write, and never opened for writing again.
2. A write is acknowledged after all its bytes were written in one call and a sync returned. For
   the first one, the file and its directory are synced as a whole.
3. After a failed or short write, or a failed sync, the file is left alone: not cut, not appended
   to, not synced. A file that could not take its first line is removed again.
4. Before each write, the path must still lead to our file, and the file must be as long as we
   left it. Otherwise it was deleted, moved, replaced, cut or written by someone else, and the
   session is over.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from structlog_audit.alarm import Space
from structlog_audit.exceptions import (
    AuditConfigurationError,
    Persisted,
    SessionOver,
    SinkError,
    from_oserror,
)
from structlog_audit.sinks import _durable

_PREFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class FileSink:
    """Writes each session to a file of its own in a directory.

    Args:
        directory: where to write. It is made if it is missing, for its owner alone.
        prefix: begin of the file names: letters, digits, dot, dash, underscore.
        allow_unsafe_directory: accept a directory that is a symbolic link or that anybody may
            write to, as some mounted volumes are.

    Raises:
        AuditConfigurationError: the prefix or the directory's name is unusable.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        prefix: str = "audit",
        *,
        allow_unsafe_directory: bool = False,
    ) -> None:
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
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
        self._identity: tuple[int, int] | None = None
        self._forget()

    def __repr__(self) -> str:
        return f"FileSink({self.directory!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _file_sink, (self.directory, self.prefix, self.allow_unsafe_directory)

    def check(self) -> None:
        """Try whether a session file could be made; leaves no trace but the directory.

        Raises:
            SinkError: it could not.
        """
        base = self._open_directory()
        name = f".{self.prefix}-check-{os.getpid()}-{time.monotonic_ns()}"
        try:
            _durable.close(_durable.create(self.directory, base, name))
            _durable.remove(self.directory, base, name)
        except OSError as error:
            raise from_oserror(
                f"cannot create a file in {self.directory}", error, path=self.directory
            ) from error
        finally:
            _durable.close(base)

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
        self._name = f"{self.prefix}-{time.strftime('%Y%m%d', time.gmtime())}-{session}.ndjson"
        self.path = os.path.join(self.directory, self._name)
        try:
            self._descriptor = _durable.create(self.directory, self._base, self._name)
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
        self._size += len(data)
        base, self._base = self._base, -1
        with contextlib.suppress(OSError):
            _durable.close(base)  # it was needed until the file's name was durable

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
        self._identity = None

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


def _file_sink(directory: str, prefix: str, allow_unsafe_directory: bool) -> FileSink:
    return FileSink(directory, prefix, allow_unsafe_directory=allow_unsafe_directory)
