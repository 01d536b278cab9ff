"""Operations: a Begin that is durable before the body runs, and its outcome after it."""

from __future__ import annotations

import contextlib
import logging
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Protocol

from structlog_audit.call import receipt_of
from structlog_audit.context import audit_fields, operation_under_way
from structlog_audit.entry import Kind, Receipt
from structlog_audit.exceptions import AuditEntryError
from structlog_audit.values import exception_data


class Caller(Protocol):
    """Makes the calls of an operation; `AuditLogger` is one."""

    def _begin(self, entry: Mapping[str, object]) -> Receipt: ...

    async def _abegin(self, entry: Mapping[str, object]) -> Receipt: ...

    def _submit(self, entry: Mapping[str, object], kind: Kind) -> None: ...

    def _end(self, entry: Mapping[str, object], kind: Kind) -> Receipt: ...

    async def _aend(self, entry: Mapping[str, object], kind: Kind) -> Receipt: ...


class Operation:
    """An operation under audit, for `with` and `async with`.

    `Begin` is durable before the body runs; when it cannot be recorded, the body does not run.
    Afterwards one outcome is queued without waiting: `Complete`, `Fail` (the body raised, or
    called `fail`), or `Abandon` (the body was cancelled or interrupted, or called `abandon`). It
    is durable with the next commit, within a second, or at close.

    Attributes:
        data: what the outcome shall carry, a mapping.
        durable: set it to have the end of the block wait for the outcome, and raise if it cannot be
            recorded.
        operation_id: what Begin and outcome have in common.
        receipt: the receipt of the Begin; None before it.
    """

    def __init__(self, caller: Caller, entry: Mapping[str, object]) -> None:
        self.data: Any = {}
        self.operation_id = str(entry.get("operation_id") or uuid.uuid4())
        self.receipt: Receipt | None = None
        self.durable = False
        self._caller = caller
        self._entry = {**entry, "operation_id": self.operation_id}
        self._begun = self._entry
        self._fields: Mapping[str, object] = {}
        self._entered = False
        self._verdict: Kind | None = None
        self._reason: str | None = None
        self._around: Operation | None = None
        self._said: set[str] = set()

    def __repr__(self) -> str:
        return f"<Operation {self.operation_id}>"

    @property
    def fields(self) -> Mapping[str, object]:
        """What its entries say, as far as it is known by now."""
        return self._entry

    @property
    def action(self) -> object:
        """What is done; set it where the body knows it better, for the outcome to say so."""
        return self._entry.get("action")

    @action.setter
    def action(self, action: str) -> None:
        self._said.add("action")
        self._entry["action"] = action

    @property
    def is_judged(self) -> bool:
        """Whether somebody has called `fail` or `abandon`."""
        return self._verdict is not None

    def bind(self, **fields: object) -> None:
        """Say in the outcome what the Begin could not know yet, such as `user_id`.

        Raises:
            AuditEntryError: it is no field of an entry; what is, is named in `_CARRIED`.
        """
        unknown = fields.keys() - _CARRIED
        if unknown:
            raise AuditEntryError(f"{', '.join(sorted(unknown))}: no field that can be bound")
        self._said.update(fields)
        self._entry.update(fields)

    def _learn(self, **fields: object) -> None:
        """Take over what an interceptor found out; what the body said itself stands."""
        self._entry.update({k: v for k, v in fields.items() if k not in self._said})

    def fail(self, reason: str) -> None:
        """Make the outcome a `Fail` although the body does not raise."""
        self._verdict, self._reason = "Fail", reason

    def abandon(self, reason: str) -> None:
        """Make the outcome an `Abandon`: the operation was not carried to its end."""
        self._verdict, self._reason = "Abandon", reason

    @contextlib.contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Have it not complain that it was never entered, if the block raises."""
        try:
            yield
        except BaseException:
            self._entered = True
            raise

    def __enter__(self) -> Operation:
        self._enter_once()
        self.receipt = self._caller._begin(self._entry)
        self._become_current()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _current.set(self._around)
        if self._is_awaited(error):
            entry, outcome = self._outcome(error)
            try:
                self._caller._end(entry, outcome)
            except AuditEntryError as unusable:
                self._caller._end(self._plain(entry, unusable), outcome)
        else:
            self._finish(error)

    async def __aenter__(self) -> Operation:
        self._enter_once()
        try:
            self.receipt = await self._caller._abegin(self._entry)
        except BaseException as cancelled:
            self.receipt = receipt_of(cancelled)
            if self.receipt is not None:  # it began, and its body will not run
                self._finish(cancelled)
            raise
        self._become_current()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _current.set(self._around)
        if self._is_awaited(error):
            entry, outcome = self._outcome(error)
            try:
                await self._caller._aend(entry, outcome)
            except AuditEntryError as unusable:
                await self._caller._aend(self._plain(entry, unusable), outcome)
        else:
            self._finish(error)

    def __del__(self) -> None:
        if not getattr(self, "_entered", True):  # without it, __init__ raised
            warnings.warn(
                "an audit operation was never entered, so nothing was recorded: "
                "write `with audit_log.operation(…):`",
                RuntimeWarning,
                stacklevel=2,
            )

    def _enter_once(self) -> None:
        if self._entered:
            raise RuntimeError("an operation runs once: make a new one with audit_log.operation()")
        self._entered = True

    def _become_current(self) -> None:
        self._around = _current.get()
        self._begun = dict(self._entry)
        self._fields = audit_fields()
        _current.set(self)

    def _leave(self) -> None:
        """Be current no longer, where the outcome was recorded in another task."""
        if _current.get() is self:
            _current.set(self._around)

    def _is_awaited(self, error: BaseException | None) -> bool:
        return self.durable and (error is None or isinstance(error, Exception))

    def _outcome(self, error: BaseException | None) -> tuple[dict[str, object], Kind]:
        data = _readable(self.data)
        if self._reason is not None:
            data["reason"] = self._reason
        if error is not None:
            data["exception"] = exception_data(error)
        entry = {k: v for k, v in self._entry.items() if k in _CARRIED}
        return {**self._bound(), **entry, "data": data}, self._verdict or _verdict(error)

    def _bound(self) -> dict[str, object]:
        """Return who asked, as it is bound by now; not what is bound for somebody else's request.

        The outcome may come in another task, or when another request has the thread.
        """
        now = audit_fields()
        if now.get("request_id") == self._fields.get("request_id"):
            return dict(now)
        return {**dict.fromkeys(now), **self._fields}

    def _plain(self, entry: Mapping[str, object], unusable: AuditEntryError) -> dict[str, object]:
        """Return an outcome without what made it unusable: it matters more than its data."""
        known = {key: self._begun[key] for key in _CARRIED & self._begun.keys()}
        return {**self._bound(), **known, "data": {"unusable": unusable.reason}}

    def _finish(self, error: BaseException | None) -> None:
        entry, outcome = self._outcome(error)
        try:
            try:
                self._caller._submit(entry, outcome)
            except AuditEntryError as unusable:
                self._caller._submit(self._plain(entry, unusable), outcome)
        except Exception as lost:
            if error is None:
                raise
            # the body's own exception propagates unchanged: it must not be replaced by ours
            logging.getLogger("structlog_audit").error(
                "the outcome %s of operation %s is lost: %s", outcome, self.operation_id, lost
            )


_CARRIED = frozenset({"action", "operation_id", "app", "user_id", "company_id", "service_id",
                      "client_ip", "remote_address", "forwarded_for", "type", "request_id",
                      "trace_id", "span_id"})  # fmt: skip

_current: ContextVar[Operation | None] = operation_under_way


@contextlib.contextmanager
def resumed(operation: Operation | None) -> Iterator[None]:
    """Have an operation be the current one for the length of a block, or with None, no operation.

    It is for what an operation does elsewhere than within its `with` block: a response that streams
    is produced after the middleware has returned it.
    """
    before = _current.get()
    _current.set(operation)
    try:
        yield
    finally:
        _current.set(before)


class _Nobody:
    """Whoever calls for an operation that is none."""

    def _begin(self, entry: Mapping[str, object]) -> Receipt:
        raise AuditEntryError("there is no operation here: write `with audit_log.operation(…):`")

    async def _abegin(self, entry: Mapping[str, object]) -> Receipt:
        return self._begin(entry)

    def _end(self, entry: Mapping[str, object], kind: Kind) -> Receipt:
        return self._begin(entry)

    async def _aend(self, entry: Mapping[str, object], kind: Kind) -> Receipt:
        return self._begin(entry)

    def _submit(self, entry: Mapping[str, object], kind: Kind) -> None:
        self._begin(entry)


def current_operation() -> Operation:
    """Return the operation that is under way in this task or thread.

    Where none is (a request that is excluded from auditing, a test), it is one of which nothing is
    recorded, with no receipt: code that adds to its data works all the same.
    """
    operation = _current.get()
    if operation is None:
        operation = Operation(_Nobody(), {})
        operation._entered = True
    return operation


def resume(operation: Operation | None) -> None:
    """Make an operation the current one here, where its work goes on in another task or thread."""
    _current.set(operation)


def _readable(data: Any) -> dict[str, Any]:
    """Copy what the body left behind; the outcome matters more than its data."""
    with contextlib.suppress(Exception):  # a foreign mapping may raise anything
        if isinstance(data, Mapping):
            return {**data}
    return {"data": data}  # it is marked as unreadable, or stands there as it is


def _verdict(error: BaseException | None) -> Kind:
    if error is None:
        return "Complete"
    return "Fail" if isinstance(error, Exception) else "Abandon"
