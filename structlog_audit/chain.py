"""The hash chain: pure rules, no files.

A line's `prev` is the SHA-256, in hex, of the exact bytes of the line before it, without its
newline; on the first line of a session it is empty. What is hashed is what was written, never a
re-serialisation.
"""

from __future__ import annotations

import re
from hashlib import sha256

_IDENTITY = re.compile(rb',"session":"([a-z0-9]{20})","sequence":([0-9]+),"prev":"[0-9a-f]*"}\n?\Z')


def link(head: bytes, session: str, sequence: int, prev: str) -> bytes:
    """Number an entry and link it to the line before it.

    Args:
        head: the entry's text without its end (`entry.Renderer.render`).
        session: identity of the session.
        sequence: position in the session, from 1.
        prev: hash of the line before it, or the empty text.

    Returns:
        The line without its newline.
    """
    return b'%b,"session":"%b","sequence":%d,"prev":"%b"}' % (
        head,
        session.encode(),
        sequence,
        prev.encode(),
    )


def line_hash(line: bytes) -> str:
    """Return the SHA-256 of a line, given without its newline, in hex."""
    return sha256(line).hexdigest()


def identity(line: bytes) -> tuple[str, int]:
    """Return session and sequence of a line that `link` made; they stand at its end.

    Raises:
        ValueError: it is no such line.
    """
    found = _IDENTITY.search(line[-200:])
    if found is None:
        raise ValueError("not a line of an audit log")
    return found[1].decode(), int(found[2])
