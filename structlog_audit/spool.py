"""The directory of the session files as the forwarder has it: its lock, and a cursor for each.

A cursor is replaced as a whole, and is durable when `store` returns.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import socket
import time
from collections.abc import Container, Iterator

from structlog_audit.cursor import STATE, SUFFIX, Cursor, Problem, SessionFile, parsed, reading
from structlog_audit.exceptions import AuditConfigurationError, from_oserror
from structlog_audit.names import session_names
from structlog_audit.sinks import _durable
from structlog_audit.sinks._lock import try_lock, unlock

KEPT = 86_400.0
"""Seconds for which a cursor is kept, since it last moved, when its file is gone."""


def read(directory: Directory, name: str) -> io.FileIO:
    with reading(name):
        return directory.read(name)


class Directory:
    """An open directory: names in it are not looked up by way of links."""

    def __init__(self, path: str, *, follow: bool = True) -> None:
        self.path = path
        self.base = _durable.open_directory(path, follow=follow)

    def names(self) -> list[str]:
        return os.listdir(self.base if self.base >= 0 else self.path)

    def status(self, name: str) -> os.stat_result:
        if self.base < 0:
            return os.lstat(os.path.join(self.path, name))
        return os.stat(name, dir_fd=self.base, follow_symlinks=False)

    def read(self, name: str) -> io.FileIO:
        """Open a file for reading; what is no regular file is not waited for."""
        descriptor = self.open(name, os.O_RDONLY)
        try:
            return io.FileIO(descriptor)
        except BaseException:  # a directory
            os.close(descriptor)
            raise

    def open(self, name: str, flags: int) -> int:
        """Open a file that is not a link; one that is made is for its owner alone."""
        if self.base < 0:
            return os.open(os.path.join(self.path, name), flags | _FLAGS, 0o600)
        return os.open(name, flags | _FLAGS, 0o600, dir_fd=self.base)

    def replace(self, name: str, data: bytes) -> None:
        """Put a small file in place of another.

        A crash leaves the old one or the new one, whole, and perhaps a part of the new one under
        its temporary name.
        """
        temporary = name + _TEMPORARY
        descriptor = _durable.create(self.path, self.base, temporary)
        try:
            try:
                if _durable.append(descriptor, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                _durable.sync(descriptor)
            finally:
                _durable.close(descriptor)
            self.rename(temporary, name)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(temporary)
            raise
        _durable.sync_directory(self.base)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, in place of whatever has it; not durable yet."""
        if self.base < 0:
            os.replace(os.path.join(self.path, old), os.path.join(self.path, new))
        else:
            os.replace(old, new, src_dir_fd=self.base, dst_dir_fd=self.base)

    def remove(self, name: str) -> None:
        _durable.remove(self.path, self.base, name)

    def is_current(self) -> bool:
        """Tell whether the path still leads here."""
        try:
            now = os.stat(self.path)
        except OSError:
            return False
        return self.base < 0 or os.path.samestat(now, os.fstat(self.base))

    def close(self) -> None:
        base, self.base = self.base, -1
        _durable.close(base)


_FLAGS = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)
_TEMPORARY, _LOCK = ".new", "lock"


class Spool:
    """The directory of the session files, and the forwarder's own in it: lock and cursors."""

    def __init__(self, directory: str, prefix: str) -> None:
        self.directory = directory
        self.state_path = os.path.join(directory, STATE)
        self._name = session_names(prefix)
        self._process = 0
        self._source: Directory | None = None
        self._state: Directory | None = None
        self._lock = -1

    @property
    def is_open(self) -> bool:
        return self._lock >= 0

    @property
    def source(self) -> Directory:
        assert self._source is not None
        return self._source

    @property
    def state(self) -> Directory:
        assert self._state is not None
        return self._state

    def open(self) -> None:
        """Take the lock.

        Raises:
            AuditConfigurationError: another forwarder has it, or the directory is unusable.
        """
        if self.is_open:
            raise self._taken(f"process {os.getpid()}")
        self._check_directory()
        try:
            _durable.make_directories(self.state_path)
            self._source = Directory(self.directory)
            self._state = Directory(self.state_path, follow=False)
            _check_owner(self.state_path, self._state)
            self._lock = self._take_lock()
            self._tidy_up()
        except OSError as error:
            self.close()
            problem = from_oserror(f"cannot keep cursors in {self.state_path}", error)
            raise AuditConfigurationError(problem.reason, hint=problem.hint) from error
        except BaseException:
            self.close()
            raise
        self._process = os.getpid()

    def _check_directory(self) -> None:
        if not os.path.isdir(self.directory):
            raise AuditConfigurationError(
                f"there is no directory {self.directory}",
                hint="name the one with the session files; the first audit entry makes it",
            )

    def _take_lock(self) -> int:
        descriptor = self.state.open(_LOCK, os.O_RDWR | os.O_CREAT)
        try:
            if not try_lock(descriptor):
                text = os.read(descriptor, 200).decode("utf-8", "replace").strip()
                raise self._taken(text or "a process that has just begun")
            os.ftruncate(descriptor, 0)
            text = f"process {os.getpid()} on {socket.gethostname()}\n"
            _durable.append(descriptor, text.encode())
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _taken(self, by: str) -> AuditConfigurationError:
        return AuditConfigurationError(
            f"another forwarder ships from {self.directory}: {by}",
            hint="one is enough: stop it first",
        )

    def _tidy_up(self) -> None:
        """Remove what a crash has left, and make sure that cursors can be written."""
        for name in self.state.names():
            if name.endswith(_TEMPORARY):
                with contextlib.suppress(IsADirectoryError, PermissionError):
                    self.state.remove(name)
        check = f"check{_TEMPORARY}"
        _durable.close(_durable.create(self.state.path, self.state.base, check))
        self.state.remove(check)

    @contextlib.contextmanager
    def looked_at(self) -> Iterator[None]:
        """Open for reading alone, without the lock."""
        self._check_directory()
        try:
            self._source = Directory(self.directory)
            with contextlib.suppress(FileNotFoundError):
                self._state = Directory(self.state_path, follow=False)
            yield
        except OSError as error:
            raise AuditConfigurationError(
                f"cannot look into {error.filename or self.directory}: {error.strerror}"
            ) from error
        finally:
            self.close()

    def renew(self) -> bool:
        """Open anew if the directory was moved or mounted over; tell whether that was so."""
        self.check_process()
        if self.is_open and self.source.is_current() and self.state.is_current():
            return False
        self.close()
        self.open()
        return True

    def check_process(self) -> None:
        """Make sure that this is no forked child, going on in the middle of its parent's work."""
        if self._process != os.getpid():
            raise RuntimeError("a forked child has no forwarder")

    def sessions(self) -> Iterator[tuple[str, os.stat_result]]:
        """Find the session files."""
        for name in self.source.names():
            if self._name.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):
                    yield name, self.source.status(name)

    def load(self, name: str, target: str | None) -> SessionFile:
        """Read the cursor of a session file."""
        found = self._name.fullmatch(name)
        if found is None:
            raise AuditConfigurationError(f"{name} is no name of a session file there")
        file = SessionFile(name, found[1], Cursor(target or ""))
        try:
            if self._state is None:
                return file
            with self._state.read(name + SUFFIX) as source:
                cursor = parsed(source.read(2**22))
        except FileNotFoundError:
            return file
        except OSError as error:
            reason = f"its cursor cannot be read: {error.strerror}"
            file.hold(Problem("unreadable", reason, name))
            return file
        if cursor is not None and target in (None, cursor.target):
            file.cursor = cursor
        else:
            was = "its cursor is damaged" if cursor is None else f"it went to {cursor.target}"
            file.problems.append(
                Problem("restarted", f"{was}: it is shipped from its beginning", name)
            )
        return file

    def store(self, name: str, cursor: Cursor) -> None:
        """Write the cursor of a session file.

        Raises:
            SinkError: it is not durable.
        """
        self.check_process()
        path = os.path.join(self.state_path, name + SUFFIX)
        try:
            self.state.replace(name + SUFFIX, cursor.dump())
        except OSError as error:
            raise from_oserror(
                f"cannot write the cursor {path}", error, path=path, persisted="unknown"
            ) from error

    def forget_gone(self, found: Container[str]) -> None:
        """Remove the cursors of files that are gone, and were shipped a while ago."""
        now = time.time()
        with contextlib.suppress(OSError):
            for name in self.state.names():
                session = name.removesuffix(SUFFIX)
                if session in found or session == name or not self._name.fullmatch(session):
                    continue
                if now - self.state.status(name).st_mtime > KEPT and self._is_gone(session):
                    self.state.remove(name)

    def _is_gone(self, name: str) -> bool:
        try:
            self.source.status(name)
        except FileNotFoundError:
            return True
        return False

    def abandon(self) -> None:
        """Close without giving up the lock: in a forked child it is the parent's."""
        lock, self._lock = self._lock, -1
        with contextlib.suppress(OSError):
            _durable.close(lock)
        for directory in (self._source, self._state):
            if directory is not None:
                with contextlib.suppress(OSError):
                    directory.close()
        self._source = self._state = None

    def close(self) -> None:
        """Give up the lock."""
        if self._lock >= 0:
            with contextlib.suppress(OSError):
                unlock(self._lock)
        self.abandon()


def _check_owner(path: str, directory: Directory) -> None:
    """Make sure that nobody else can tell us that everything was shipped."""
    stats = os.stat(path) if directory.base < 0 else os.fstat(directory.base)
    if os.name == "posix" and stats.st_uid not in (0, os.geteuid()):
        raise AuditConfigurationError(
            f"{path} belongs to user {stats.st_uid}", hint="run the forwarder as that user"
        )
    if _durable.is_world_writable(stats.st_mode):
        raise AuditConfigurationError(
            f"{path} can be written to by anybody", hint=f"chmod 0700 {path}"
        )
