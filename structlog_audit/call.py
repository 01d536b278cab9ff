"""One audit call on its way through the processors of structlog.

It travels in the event dict under `CALL`, and brings back what became of it: a chain that ends
without a confirmed call has not recorded anything, whatever it returned.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any, Literal, Protocol

from structlog_audit.entry import Kind, Receipt

CALL = "_structlog_audit"
"""Key under which a call travels in the event dict."""

How = Literal["record", "arecord", "submit"]


class Recorder(Protocol):
    """What an entry is handed to; `AuditHandler` is one."""

    def record(self, entry: Mapping[str, object], kind: Kind = "Record") -> Receipt:
        """Record an entry; return when it is durable, raise when it is not."""
        ...

    def arecord(
        self, entry: Mapping[str, object], kind: Kind = "Record"
    ) -> Coroutine[Any, Any, Receipt]:
        """Record an entry without blocking the event loop."""
        ...

    def submit(self, entry: Mapping[str, object], kind: Kind = "Record") -> None:
        """Queue an entry without waiting for it."""
        ...


CAPTURES: list[Recorder] = []
"""Where entries go instead while tests capture them; the last one serves. See `testing`."""


_TOLD = "_structlog_audit_receipt"


def tell_receipt(cancelled: BaseException, receipt: Receipt | None) -> None:
    """Have the exception that cancels a task tell that its entry was recorded all the same."""
    setattr(cancelled, _TOLD, receipt)


def receipt_of(cancelled: BaseException) -> Receipt | None:
    """Return the receipt of an entry that was recorded although its task was cancelled."""
    receipt: Receipt | None = getattr(cancelled, _TOLD, None)
    return receipt


class Redaction(Protocol):
    """What keeps values out of entries; see `structlog_audit.Redact`."""

    def field(self, key: str, value: object) -> Any:
        """Return what stands in the entry for a value under this name."""
        ...


class Call:
    """One call.

    Args:
        given: what the caller and its logger gave, as opposed to what processors add.
        kind: what the entry tells of its operation.
        how: whether to wait for it.
        described: whether the caller gave a text.
    """

    __slots__ = (
        "delivered", "described", "given", "how", "kind", "pending", "receipt", "redactions",
    )  # fmt: skip

    def __init__(
        self, given: Mapping[str, object], kind: Kind, how: How, *, described: bool
    ) -> None:
        self.given = given
        self.kind: Kind = kind
        self.how: How = how
        self.described = described
        self.delivered = False
        self.redactions: list[Redaction] = []  # that it has come through
        self.receipt: Receipt | None = None
        self.pending: Coroutine[Any, Any, Receipt] | None = None

    def __repr__(self) -> str:
        return f"<audit call: {self.kind}>"

    def __deepcopy__(self, memo: object) -> Call:
        return self  # a processor may copy the event dict; what becomes of the call is one thing

    def redacted(self, key: str, value: object) -> Any:
        """Return a value that comes late as it would be if it had come through from the start."""
        for redaction in self.redactions:
            value = redaction.field(key, value)
        return value

    def deliver(self, recorder: Recorder, entry: Mapping[str, object]) -> None:
        """Hand the entry over, once, and take note of the answer."""
        if self.delivered:  # somebody runs the chain twice
            return
        if self.how == "record":
            self.receipt = recorder.record(entry, self.kind)
        elif self.how == "arecord":
            self.pending = recorder.arecord(entry, self.kind)
        else:
            recorder.submit(entry, self.kind)
        self.delivered = True
