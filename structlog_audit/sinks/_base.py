"""What a sink is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable


class Sink(Protocol):
    """A place where lines become durable.

    The handler calls a sink from one thread at a time, so a sink needs no locks. After a call
    that raised, it calls `close` and then, with a new session, `open`.
    A sink may also have `check() -> None`, which raises `SinkError` when it cannot be written to
    (called at configuration time), `space() -> Space`, `ready() -> None`, which raises
    `SessionOver` when the session must end (called before another sink writes the same lines),
    `ended(reason, clean=...) -> None`, told of a session's end before `close`, and
    `settle() -> None`, which waits for what it sends elsewhere (called when the handler closes).
    See `TellsSent` for one that can keep its disk or server busy.
    """

    def open(self, session: str) -> None:
        """Get ready for a new session.

        Args:
            session: its identity, 20 characters that are safe in a file name.

        Raises:
            SinkError: it cannot be written to.
        """

    def write(self, lines: Sequence[bytes]) -> None:
        """Write lines; return only when every one of them is durable.

        Args:
            lines: whole lines, each with its newline, in order.

        Raises:
            SinkError: they are not all durable; the session is over.
            SessionOver: nothing was written, because the session must end.
        """

    def close(self) -> None:
        """Let go of the session; called in a forked child as well, so it must not write."""


@runtime_checkable
class TellsSent(Protocol):
    """A sink that says when it only waits.

    Attributes:
        on_sent: None at first, set by the handler. `write` calls it, in its own thread, when it has
            handed the lines over and waits for the confirmation: the callers of the entries before
            these are woken meanwhile.
    """

    on_sent: Callable[[], None] | None
