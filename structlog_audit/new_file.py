"""A file that is there whole, or not at all, and never in the place of another one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterable

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.sinks import _durable

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK}
_KEPT = 60
"""Characters of a name that its part keeps: of four bytes each, they and the rest fit into 255."""


def check_new(path: str) -> None:
    """Make sure that nothing is there yet.

    Raises:
        AuditConfigurationError: something is.
    """
    if os.path.lexists(path):
        raise _exists(path)


def write_new(
    path: str, parts: Iterable[bytes], *, before: Callable[[], object] | None = None
) -> None:
    """Write a new file, for its owner alone; it is durable on return.

    It is written beside its place and gets its name when it is whole: a crash leaves no part of it
    under that name, at worst a file `.NAME.….part`.

    Args:
        path: its name; nothing may be there yet.
        parts: its content, one behind the other.
        before: called when the content is durable, before it has its name; if that raises, there
            is no file.

    Raises:
        AuditConfigurationError: there is a file already, or it cannot be written.
    """
    directory, name = os.path.split(os.path.abspath(path))
    part = f".{name[:_KEPT]}.{secrets.token_hex(4)}.part"
    try:
        base = _durable.open_directory(directory)
        try:
            _write(directory, base, part, parts)
            try:
                if before is not None:
                    before()
                _give_name(directory, base, part, name)
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
            hint="nothing of it is left there; name a file in a directory that exists and that you "
            "may write to, on a disk with enough space",
        ) from None


def _write(directory: str, base: int, name: str, parts: Iterable[bytes]) -> None:
    descriptor = _durable.create(directory, base, name)
    try:
        for data in parts:
            _durable.write_all(descriptor, data)
        _durable.sync_new_file(descriptor, base)
    except BaseException:
        with contextlib.suppress(OSError):
            _durable.remove(directory, base, name)
        raise
    finally:
        _durable.close(descriptor)


def _give_name(directory: str, base: int, part: str, name: str) -> None:
    """Give a file its name, durably; a link, unlike a renaming, never replaces what is there."""
    source, target = os.path.join(directory, part), os.path.join(directory, name)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        os.rename(source, target)
    try:
        _durable.sync_directory(base)
    except OSError:
        with contextlib.suppress(OSError):
            _durable.remove(directory, base, name)  # nobody knows whether a crash leaves it
        raise


def _exists(path: str) -> AuditConfigurationError:
    return AuditConfigurationError(
        f"{path} exists already", hint="nothing is overwritten: give another name"
    )
