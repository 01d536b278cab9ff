"""Strawberry: an operation that is not excluded is on record before any resolver runs.

Put it first among the extensions: what stands before it runs before the Begin.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from strawberry.extensions import SchemaExtension
from strawberry.types.execution import PreExecutionError

from structlog_audit.exclusions import Exclude
from structlog_audit.web._graphql import Binding, GraphQLAuditing, Run, select
from structlog_audit.web._request import Ask


class AuditExtension:
    """Audits operations that run on an event loop: `Schema(extensions=[AuditExtension()])`.

    Strawberry calls it to make an extension for each operation.

    Args:
        queries: whether queries are audited as well as mutations and subscriptions.
        document: whether entries carry the whole document, where nothing can be redacted by name.
        exclude: operations that are not audited.
        user: given Strawberry's execution context, returns who asks, or None while not known.
        company: the same for the company or tenant.
        service: the same for the machine account.
        action: given the execution context, names what is done; by default, the operation's name.
        privileged: given the execution context, tells whether the caller has privileged roles.

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
            "Strawberry", queries=queries, document=document, exclude=exclude, user=user,
            company=company, service=service, action=action, privileged=privileged,
        )  # fmt: skip

    def __call__(self) -> SchemaExtension:
        """Return the extension for one operation."""
        return _Async(self._auditing)


class AuditExtensionSync(AuditExtension):
    """Audits operations of `execute_sync` and of views without an event loop."""

    def __call__(self) -> SchemaExtension:
        """Return the extension for one operation."""
        return _Sync(self._auditing)


class _Extension(SchemaExtension):
    """The extension for one operation."""

    def __init__(self, auditing: GraphQLAuditing) -> None:
        self._auditing = auditing
        self._run: Run | None = None
        self._binding = Binding()

    def _select(self) -> Run | None:
        context = self.execution_context
        assert context.graphql_document is not None
        asked = select(context.graphql_document, context.operation_name, context.variables, context)
        self._run = self._auditing.run(asked)
        return self._run

    def _executed(self) -> None:
        """Look at the result before other extensions mask its errors."""
        self._binding.undo()
        result = self.execution_context.result
        if self._run is not None and result is not None:
            self._run.failed(_errors(result))
            self._run.executed = not hasattr(result, "subsequent_results")

    def _over(self, error: BaseException | None) -> Run | None:
        """Undo what on_execute left, which is not finished if another extension's hook raised."""
        if not isinstance(error, GeneratorExit):  # closed, in whatever task that may be
            self._binding.undo()
        return self._run


class _Async(_Extension):
    async def on_operation(self) -> AsyncIterator[None]:
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
            raise
        finally:
            run = self._over(error)
            if run is not None:
                await run.end(error)

    async def on_execute(self) -> AsyncIterator[None]:
        run = self._select()
        if run is not None:
            await run.begin()
        self._binding.bind()
        yield
        self._executed()

    async def on_stream_result(self, result: Any) -> AsyncIterator[None]:
        run = self._run
        if run is not None and run.is_under_way:
            if not run.executed:
                run.failed(_errors(result))
                run.messages += not isinstance(result, PreExecutionError)
            elif run.operation.durable:
                await run.end(None)
        yield


class _Sync(_Extension):
    def on_operation(self) -> Iterator[None]:
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
            raise
        finally:
            run = self._over(error)
            if run is not None:
                run.end_sync(error)

    def on_execute(self) -> Iterator[None]:
        run = self._select()
        if run is not None:
            run.begin_sync()
        self._binding.bind()
        yield
        self._executed()


def _errors(result: Any) -> list[Any]:
    """Return the errors of a result, or of a part of one that is delivered bit by bit."""
    found = list(getattr(result, "errors", None) or ())
    for name in ("incremental", "completed"):
        for part in getattr(result, name, None) or ():
            found += getattr(part, "errors", None) or ()
    initial = getattr(result, "initial_result", None)
    return found if initial is None else found + _errors(initial)
