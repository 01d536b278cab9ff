"""Encryption to a public key of age (age-encryption.org), by the package pyrage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

from structlog_audit.exceptions import AuditConfigurationError

_BEGIN = b"age-encryption.org/v1"
_OTHERS = "No matching keys found"
"""What pyrage says of a file that is encrypted to others; anything else is damage."""


class Damaged(Exception):
    """What is encrypted was cut short, or changed."""


def recipient(text: str) -> Any:
    """Read a public key.

    Raises:
        AuditConfigurationError: it is none, or pyrage is missing.
    """
    pyrage = _pyrage()
    try:
        return pyrage.x25519.Recipient.from_str(text)
    except (pyrage.RecipientError, UnicodeError):
        raise AuditConfigurationError(
            "a recipient is no public key of age", hint="it begins with age1; age-keygen makes one"
        ) from None


def encrypt(plain: IO[bytes], ready: IO[bytes], recipients: Sequence[Any]) -> None:
    """Encrypt a file into another one."""
    _pyrage().encrypt_io(plain, ready, recipients)


def is_encrypted(file: IO[bytes]) -> bool:
    """Tell whether a file is encrypted; it stands at its begin afterwards."""
    begin = file.read(len(_BEGIN))
    file.seek(0)
    return begin == _BEGIN


def decrypt(file: IO[bytes], plain: IO[bytes], identities: Sequence[str]) -> None:
    """Decrypt a file into another one.

    Args:
        file: what is encrypted.
        plain: where it goes.
        identities: private keys.

    Raises:
        Damaged: it was cut short, or changed.
        AuditConfigurationError: there is no key that fits, or one that is none.
    """
    if not identities:
        raise AuditConfigurationError("the export is encrypted", hint="give --identity FILE")
    pyrage = _pyrage()
    try:
        own = [pyrage.x25519.Identity.from_str(text) for text in identities]
    except pyrage.IdentityError:
        raise AuditConfigurationError(
            "an identity is no private key of age", hint="it begins with AGE-SECRET-KEY-1"
        ) from None
    try:
        pyrage.decrypt_io(file, plain, own)
    except pyrage.DecryptError as error:
        if str(error) != _OTHERS:
            raise Damaged from None
        raise AuditConfigurationError("the export cannot be decrypted: none of the identities "
                                      "is of a recipient") from None  # fmt: skip
    except OSError as error:
        if error.errno is None:  # not the system's
            raise Damaged from None
        raise


def _pyrage() -> Any:
    try:
        import pyrage
    except ImportError:
        raise AuditConfigurationError(
            "encryption needs the package pyrage", hint="pip install 'structlog-audit[export]'"
        ) from None
    return pyrage
