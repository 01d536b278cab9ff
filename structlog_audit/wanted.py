"""What a reader is to return, or to keep, whatever is selected: the other half of an operation.

Lines are looked at before they are parsed, by the bytes that our writer has for a field.
"""

from __future__ import annotations

import re

import orjson

from structlog_audit.selection import Needles

FEW = 4
"""Operations that are looked for one by one; above, every line with an operation is looked at."""
_ANY: Needles = (b'"operationId":"',)
_OPERATION = re.compile(rb'"operationId":"(?:[^"\\]|\\.)*"')
_EVENT = re.compile(rb'"event":"([A-Z][a-z]+)"')


class Wanted:
    """Operations whose outcomes are asked for too, whatever else is selected.

    Attributes:
        needles: what a line must have one of.
    """

    def __init__(self) -> None:
        self._operations: dict[bytes, None] = {}
        self.needles: Needles = ()

    def add(self, operation: str) -> None:
        """Want the outcome of an operation from now on."""
        self._operations[_operation(operation)] = None
        self._spell()

    def discard(self, operation: str) -> None:
        """Want it no more."""
        self._operations.pop(_operation(operation), None)
        self._spell()

    def may_hold(self, line: bytes) -> bool:
        """Tell whether a line may be such an outcome."""
        return bool(self._operations) and any(
            found in self._operations for found in _OPERATION.findall(line)
        )

    def _spell(self) -> None:
        few = len(self._operations) <= FEW
        self.needles = tuple(self._operations) if few else _ANY


class Begun:
    """Begins, kept for those who find an outcome.

    Args:
        event: the outcome that is looked for; what ends in another way is kept no longer.
        most: bytes to keep; the oldest ones then go.

    Attributes:
        needles: what a line must have one of.
    """

    def __init__(self, event: str, most: int) -> None:
        self.needles = _ANY
        self._event = event.encode()
        self._left = most
        self._lines: dict[bytes, bytes] = {}

    def may_hold(self, line: bytes) -> bool:
        """Keep a Begin, or forget one that has ended; none is returned by itself."""
        event, operation = _EVENT.search(line), _OPERATION.search(line)
        if event is None or operation is None or event[1] in (b"Record", self._event):
            return False
        self._forget(operation[0])
        if event[1] == b"Begin":
            self._lines[operation[0]] = line
            self._left -= len(line)
            while self._left < 0:
                self._forget(next(iter(self._lines)))
        return False

    def pop(self, operation: str) -> bytes | None:
        """Return the line that began an operation, if it was kept, and keep it no longer."""
        return self._forget(_operation(operation))

    def _forget(self, operation: bytes) -> bytes | None:
        line = self._lines.pop(operation, None)
        self._left += len(line or b"")
        return line


def _operation(operation: str) -> bytes:
    return b'"operationId":%b' % orjson.dumps(operation)
