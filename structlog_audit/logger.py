"""The audit logger: runs the processors of structlog's configuration, and insists on an answer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog
from structlog.exceptions import DropEvent

from structlog_audit.call import CALL, CAPTURES, Call, How
from structlog_audit.entry import Kind, Receipt, check_names
from structlog_audit.exceptions import AuditEntryError, AuditNotConfiguredError
from structlog_audit.operation import Operation
from structlog_audit.processors import AddAuditFields, RouteAudit, check_order
from structlog_audit.values import exception_data

if TYPE_CHECKING:
    from typing_extensions import Self

METHOD = "info"  # what foreign processors are told: unknown level names break some of them


class AuditLogger:
    """Records audit entries through the structlog configuration in force.

    It is not subject to any minimum level. Every method that records returns a receipt when the
    entry is durable and raises when it is not.

    Args:
        context: values that every entry of this logger carries.
    """

    __slots__ = ("_context", "_wrapped")

    def __init__(self, context: Mapping[str, object] | None = None) -> None:
        self._context = dict(context or {})
        check_names(self._context)
        self._wrapped: tuple[Any, Any] | None = None

    def __repr__(self) -> str:
        return f"<AuditLogger with {sorted(self._context)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._context,)

    def bind(self, **values: object) -> Self:
        """Return a new logger with these values added."""
        return type(self)({**self._context, **values})

    def unbind(self, *names: str) -> Self:
        """Return a new logger without these values.

        Raises:
            KeyError: if one of them is not bound.
        """
        context = dict(self._context)
        for name in names:
            del context[name]
        return type(self)(context)

    def try_unbind(self, *names: str) -> Self:
        """Return a new logger without these values, bound or not."""
        return type(self)({k: v for k, v in self._context.items() if k not in names})

    def new(self, **values: object) -> Self:
        """Return a new logger with these values alone."""
        return type(self)(values)

    def info(self, description: str | None = None, /, **entry: object) -> Receipt:
        """Record an entry; return when it is durable.

        Args:
            description: a text for people; it becomes `data.description`.
            entry: `action` (required), other fields in Python spelling (`user_id`, …), `data`, and
                anything else, which goes into `data`. `exc_info` adds the exception.

        Returns:
            The entry's receipt.

        Raises:
            AuditEntryError: the entry is unusable.
            AuditWriteError: the sink did not confirm it.
            AuditNotConfiguredError: no handler confirmed it.
        """
        receipt = self._run(description, entry, "Record", "record").receipt
        assert receipt is not None
        return receipt

    audit = info

    async def ainfo(self, description: str | None = None, /, **entry: object) -> Receipt:
        """Record an entry like `info`, without blocking the event loop.

        A task that is cancelled meanwhile waits for the outcome and is cancelled then.
        """
        return await self._arun(description, entry, "Record")

    aaudit = ainfo

    def operation(self, description: str | None = None, /, **entry: object) -> Operation:
        """Return an operation for `with` or `async with`; takes what `info` takes."""
        given = {**self._context, **entry}
        if description is not None:
            if "description" in given:
                raise AuditEntryError("description is given twice: as a text and as a keyword")
            given["description"] = description
        check_names(given)
        return Operation(self.new(), given)

    def _begin(self, entry: Mapping[str, object]) -> Receipt:
        return self._end(entry, "Begin")

    async def _abegin(self, entry: Mapping[str, object]) -> Receipt:
        return await self._aend(entry, "Begin")

    def _end(self, entry: Mapping[str, object], kind: Kind) -> Receipt:
        receipt = self._run(None, entry, kind, "record").receipt
        assert receipt is not None
        return receipt

    async def _aend(self, entry: Mapping[str, object], kind: Kind) -> Receipt:
        return await self._arun(None, entry, kind)

    def _submit(self, entry: Mapping[str, object], kind: Kind) -> None:
        self._run(None, entry, kind, "submit")

    async def _arun(
        self, description: str | None, entry: Mapping[str, object], kind: Kind
    ) -> Receipt:
        pending = self._run(description, entry, kind, "arecord").pending
        assert pending is not None
        return await pending

    def _run(
        self, description: str | None, entry: Mapping[str, object], kind: Kind, how: How
    ) -> Call:
        check_names(entry)  # the handler would, too; but it may never see the entry
        given = {**self._context, **entry}
        if "exc_info" in given:
            _render_exception(given)
        call = Call(given, kind, how, described=description is not None)
        # foreign processors expect an event; the action serves where there is no text
        event = given.get("action") if description is None else description
        self._process(call, {**given, "event": event, CALL: call})
        return call

    def _process(self, call: Call, event_dict: Any) -> None:
        config = structlog.get_config()
        wrapped = self._wrapped_logger(config["logger_factory"])
        processor = None
        processors = config["processors"]
        if processors is not _checked.processors:
            check_order(processors)
            _checked.processors = processors
        if CAPTURES:
            processors = _captured(processors)
        try:
            for processor in processors:
                if type(processor) is RouteAudit and processor.take(METHOD, event_dict):
                    break
                event_dict = processor(wrapped, METHOD, event_dict)
        except DropEvent:
            if call.delivered:
                return
            raise _dropped(processor) from None
        if not call.delivered:  # it was, if somebody caught what ends the chain
            raise _unconfirmed(processors)

    def _wrapped_logger(self, factory: Any) -> Any:
        """Return a logger such as processors expect it; nothing is written to it."""
        known = self._wrapped
        if known is None or known[0] is not factory:
            known = self._wrapped = (factory, _made_by(factory))
        return known[1]


def _made_by(factory: Any) -> Any:
    try:
        return factory()
    except TypeError:  # it wants what get_logger is given: a name
        return factory("audit")


def get_logger(**initial_values: object) -> AuditLogger:
    """Return an audit logger whose entries carry these values."""
    return AuditLogger(initial_values)


audit_log = get_logger()
"""An audit logger, ready made."""


def _captured(processors: Any) -> Any:
    """Return the processors to run while tests capture entries, whatever is configured."""
    if any(isinstance(processor, RouteAudit) for processor in processors):
        return processors
    return [AddAuditFields(None), RouteAudit(CAPTURES[-1])]


class _Checked:
    """The processors whose order was checked; each list once."""

    processors: Any = None


_checked = _Checked()


def _render_exception(given: dict[str, object]) -> None:
    """Put what `exc_info` points at into the entry, as structlog's own processors would."""
    error = given.pop("exc_info")
    if isinstance(error, tuple):
        error = error[1]
    elif error is True:
        error = sys.exc_info()[1]
    if isinstance(error, BaseException):
        given["exception"] = exception_data(error)
    elif error:
        raise AuditEntryError("exc_info must be an exception, True or False")


def _name(processor: object) -> str:
    return getattr(processor, "__qualname__", None) or type(processor).__qualname__


def _dropped(processor: object) -> AuditNotConfiguredError:
    name = _name(processor)
    if name == "LogCapture":
        return AuditNotConfiguredError(
            "structlog.testing.capture_logs() took the place of the audit processors: "
            "nothing was recorded",
            hint="use structlog_audit.testing.capture_audit() in tests",
        )
    return AuditNotConfiguredError(
        f"the processor {name} dropped an audit entry before it was recorded",
        hint=f"move *structlog_audit.audit_processors(…) before {name}",
    )


def _unconfirmed(processors: Any) -> AuditNotConfiguredError:
    names = [_name(processor) for processor in processors]
    if "RouteAudit" not in names:
        return AuditNotConfiguredError(
            "structlog's configuration has no audit processors: nothing was recorded",
            hint="add *structlog_audit.audit_processors(…) to structlog.configure(processors=[…]), "
            "after merge_contextvars and before filters and renderers",
        )
    before = [name for name in names[: names.index("RouteAudit")] if name not in _OURS]
    renderers = [name for name in before if "Render" in name or "render" in name or "wrap" in name]
    culprit = renderers[0] if renderers else f"one of {', '.join(before) or 'its processors'}"
    return AuditNotConfiguredError(
        f"no handler confirmed the audit entry: {culprit} replaced the event dict before it "
        "reached the audit processors",
        hint="move *structlog_audit.audit_processors(…) before it, or have it keep the key "
        f"{CALL!r}",
    )


_OURS = ("AddAuditFields", "Redact")
