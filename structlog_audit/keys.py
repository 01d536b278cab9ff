"""Key files: a new pair of keys, each in a file of its own."""

from __future__ import annotations

import contextlib
import errno
import os

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.note import SigningKey, VerifierKey
from structlog_audit.sinks import _durable

PUBLIC = ".pub"
"""Behind the name of a private key's file, the name of the public key's."""


def generate_key_files(name: str, path: str | os.PathLike[str]) -> VerifierKey:
    """Make a pair of keys. Both files are durable on return, and for their owner alone.

    The public key is written first: a crash leaves none, or one that nothing was signed with.

    Args:
        name: of the keys; for the log of one application on one host, what tells it from others.
        path: file of the private key; that of the public one has `.pub` behind it.

    Returns:
        The public key.

    Raises:
        AuditConfigurationError: the name is unusable, a file exists or cannot be written, or
            `cryptography` is missing.
    """
    if name.startswith("#") or not name.isprintable():
        raise AuditConfigurationError("the name of a key begins with no '#', and can be printed")
    key = SigningKey.generate(name)
    directory, file = os.path.split(os.path.abspath(os.fsdecode(path)))
    base = _open_directory(directory)
    try:
        _write_pair(directory, base, file, key)
    except FileExistsError as error:
        raise AuditConfigurationError(
            f"{os.path.join(directory, error.filename)} exists already",
            hint="keys are never overwritten: give another name of a file",
        ) from None
    except OSError as error:
        raise AuditConfigurationError(
            f"a file of keys cannot be written in {directory}: {error.strerror}"
        ) from None
    finally:
        _durable.close(base)
    return key.verifier


def _open_directory(directory: str) -> int:
    try:
        return _durable.open_directory(directory)
    except OSError as error:
        raise AuditConfigurationError(
            f"the directory {directory} cannot be opened: {error.strerror}",
            hint="make it first, for the account alone that signs (chmod 0700)",
        ) from None


def _write_pair(directory: str, base: int, file: str, key: SigningKey) -> None:
    _write(directory, base, file + PUBLIC, str(key.verifier), mode=0o644)
    try:
        _write(directory, base, file, key.reveal())
    except BaseException:
        with contextlib.suppress(OSError):
            _durable.remove(directory, base, file + PUBLIC)
        raise


def _write(directory: str, base: int, file: str, text: str, mode: int = 0o600) -> None:
    descriptor = _durable.create(directory, base, file)
    try:
        if os.name == "posix":
            os.fchmod(descriptor, mode)
        data = f"{text}\n".encode()
        if _durable.append(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _durable.sync_new_file(descriptor, base)
    except BaseException:
        with contextlib.suppress(OSError):
            _durable.remove(directory, base, file)
        raise
    finally:
        _durable.close(descriptor)
