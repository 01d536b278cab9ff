"""Keys for tests."""

from __future__ import annotations

from pathlib import Path

from structlog_audit.note import SigningKey


def make_key(path: Path, name: str = "example.com/audit", *more: SigningKey) -> SigningKey:
    """Make a key, and the file that holds it, behind others."""
    key = SigningKey.generate(name)
    path.write_text("\n".join(each.reveal() for each in (*more, key)))
    path.chmod(0o600)
    return key
