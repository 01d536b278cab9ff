"""The Merkle tree over the lines of a session's file, which grows as the file does."""

from __future__ import annotations

import sys
from base64 import b64encode
from time import sleep

from structlog_audit.chain import line_hash
from structlog_audit.merkle import Frontier, leaf_hash

TURN = 50
"""Lines after which the thread lets others have the interpreter: some 0.1 ms of work."""
BREATH = 1e-5
"""Seconds that it stands back for; Linux makes some 60 µs of it."""


class SessionTree:
    """The tree over those lines of a file that are linked to each other.

    Args:
        path: the file.

    Attributes:
        last_hash: hash of the last of them, in hex.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._tree = Frontier()
        self._offset = 0
        self.last_hash = ""

    @property
    def size(self) -> int:
        """How many lines it covers."""
        return self._tree.size

    def root_text(self) -> str:
        """Return its root, in base64."""
        return b64encode(self._tree.root()).decode()

    def covers(self, sequence: int, last_hash: str, *, gently: bool) -> bool:
        """Grow up to a line; tell whether the file holds it.

        Args:
            sequence: its number.
            last_hash: its hash, in hex.
            gently: callers are at work meanwhile, and shall not wait for the interpreter's lock.

        Raises:
            OSError: the file cannot be read.
        """
        self._read(sequence, gently)
        return self.size == sequence and self.last_hash == last_hash

    def follow(self, sequence: int, known_hash: str) -> bytes | None:
        """Grow to the file's end; a torn line there is left out.

        Args:
            sequence: number of a line that must be in it.
            known_hash: the hash of that line.

        Returns:
            The last line; None if the file does not hold the known one, or is not linked.

        Raises:
            OSError: the file cannot be read.
        """
        if not self.covers(sequence, known_hash, gently=True):
            return None
        behind = self._read(sys.maxsize, gently=True)
        return None if behind.endswith(b"\n") else self._last

    _last = b""

    def _read(self, sequence: int, gently: bool) -> bytes:
        """Grow up to a line, or as far as lines are linked; return what stands behind that."""
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            while self.size < sequence:
                line = file.readline()
                if not line.endswith(b'"prev":"%b"}\n' % self.last_hash.encode()):
                    return line
                self._last = line[:-1]
                self.last_hash = line_hash(self._last)
                self._tree.append(leaf_hash(self._last))
                self._offset += len(line)
                if gently and self.size % TURN == 0:
                    sleep(BREATH)
        return b""
