"""Everything that an audit call can raise.

Messages are written for the person who has to act on them: what happened, to which file or
server, whether the entry may exist, what to do next. They never carry an entry's data or a key.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any, Literal

Persisted = Literal["no", "unknown"]
"""Whether an entry may exist although its caller was told that it failed.

`no`: it does not and will not exist. `unknown`: it may.
"""


class AuditError(Exception):
    """Base of all errors of this library.

    Attributes:
        reason: what happened.
        hint: what to do next, or None.
        persisted: whether the entry may exist all the same; `no` unless a write was tried.
    """

    persisted: Persisted = "no"

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.reason} (hint: {self.hint})" if self.hint else self.reason

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if not k.startswith("__")}
        return _rebuild, (type(self), self.args, state)


def _rebuild(kind: type[AuditError], args: tuple[Any, ...], state: dict[str, Any]) -> AuditError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class AuditConfigurationError(AuditError):
    """The configuration cannot work; raised when it is made, not at the first entry."""


class AuditNotConfiguredError(AuditError):
    """An audit call found no handler that confirmed its entry: nothing was recorded."""


class AuditEntryError(AuditError):
    """The entry itself is unusable: nothing was recorded, and a repeat will not help."""


class AuditWriteError(AuditError):
    """The entry was not confirmed by its sink.

    Attributes:
        persisted: `no`, or `unknown` if the entry may exist all the same.
        sink: the sink that failed, as text.
        path: the file that failed, or None.
        errno: the system's error number, or None.
    """

    def __init__(
        self,
        reason: str,
        *,
        persisted: Persisted,
        sink: str,
        path: str | None = None,
        errno: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(reason, hint=hint)
        self.persisted: Persisted = persisted
        self.sink = sink
        self.path = path
        self.errno = errno

    def __str__(self) -> str:
        fate = (
            "the entry was not stored"
            if self.persisted == "no"
            else "the entry may or may not have been stored"
        )
        text = f"audit entry not recorded by {self.sink}: {self.reason}; {fate}"
        return f"{text} (hint: {self.hint})" if self.hint else text


class AuditTimeoutError(AuditWriteError):
    """The sink did not answer in time."""


class AuditSpaceWarning(AuditError):
    """Free space fell below the threshold. Handed to `on_failure`, never raised.

    Attributes:
        free: bytes that are left.
        total: size of the file system in bytes.
    """

    def __init__(self, reason: str, *, free: int, total: int, hint: str | None = None) -> None:
        super().__init__(reason, hint=hint)
        self.free = free
        self.total = total


class SinkError(AuditError):
    """Raised by a sink's `open` or `write` when the lines are not durable.

    Attributes:
        persisted: `no` if none of the lines exists, otherwise `unknown`.
        path: the file that failed, or None.
        errno: the system's error number, or None.
        delivered: how many lines, from the first, are durable all the same, as far as is known.
    """

    delivered = 0

    def __init__(
        self,
        reason: str,
        *,
        persisted: Persisted = "unknown",
        path: str | None = None,
        errno: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(reason, hint=hint)
        self.persisted: Persisted = persisted
        self.path = path
        self.errno = errno


class SessionOver(SinkError):
    """Raised by a sink's `write`, before it wrote anything, when the session must end.

    The handler begins a new session and writes the same entries there.
    """

    def __init__(self, reason: str, *, path: str | None = None) -> None:
        super().__init__(reason, persisted="no", path=path)


class LineRefused(SinkError):
    """Raised by a sink's `write` when it refuses one line for its own sake, and not the others.

    The handler fails that entry alone, numbers and links those after it anew, and writes them.

    Attributes:
        delivered: how many lines, from the first, are durable; the next one is the refused one.
        doubtful: whether it, or lines after it, may be stored all the same. Their numbers must not
            be given to other entries then: the handler begins a new session for what is left.
    """

    def __init__(
        self, reason: str, *, delivered: int, doubtful: bool = False, hint: str | None = None
    ) -> None:
        super().__init__(reason, persisted="unknown" if doubtful else "no", hint=hint)
        self.delivered = delivered
        self.doubtful = doubtful


_HINTS = {
    _errno.ENOSPC: "free some space there; the next call begins a new session by itself",
    _errno.EDQUOT: "raise the quota or free some space; the next call begins a new session",
    _errno.EFBIG: "a file size limit is in force (ulimit -f); raise it or lower max_bytes",
    _errno.EIO: "the disk reported an error: see the kernel log, and move AUDIT_LOG_DIR if need be",
    _errno.EROFS: "the file system is read-only: see the kernel log, or remount it",
    _errno.EPERM: "the directory or file refuses changes: see its owner, mode and attributes",
    _errno.EMFILE: "too many open files in this process: raise its limit (ulimit -n)",
    _errno.ENFILE: "too many open files on this host",
    _errno.ENOTDIR: "the path, or a part of it, is a file: name a directory",
    _errno.ENOENT: "the directory does not exist, and cannot be made there",
    _errno.EPIPE: "whoever read the pipe is gone",
}


def from_oserror(
    doing: str, error: OSError, *, path: str | None = None, persisted: Persisted = "no"
) -> SinkError:
    """Put an operating system's error into words.

    Args:
        doing: what was tried, for example `write to /var/log/audit/x.ndjson`.
        error: what the system answered.
        path: the file that failed.
        persisted: whether lines may exist all the same.

    Returns:
        The error to raise.
    """
    number = error.errno
    if number is None:  # not the system's answer: raised by a signal handler, at some point
        persisted = "unknown"
    hint = _HINTS.get(number) if number is not None else None
    if number == _errno.EACCES and hasattr(os, "geteuid"):
        hint = f"user {os.geteuid()} needs write and search permission on the directory"
    name = _errno.errorcode.get(number, str(number)) if number is not None else "error"
    return SinkError(
        f"{doing}: [{name}] {error.strerror or type(error).__name__}",
        persisted=persisted,
        path=path,
        errno=number,
        hint=hint,
    )
