"""Ariadne: an operation that is not excluded is on record before any resolver runs.

Ariadne tells its extensions nothing of the document before the first resolver, so the Begin is
made there, once for all root fields. Of subscriptions it tells them nothing at all:
`AuditExtension.subscriptions` puts itself before their sources. As long as that was not done, no
operation of a schema with subscriptions is carried out.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from inspect import isawaitable
from typing import Any

from ariadne.types import Extension
from graphql import (
    GraphQLError,
    GraphQLField,
    GraphQLResolveInfo,
    GraphQLSchema,
    default_field_resolver,
)

from structlog_audit.exclusions import Exclude
from structlog_audit.operation import resume
from structlog_audit.web._graphql import Binding, GraphQLAuditing, Run, selected, unavailable
from structlog_audit.web._request import Ask

_log = logging.getLogger("structlog_audit")
Resolver = Callable[..., Any]
_AUDITED = "__audited__"
"""Attribute of a source that has its Begin before it."""


class AuditExtension:
    """Audits operations that run on an event loop.

    Ariadne calls it to make an extension for each operation:
    `GraphQLHTTPHandler(extensions=[AuditExtension()])`.

    Args:
        queries: whether queries are audited as well as mutations and subscriptions.
        document: whether entries carry the whole document, where nothing can be redacted by name.
        exclude: operations that are not audited.
        user: given Ariadne's context value, returns who asks, or None while that is not known.
        company: the same for the company or tenant.
        service: the same for the machine account.
        action: given the context value, names what is done; by default, the operation's name.
        privileged: given the context value, tells whether the caller has privileged roles.

    Raises:
        AuditConfigurationError: an option is unusable.
    """

    def __init__(
        self,
        *,
        queries: bool = False,
        document: bool = False,
        exclude: Sequence[Exclude] = (),
        user: Ask | None = None,
        company: Ask | None = None,
        service: Ask | None = None,
        action: Ask | None = None,
        privileged: Ask | None = None,
    ) -> None:
        self._auditing = GraphQLAuditing(
            "Ariadne", queries=queries, document=document, exclude=exclude, user=user,
            company=company, service=service, action=action, privileged=privileged,
        )  # fmt: skip

    def __call__(self) -> Extension:
        """Return the extension for one operation."""
        return _Async(self._auditing)

    def subscriptions(self, schema: GraphQLSchema) -> GraphQLSchema:
        """Have the subscriptions of a schema audited, over whatever protocol they come.

        Args:
            schema: an executable schema.

        Returns:
            The same schema.
        """
        for field in _subscriptions(schema):
            if not hasattr(field.subscribe, _AUDITED):
                source = field.subscribe or default_field_resolver
                field.subscribe = _audited(self._auditing, source)
        return schema


class AuditExtensionSync(AuditExtension):
    """Audits operations of `graphql_sync` and of WSGI."""

    def __call__(self) -> Extension:
        """Return the extension for one operation."""
        return _Sync(self._auditing)


class _Extension(Extension):
    """The extension for one operation."""

    def __init__(self, auditing: GraphQLAuditing) -> None:
        self._auditing = auditing
        self._run: Run | None = None
        self._is_decided = False
        self._binding = Binding()

    def request_started(self, context: Any) -> None:
        self._binding.bind()

    def request_finished(self, context: Any) -> None:
        self._binding.undo()
        run = self._run
        if run is not None and run.is_under_way:
            error = None if run.executed else sys.exc_info()[1]
            if error is None and not run.executed:
                run.operation.abandon("there is no result")
            self._end(run, error)

    def has_errors(self, errors: list[GraphQLError], context: Any) -> None:
        if self._run is not None:
            self._run.failed(errors)

    def format(self, context: Any) -> dict[str, Any] | None:
        """Take note that there is a result; Ariadne asks whenever there is one."""
        if self._run is not None:
            self._run.executed = True
        return None

    def _end(self, run: Run, error: BaseException | None) -> None:
        run.end_sync(error)

    def _run_of(self, info: GraphQLResolveInfo[Any]) -> Run | None:
        """Return the operation of a root field, None for other fields and what is left out."""
        if info.path.prev is not None:
            return None
        if not self._is_decided:
            _check(info.schema)
            self._run = _run_of(self._auditing, info)
            self._is_decided = True
        return self._run


class _Async(_Extension):
    def __init__(self, auditing: GraphQLAuditing) -> None:
        super().__init__(auditing)
        self._beginning = asyncio.Lock()

    def resolve(
        self, next_: Resolver, obj: Any, info: GraphQLResolveInfo[Any], **kwargs: Any
    ) -> Any:
        run = self._run_of(info)
        if run is None:
            return next_(obj, info, **kwargs)
        return self._resolve(run, lambda: next_(obj, info, **kwargs))

    async def _resolve(self, run: Run, resolver: Callable[[], Any]) -> Any:
        async with self._beginning:  # root fields of a query are resolved side by side
            await run.begin()
        value = resolver()
        return await value if isawaitable(value) else value

    def _end(self, run: Run, error: BaseException | None) -> None:
        if run.operation.durable:
            run.operation.durable = False
            _log.error("Ariadne cannot wait for an outcome on an event loop: it is not durable yet")
        super()._end(run, error)


class _Sync(_Extension):
    def resolve(
        self, next_: Resolver, obj: Any, info: GraphQLResolveInfo[Any], **kwargs: Any
    ) -> Any:
        run = self._run_of(info)
        if run is not None:
            run.begin_sync()
        return next_(obj, info, **kwargs)


def _run_of(auditing: GraphQLAuditing, info: GraphQLResolveInfo[Any]) -> Run | None:
    variables: Any = info.variable_values
    coerced = getattr(variables, "coerced", variables)  # a mapping before graphql-core 3.3
    return auditing.run(selected(info.operation, info.fragments, coerced, info.context))


def _subscriptions(schema: GraphQLSchema) -> Iterable[GraphQLField]:
    kind = schema.subscription_type
    return () if kind is None else kind.fields.values()


def _check(schema: GraphQLSchema) -> None:
    """Make sure that the subscriptions of a schema are audited.

    Raises:
        GraphQLError: they are not.
    """
    if not all(hasattr(field.subscribe, _AUDITED) for field in _subscriptions(schema)):
        _log.error(
            "GraphQL operations are refused: the subscriptions of the schema are not audited "
            "(hint: schema = audit.subscriptions(schema), with audit = AuditExtension(…))"
        )
        raise unavailable()


def _audited(auditing: GraphQLAuditing, source: Resolver) -> Resolver:
    """Return the source of a subscription with its Begin before it."""

    async def subscribe(obj: Any, info: GraphQLResolveInfo[Any], **kwargs: Any) -> Any:
        run = _run_of(auditing, info)
        if run is None:
            return await _value(source(obj, info, **kwargs))
        await run.begin()
        try:
            events = aiter(await _value(source(obj, info, **kwargs)))
        except BaseException as error:
            await run.end(error)
            raise
        run.step_out()  # the task of the connection, which goes on with other messages
        return _Events(run, events)

    setattr(subscribe, _AUDITED, True)
    return subscribe


async def _value(value: Any) -> Any:
    return await value if isawaitable(value) else value


class _Events:
    """The events of a subscription, with its outcome behind them."""

    def __init__(self, run: Run, events: AsyncIterator[Any]) -> None:
        self._run = run
        self._events = events
        self._reader: asyncio.Task[Any] | None = None

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> Any:
        self._watch_reader()
        resume(self._run.operation)
        try:
            event = await anext(self._events)
        except StopAsyncIteration:
            await self._run.end(None)
            raise
        except BaseException as error:
            await self._run.end(error)
            raise
        self._run.messages += 1
        return event

    async def aclose(self) -> None:
        """End it before its last event."""
        close: Callable[[], Awaitable[None]] | None = getattr(self._events, "aclose", None)
        try:
            if close is not None:
                await close()
        finally:
            if self._run.is_under_way:
                self._run.operation.abandon("the client has gone")
                await self._run.end(None)

    def __del__(self) -> None:
        self._give_up()  # nobody ever asked for an event

    def _watch_reader(self) -> None:
        """Notice a reader that breaks between two events.

        Ariadne's WebSocket handlers do not close the events when a message cannot be sent.
        """
        reader = asyncio.current_task()
        if reader is not None and reader is not self._reader:
            reader.add_done_callback(self._on_reader_done)
            self._reader = reader

    def _on_reader_done(self, reader: asyncio.Task[Any]) -> None:
        if self._run.is_under_way and (reader.cancelled() or reader.exception() is not None):
            self._give_up()

    def _give_up(self) -> None:
        if self._run.is_under_way:
            self._run.operation.durable = False  # nothing can wait here
            self._run.operation.abandon("the client has gone")
            self._run.end_sync(None)
