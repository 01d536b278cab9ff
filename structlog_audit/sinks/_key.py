"""A key to a server: never in a message, a repr or a URL."""

from __future__ import annotations

import os
import re
import stat

from structlog_audit.exceptions import AuditConfigurationError, SinkError


class Key:
    """A key, or the file that holds it; a file is read again when it changes.

    Args:
        text: the key.
        file: the file.

    Raises:
        AuditConfigurationError: both are given, or it cannot be a key.
    """

    def __init__(self, text: str | None, file: str | os.PathLike[str] | None) -> None:
        if text is not None and file is not None:
            raise AuditConfigurationError("give either a key or the file that holds it, not both")
        if not isinstance(file, (str, os.PathLike, type(None))):
            raise AuditConfigurationError("api_key_file is no path")
        self._file = None if file is None else os.fspath(file)
        self._known: tuple[int, int] | None = None
        self._text = text
        if text is not None:
            self._text = _checked(text, "the key")
        elif self._file is not None:
            try:
                self.text()
            except SinkError as error:
                raise AuditConfigurationError(error.reason) from None

    def __repr__(self) -> str:
        return "Key(…)"

    def text(self) -> str | None:
        """Return the key, or None if there is none.

        Raises:
            SinkError: its file cannot be read, or holds none.
        """
        if self._file is None:
            return self._text
        try:
            stats = os.stat(self._file)
            now = (stats.st_mtime_ns, stats.st_ino)
            if now != self._known:
                self._text = _checked(_content(self._file), f"the key in {self._file}")
                self._known = now
        except OSError as error:
            problem = f"the key in {self._file} cannot be read: {error.strerror}"
        except AuditConfigurationError as error:
            problem = error.reason
        else:
            return self._text
        raise SinkError(problem, persisted="no")


def _content(path: str) -> str:
    """Read a file, and wait for no writer of a FIFO."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AuditConfigurationError(f"{path}, which shall hold the key, is no regular file")
        return os.read(descriptor, 10_000).decode("utf-8", "replace").strip()
    finally:
        os.close(descriptor)


def _checked(text: str, what: str) -> str:
    if not isinstance(text, str) or not re.fullmatch(r"[\x21-\x7e]+", text):
        raise AuditConfigurationError(f"{what} is empty, or has characters that no key has")
    return text
