"""Who is asking: fields that all audit entries of a task or thread carry.

They live in one context variable, so each thread and each asyncio task has its own, and a task
starts with what its parent had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Final, ParamSpec, Protocol

P = ParamSpec("P")

_EMPTY: Mapping[str, object] = {}
# its name must not begin with "structlog_": merge_contextvars would take it for one of its own
_fields: ContextVar[Mapping[str, object]] = ContextVar("audit_log_context", default=_EMPTY)


WHO = ("user_id", "company_id", "service_id", "operation_id")
"""What entries within an operation take over from it."""


class HasFields(Protocol):
    """An operation, as far as entries within it take over from it."""

    @property
    def fields(self) -> Mapping[str, object]:
        """Its fields, as they are known by now."""
        ...


operation_under_way: ContextVar[Any] = ContextVar("audit_log_operation", default=None)
"""The operation under way in this task or thread (`HasFields`), or None."""


def operation_fields() -> Iterator[tuple[str, object]]:
    """Return who acts in the operation under way, as far as that is known."""
    operation: HasFields | None = operation_under_way.get()
    if operation is not None:
        fields = operation.fields
        for name in WHO:
            value = fields.get(name)
            if value is not None:
                yield name, value


class _Unset:
    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = _Unset()
"""Not given; `None` says that there is no user, no company and so on."""
Field = str | int | None | _Unset


def audit_fields() -> Mapping[str, object]:
    """Return the fields bound here, in Python spelling. Do not change it."""
    return _fields.get()


def bind_audit_context(
    *,
    user_id: Field = UNSET,
    company_id: Field = UNSET,
    service_id: Field = UNSET,
    client_ip: Field = UNSET,
    remote_address: Field = UNSET,
    forwarded_for: Field = UNSET,
    type: Field = UNSET,
    request_id: Field = UNSET,
    trace_id: Field = UNSET,
    span_id: Field = UNSET,
) -> None:
    """Add fields to all audit entries that this task or thread records from now on.

    A value given to the call itself or bound to its logger overrides one bound here.

    Args:
        user_id: who acts.
        company_id: for which company or tenant.
        service_id: the machine account that acts.
        client_ip: address of the client, as far as it can be trusted.
        remote_address: address of the peer of the connection.
        forwarded_for: the raw chain of addresses that proxies sent.
        type: `REST`, `GraphQL`, `WebSocket`, `CLI`, `Task`.
        request_id: identity of the request.
        trace_id: identity of the trace.
        span_id: identity of the span.
    """
    given = {key: value for key, value in locals().items() if value is not UNSET}
    _fields.set({**_fields.get(), **given})


def _for_a_block(bind: Callable[P, None]) -> Callable[P, AbstractContextManager[None]]:
    @contextmanager
    @wraps(bind)
    def block(*args: P.args, **kwargs: P.kwargs) -> Iterator[None]:
        before = _fields.get()
        bind(*args, **kwargs)
        try:
            yield
        finally:
            _fields.set(before)

    block.__doc__ = "Bind fields for the length of a `with` block; see `bind_audit_context`."
    return block


audit_context = _for_a_block(bind_audit_context)


def restore_audit_fields(fields: Mapping[str, object]) -> None:
    """Bind exactly what `audit_fields` returned before.

    It is for code that cannot use a `with` block: a generator that is never finished would leave
    that one wherever it is collected, in the midst of somebody else's request.
    """
    _fields.set(fields)


def clear_audit_context() -> None:
    """Remove all fields bound in this task or thread."""
    _fields.set(_EMPTY)
