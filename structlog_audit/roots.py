"""Roots in a journal that no signer vouches for: are they those of the sessions' files?

Whoever may append to the journal may append a root of their own making, just before somebody else
signs. What a crash leaves of a signer's write looks the same, but its root is true.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from typing import NamedTuple

from structlog_audit.merkle import Frontier, leaf_hash
from structlog_audit.source import Lines, Source, Unreadable


class Claim(NamedTuple):
    """What a line of the journal says of the tree over a session's lines.

    Attributes:
        session: the session.
        sequence: number of the last line that the tree covers.
        root: of the tree, as it stands there.
        line: the line of the journal.
        offset: where that begins.
    """

    session: str
    sequence: int
    root: str
    line: int
    offset: int


def false_among(claims: Iterable[Claim], path: str, *, follow: bool) -> list[Claim]:
    """Return those claims of one session that its file contradicts.

    What goes beyond the file is not among them: that the file is shorter is found elsewhere.

    Args:
        claims: what is said of the session.
        path: its file.
        follow: accept a symbolic link.
    """
    waiting = sorted(claims, key=lambda claim: -claim.sequence)
    found: list[Claim] = []
    tree = Frontier()
    try:
        with Source(path, follow=follow) as source:
            for lines in Lines(source.chunks()):
                for line in lines:
                    tree.append(leaf_hash(line))
                    while waiting and waiting[-1].sequence <= tree.size:
                        claim = waiting.pop()
                        told = claim.sequence, claim.root
                        if told != (tree.size, b64encode(tree.root()).decode()):
                            found.append(claim)
                if not waiting:
                    break
    except Unreadable:
        pass  # that is found elsewhere as well
    return found
