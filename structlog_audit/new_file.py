"""A file that is there whole, or not at all, and never in the place of another one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.sinks import _durable

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK}


def check_new(path: str) -> None:
    """Make sure that nothing is there yet.

    Raises:
        AuditConfigurationError: something is.
    """
    if os.path.lexists(path):
        raise _exists(path)


def write_new(path: str, data: bytes) -> None:
    """Write a new file, for its owner alone; it is durable on return.

    It is written beside its place and gets its name when it is whole: a crash leaves no part of it
    under that name, at worst a file `.NAME.….part`.

    Raises:
        AuditConfigurationError: there is a file already, or it cannot be written.
    """
    directory, name = os.path.split(os.path.abspath(path))
    part = f".{name[:100]}.{secrets.token_hex(4)}.part"
    try:
        base = _durable.open_directory(directory)
        try:
            _write(directory, base, part, data)
            try:
                _give_name(directory, part, name)
                _durable.sync_directory(base)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    _durable.remove(directory, base, part)
        finally:
            _durable.close(base)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise AuditConfigurationError(
            f"{path} cannot be written: {error.strerror or type(error).__name__}",
            hint="name a file in a directory that exists and that you may write to",
        ) from None


def _write(directory: str, base: int, name: str, data: bytes) -> None:
    descriptor = _durable.create(directory, base, name)
    try:
        while data:
            data = data[_durable.append(descriptor, data) :]
        _durable.sync_new_file(descriptor, base)
    except BaseException:
        with contextlib.suppress(OSError):
            _durable.remove(directory, base, name)
        raise
    finally:
        _durable.close(descriptor)


def _give_name(directory: str, part: str, name: str) -> None:
    """Give a file its name; a link, unlike a renaming, never replaces what is there."""
    source, target = os.path.join(directory, part), os.path.join(directory, name)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(source, target)


def _exists(path: str) -> AuditConfigurationError:
    return AuditConfigurationError(
        f"{path} exists already", hint="reports are never overwritten: give another name"
    )
