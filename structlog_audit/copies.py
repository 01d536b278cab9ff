"""Copies of session files that are whole, durable and compared before anything else happens.

1. A copy is made under a name of its own, synced, read again and compared with the original.
2. Then it gets its final name, and the directory is synced. A crash before that leaves a part that
   nobody takes for a copy; the next attempt begins anew.
3. What has the final name already is compared as well. If it is something else, it stays.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.names import SESSION_FILE
from structlog_audit.sinks import _durable
from structlog_audit.source import Source, Unreadable
from structlog_audit.spool import Directory

PART = ".part"
"""Behind the name of a copy, with a dot in front, while it is being made."""
ZST = ".zst"
LEVEL = 10
"""Of zstd: on audit entries, what more brings is hardly smaller and takes several times longer."""
CHUNK = 2**20

Digest = tuple[int, bytes]
"""Length and SHA-256 of a content."""


class CopyDiffers(Exception):
    """What is there under the name of the copy, or was written, is not what the original holds."""


def copy(source: Directory, name: str, target: Directory) -> None:
    """Copy a file as it is, durably; what is there already and equal is left as it is.

    Args:
        source: the directory of the original.
        name: of both.
        target: the directory of the copy.

    Raises:
        AuditConfigurationError: a directory is where the copy is to be made.
        CopyDiffers: something else has that name; or the copy is not equal to the original.
        OSError: it cannot be done.
    """
    _make(source, name, target, name, compressed=False)


def compress(directory: Directory, name: str) -> None:
    """Make a compressed copy beside a file, durably; the original stays.

    Raises:
        AuditConfigurationError: the package `zstandard` is missing, or a directory is where the
            copy is to be made.
        CopyDiffers: something else has its name; or it does not hold what the original does.
        OSError: it cannot be done.
    """
    require_zstandard()
    _make(directory, name, directory, name + ZST, compressed=True)


def require_zstandard() -> None:
    """Make sure that we can compress.

    Raises:
        AuditConfigurationError: the package `zstandard` is missing.
    """
    try:
        import zstandard
    except ImportError:
        raise AuditConfigurationError(
            "compression needs the package zstandard",
            hint="pip install 'structlog-audit[zstd]'",
        ) from None
    del zstandard


def remove_parts(directory: Directory) -> None:
    """Remove what a crash has left of copies in the making; whoever calls has the lock.

    Raises:
        AuditConfigurationError: a directory has the name of one.
    """
    for name in directory.names():
        of = name.removeprefix(".").removesuffix(PART)
        if name == f".{of}{PART}" and SESSION_FILE.fullmatch(of):
            _remove_part(directory, name)


def _remove_part(directory: Directory, name: str) -> None:
    try:
        directory.remove(name)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or not stat.S_ISDIR(directory.status(name).st_mode):
            raise
        raise AuditConfigurationError(
            f"{os.path.join(directory.path, name)} is a directory, where a copy is to be made",
            hint="find out who put it there, and move it away",
        ) from error


def _make(source: Directory, name: str, target: Directory, final: str, *, compressed: bool) -> None:
    if _exists(target, final):
        original = _digest(_chunks(source, name))
        _check(original, target, final, compressed=compressed)
        _durable.sync_directory(target.base)  # whoever made it may have been killed before that
        return
    part = f".{final}{PART}"
    with contextlib.suppress(FileNotFoundError):
        _remove_part(target, part)
    try:
        written = source.status(name).st_mtime_ns
        chunks = _chunks(source, name)
        original = _write(chunks, target, part, written, compressed=compressed)
        _check(original, target, part, compressed=compressed)
        if _exists(target, final):
            raise CopyDiffers(f"{os.path.join(target.path, final)} appeared meanwhile")
        target.rename(part, final)
    except BaseException:
        with contextlib.suppress(OSError):
            target.remove(part)
        raise
    _durable.sync_directory(target.base)


def _write(
    chunks: Iterable[bytes], target: Directory, part: str, written: int, *, compressed: bool
) -> Digest:
    """Write a copy and sync it; return what the original holds.

    It was written when the original was (nanoseconds): a reader leaves out files by that.
    """
    length, hash_ = 0, sha256()
    squeeze = _compressor() if compressed else None
    descriptor = _durable.create(target.path, target.base, part)
    try:
        for chunk in chunks:
            length += len(chunk)
            hash_.update(chunk)
            data = chunk if squeeze is None else squeeze.compress(chunk)
            _durable.write_all(descriptor, data)
        if squeeze is not None:
            _durable.write_all(descriptor, squeeze.flush())
        if os.utime in os.supports_fd:
            with contextlib.suppress(OSError):  # then it is read in vain
                os.utime(descriptor, ns=(written, written))
        _durable.sync(descriptor)
        _durable.read_anew(descriptor)
    finally:
        _durable.close(descriptor)
    return length, hash_.digest()


def _compressor() -> Any:
    import zstandard

    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj()


def _check(original: Digest, target: Directory, name: str, *, compressed: bool) -> None:
    """Compare what a copy holds with the original."""
    path = os.path.join(target.path, name)
    try:
        if compressed:
            with Source(path, follow=False) as source:
                found = _digest(source.chunks())
        else:
            found = _digest(_chunks(target, name))
    except Unreadable as error:
        raise CopyDiffers(f"{path} cannot be read: {error.reason}") from None
    if found != original:
        raise CopyDiffers(f"{path} does not hold what the original does")


def _chunks(directory: Directory, name: str) -> Iterator[bytes]:
    with directory.read(name) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _digest(chunks: Iterable[bytes]) -> Digest:
    length, hash_ = 0, sha256()
    for chunk in chunks:
        length += len(chunk)
        hash_.update(chunk)
    return length, hash_.digest()


def _exists(directory: Directory, name: str) -> bool:
    try:
        directory.status(name)
    except FileNotFoundError:
        return False
    return True
