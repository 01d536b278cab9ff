"""Auditing a function: its Begin is durable before it runs, and its outcome follows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import CoroutineType, GeneratorType
from typing import Any, TypeVar, cast

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.logger import audit_log
from structlog_audit.operation import Operation

F = TypeVar("F", bound=Callable[..., Any])
Data = Mapping[str, object] | Callable[..., Mapping[str, object]]

_RUNS_LATER = "@audited() is around what runs later, when nobody waits for it any more"
_LATER = (CoroutineType, GeneratorType)


def audited(
    function: None = None,
    /,
    *,
    action: str | None = None,
    data: Data | None = None,
    type: str | None = None,
) -> Callable[[F], F]:
    """Audit every call of a function, sync or async, as an operation.

    Within it, `current_operation()` is that operation.

    Args:
        action: what is done; the function's name if None.
        data: data of the entries, or a function that is given what the function is given, and
            returns them.
        type: who calls, such as `CLI` or `Task`.

    Raises:
        AuditConfigurationError: an argument is unusable, or what is decorated is no function, or a
            generator: it runs when nobody waits for it any more.
    """
    if function is not None:
        raise AuditConfigurationError(
            "@audited is used without parentheses, or with a text",
            hint='write @audited(action="…")',
        )
    if action is not None and not (isinstance(action, str) and action):
        raise AuditConfigurationError("action= is a text: @audited(action='InvoiceDelete')")
    if data is not None and not (callable(data) or isinstance(data, Mapping)):
        raise AuditConfigurationError("data= is a mapping, or a function that returns one")

    def decorate(function: F) -> F:
        _check(function)
        named = action or function.__qualname__

        def operation(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
            found = data(*args, **kwargs) if callable(data) else data
            given: dict[str, object] = {"action": named, "data": dict(found or {})}
            return audit_log.operation(**given, **({} if type is None else {"type": type}))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with operation(args, kwargs) as begun:
                found = function(*args, **kwargs)
                if isinstance(found, _LATER):
                    found.close()  # nothing of it has run
                    begun.abandon("it returned what runs later, and was not recorded as such")
                    raise AuditConfigurationError(_RUNS_LATER)
                return found

        @functools.wraps(function)
        async def acall(*args: Any, **kwargs: Any) -> Any:
            async with operation(args, kwargs):
                return await function(*args, **kwargs)

        return cast(F, acall if inspect.iscoroutinefunction(function) else call)

    return decorate


def _check(function: object) -> None:
    if not inspect.isroutine(function) or isinstance(function, (staticmethod, classmethod)):
        raise AuditConfigurationError(
            f"@audited() stands before a function, not {function!r}",
            hint="write @audited(), with parentheses; staticmethod and classmethod stand above it",
        )
    inner = inspect.unwrap(function)
    hidden = inspect.iscoroutinefunction(inner) and not inspect.iscoroutinefunction(function)
    if hidden or inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise AuditConfigurationError(
            _RUNS_LATER, hint="put `with audit_log.operation(…):` into it, or @audited below"
        )
