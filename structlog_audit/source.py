"""Files to be verified: plain, `.gz`, `.zst`, or standard input; read once, in bounded memory.

What is compressed is told by its first bytes, not by its name. Nothing here waits: not for the
writer of a FIFO, and not for a lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

CHUNK = 2**18
"""Bytes to read at once: what the caches of a core hold."""
LONGEST_LINE = 256 * 2**20
"""Bytes; a line is held in memory as a whole. Ours are 1,000 times shorter, unless asked for."""
PORTION = 1024
"""Compressed bytes of zstd at once: up to 128 kB may come of every 4 (RFC 8878, 3.1.1.2)."""
STDIN = "-"
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_BINARY", 0)
)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)


class Unreadable(Exception):
    """A file cannot be read, or not to its end.

    Attributes:
        reason: why, in words.
        missing: there is no such file.
        short: what is compressed ends too early.
    """

    def __init__(self, reason: str, *, missing: bool = False, short: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.missing = missing
        self.short = short


class Source:
    """A file, open for reading.

    Args:
        path: the file, or `-` for standard input.
        follow: accept a symbolic link.

    Attributes:
        size: bytes of it, as it was when it was opened.
        read: bytes of it that were read.

    Raises:
        Unreadable: it is missing, not readable, or no regular file.
    """

    def __init__(self, path: str, *, follow: bool = True) -> None:
        self.read = 0
        self.size: int | None = None
        if path == STDIN:
            try:
                self._descriptor = os.dup(0)
            except OSError as error:
                raise _unreadable(error) from error
            return
        try:
            self._descriptor = os.open(path, _FLAGS | (0 if follow else _NOFOLLOW))
        except (OSError, ValueError) as error:
            raise _unreadable(error) from error
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise Unreadable(f"it is {kind}")
        self.size = status.st_size
        self._changed = status.st_mtime

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def age(self) -> float:
        """Return the seconds since it was changed; negative if the clock says the future."""
        return time.time() - self._changed

    def is_alive(self) -> bool:
        """Tell whether somebody is writing it: each writer holds a lock until it ends.

        An empty file is not asked: its writer may be about to take the lock, and must get it.
        """
        if sys.platform == "win32" or not self.size:
            return False
        import fcntl

        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no locks here
            return False
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return False

    def chunks(self, limit: int | None = None) -> Iterator[bytes]:
        """Return the content from its beginning.

        Args:
            limit: read at most so many bytes of the file itself; others may be appending to it.

        Raises:
            Unreadable: it cannot be read, or not be decompressed.
        """
        self.read = 0
        if self.size is not None:
            os.lseek(self._descriptor, 0, os.SEEK_SET)
        raw = self._raw(self.size if limit is None else limit)
        head = b""
        for chunk in raw:
            head += chunk
            if len(head) >= len(_ZSTD):
                break
        yield from _decompressed(head, raw)

    def _raw(self, limit: int | None) -> Iterator[bytes]:
        while limit is None or self.read < limit:
            try:
                length = CHUNK if limit is None else min(CHUNK, limit - self.read)
                chunk = os.read(self._descriptor, length)
            except OSError as error:
                raise _unreadable(error) from error
            if not chunk:
                return
            self.read += len(chunk)
            yield chunk


class Lines:
    """Whole lines, in lists.

    Args:
        chunks: the bytes.
        longest: bytes that a line may have; `LONGEST_LINE` if None.

    Attributes:
        tail: bytes behind the last newline, when the lines are exhausted.
    """

    def __init__(self, chunks: Iterable[bytes], longest: int | None = None) -> None:
        self._chunks = chunks
        self._longest = longest or LONGEST_LINE
        self.tail = b""

    def __iter__(self) -> Iterator[list[bytes]]:
        """Return lists of lines, without their newlines.

        Raises:
            Unreadable: a line is too long, or the source fails.
        """
        begun: list[bytes] = []
        length = 0
        try:
            for chunk in self._chunks:
                first, *lines = chunk.split(b"\n")
                begun.append(first)
                length += len(first)
                if length > self._longest:
                    raise Unreadable(f"a line has more than {self._longest:,} bytes")
                if lines:
                    rest = lines.pop()
                    yield [b"".join(begun), *lines]
                    begun, length = [rest], len(rest)
        finally:
            self.tail = b"".join(begun)


def first_line(source: Source) -> bytes:
    """Return the first whole line without its newline, or nothing if there is none (yet).

    Raises:
        Unreadable: it cannot be read.
    """
    for lines in Lines(source.chunks()):
        return lines[0]
    return b""


def _unreadable(error: OSError | ValueError) -> Unreadable:
    if not isinstance(error, OSError):
        return Unreadable("its name is none that the system takes", missing=True)
    missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
    if error.errno in (errno.ELOOP, errno.EMLINK):
        return Unreadable("it is a symbolic link")
    return Unreadable(error.strerror or type(error).__name__, missing=missing)


def _decompressed(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if head.startswith(_GZIP):
        return _gunzipped(head, rest)
    if head.startswith(_ZSTD):
        return _unzstd(head, rest)
    return _plain(head, rest)


def _plain(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
        yield from rest


def _gunzipped(data: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress; several members may stand behind each other."""
    gzip_format = 16 + zlib.MAX_WBITS
    member = zlib.decompressobj(gzip_format)
    while True:
        try:
            out = member.decompress(data, CHUNK)
        except zlib.error as error:
            raise Unreadable(f"gzip: {error}") from None
        if out:
            yield out
        if member.eof:
            data = member.unused_data or next(rest, b"")
            if not data.strip(b"\0"):  # padding, as tapes have
                return
            member = zlib.decompressobj(gzip_format)
        else:
            data = member.unconsumed_tail or (b"" if out else next(rest, b""))
            if not data and not out:
                raise Unreadable("gzip: it ends too early", short=True)


def _unzstd(data: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress; several frames may stand behind each other."""
    frame: Any = None
    for portion in _portions(data, rest):
        left = portion
        while left:
            frame = frame or _zstandard().ZstdDecompressor().decompressobj()
            try:
                out = frame.decompress(left)
            except _zstandard().ZstdError as error:
                raise Unreadable(f"zstd: {error}") from None
            if out:
                yield out
            left, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise Unreadable("zstd: it ends too early", short=True)


def _portions(data: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    while data:
        for start in range(0, len(data), PORTION):
            yield data[start : start + PORTION]
        data = next(rest, b"")


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise Unreadable(
            "zstd: it needs the package zstandard (pip install 'structlog-audit[zstd]')"
        ) from None
    return zstandard
