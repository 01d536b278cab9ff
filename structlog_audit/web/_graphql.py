"""What the interceptors of GraphQL share: what a document asks for, its Begin, and its outcome.

1. The Begin is durable before any resolver runs; where it cannot be, none runs.
2. What the client chooses, the operation's name and aliases, leaves nothing out of auditing:
   exclusions see the fields of the schema, and every root field must be left out.
3. The outcome comes from the result: an operation whose resolver failed is no failed request.

An operation that does not parse or validate has no effect, and no entry.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from graphql import (
    ArgumentNode,
    BooleanValueNode,
    DirectiveNode,
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    InlineFragmentNode,
    ListValueNode,
    Node,
    ObjectFieldNode,
    OperationDefinitionNode,
    SelectionNode,
    SelectionSetNode,
    ValueNode,
    VariableNode,
    Visitor,
    get_operation_ast,
    print_ast,
    visit,
)

from structlog_audit.context import audit_fields, bind_audit_context, restore_audit_fields
from structlog_audit.exclusions import Exclude
from structlog_audit.logger import audit_log
from structlog_audit.operation import Operation, resume
from structlog_audit.processors import Redact
from structlog_audit.values import exception_data
from structlog_audit.web._request import Ask, Auditing, check_exclusions, nobody

_REDACT = Redact()
_log = logging.getLogger("structlog_audit")

NOT_CARRIED_OUT = "The operation was not carried out, because it could not be recorded."
NOT_ON_RECORD = "The outcome of the operation could not be recorded."
CODE = "AUDIT_UNAVAILABLE"
MOST_FIELDS = 50
"""Root fields that an entry names."""
MOST_IN_ACTION = 5
LONGEST_NAME = 100
"""Characters of a name that the client chose."""
MOST_ERRORS = 10
QUERIES = Exclude(
    kind="public_read",
    method="QUERY",
    operation="*",
    reason="queries=True audits them",
)
"""In force unless queries are audited; like every exclusion of reads, not for the privileged."""


def unavailable(text: str = NOT_CARRIED_OUT) -> GraphQLError:
    """Return what the client is told; what went wrong inside is nobody's business outside."""
    return GraphQLError(text, extensions={"code": CODE})


@dataclass(frozen=True, slots=True)
class Selected:
    """The operation of a document that is to run.

    Attributes:
        kind: `query`, `mutation` or `subscription`.
        name: what the client calls it, or None.
        fields: its root fields, as the schema calls them, in their order.
        variables: those that were given and that it declares.
        text: the whole document.
        raw: what the application's functions are given.
    """

    kind: str
    name: str | None
    fields: tuple[str, ...]
    variables: Mapping[str, object]
    text: str
    raw: Any

    @property
    def action(self) -> str:
        """The operation's name, or those of its root fields."""
        if self.name:
            return self.name[:LONGEST_NAME]
        names = list(dict.fromkeys(self.fields))
        more = ",…" if len(names) > MOST_IN_ACTION else ""
        return ",".join(name[:LONGEST_NAME] for name in names[:MOST_IN_ACTION]) + more or self.kind


def select(
    document: DocumentNode, name: str | None, variables: Mapping[str, object] | None, raw: Any
) -> Selected | None:
    """Return the operation that graphql-core will run, or None if it will run none."""
    operation = get_operation_ast(document, name)
    if operation is None:
        return None
    fragments = {
        node.name.value: node
        for node in document.definitions
        if isinstance(node, FragmentDefinitionNode)
    }
    return selected(operation, fragments, variables or {}, raw)


def selected(
    operation: OperationDefinitionNode,
    fragments: Mapping[str, FragmentDefinitionNode],
    variables: Mapping[str, object],
    raw: Any,
) -> Selected:
    """Return what an operation asks for."""
    declared = {one.variable.name.value: one for one in operation.variable_definitions or ()}
    defaults = {
        name: one.default_value.value
        for name, one in declared.items()
        if isinstance(one.default_value, BooleanValueNode)
    }
    walk = _RootFields(fragments, {**defaults, **variables})
    return Selected(
        kind=operation.operation.value,
        name=None if operation.name is None else operation.name.value,
        # what is asked for twice under one response key runs once
        fields=tuple(name for _, name in dict.fromkeys(walk.of(operation.selection_set))),
        variables=_shown(
            {name: variables[name] for name in declared if name in variables},
            [operation, *fragments.values()],
        ),
        text=print_ast(operation) if operation.loc is None else operation.loc.source.body,
        raw=raw,
    )


def _shown(variables: dict[str, object], nodes: Iterable[Node]) -> dict[str, object]:
    """Redact variables by the arguments that they are given to: the client names variables."""
    if not variables:
        return variables
    uses = _Uses()
    for node in nodes:
        visit(node, uses)
    return {
        name: next(filter(None, (_REDACT.value(use, value) for use in uses.of[name])), value)
        for name, value in variables.items()
    }


class _Uses(Visitor):
    """Collects the names of the arguments and fields that variables are given to."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, set[str]] = defaultdict(set)

    def enter_argument(self, node: ArgumentNode, *_: object) -> None:
        self._take(node.name.value, node.value)

    def enter_object_field(self, node: ObjectFieldNode, *_: object) -> None:
        self._take(node.name.value, node.value)

    def _take(self, name: str, value: ValueNode) -> None:
        if isinstance(value, VariableNode):
            self.of[value.name.value].add(name)
        elif isinstance(value, ListValueNode):
            for item in value.values:
                self._take(name, item)


class _RootFields:
    """Collects response keys and names of root fields, those of fragments too."""

    def __init__(
        self,
        fragments: Mapping[str, FragmentDefinitionNode],
        variables: Mapping[str, object],
    ) -> None:
        self._fragments = fragments
        self._variables = variables
        self._seen: set[str] = set()

    def of(self, selections: SelectionSetNode) -> Iterator[tuple[str, str]]:
        for node in selections.selections:
            if self._is_left_out(node):
                continue
            if isinstance(node, FieldNode):
                yield (node.alias or node.name).value, node.name.value
            elif isinstance(node, InlineFragmentNode):
                yield from self.of(node.selection_set)
            elif isinstance(node, FragmentSpreadNode):
                yield from self._spread(node.name.value)

    def _spread(self, name: str) -> Iterator[tuple[str, str]]:
        if name not in self._seen and name in self._fragments:
            self._seen.add(name)
            yield from self.of(self._fragments[name].selection_set)

    def _is_left_out(self, node: SelectionNode) -> bool:
        """Tell whether `@skip` or `@include` leaves it out; in doubt it is not."""
        return any(
            self._condition(directive) is value
            for directive in node.directives or ()
            for name, value in (("skip", True), ("include", False))
            if directive.name.value == name
        )

    def _condition(self, directive: DirectiveNode) -> object:
        for argument in directive.arguments or ():
            if argument.name.value == "if":
                if isinstance(argument.value, BooleanValueNode):
                    return argument.value.value
                if isinstance(argument.value, VariableNode):
                    return self._variables.get(argument.value.name.value)
        return None


class _AskedField:
    """A root field, as exclusions see it."""

    __slots__ = ("method", "operation", "path", "raw", "route")

    def __init__(self, asked: Selected, field: str) -> None:
        self.method = asked.kind.upper()
        self.path = ""
        self.route: str | None = None
        self.operation: str | None = field
        self.raw = asked.raw


class GraphQLAuditing:
    """The options of an interceptor of GraphQL.

    Args:
        place: what it is, for the report.
        queries: whether queries are audited as well.
        document: whether entries carry the whole document.
        exclude: operations that are not audited.
        user: given the framework's context, returns who asks, or None while that is not known.
        company: the same for the company or tenant.
        service: the same for the machine account.
        action: given the context, names what is done; None for the operation's name.
        privileged: given the context, tells whether the caller has privileged roles.

    Raises:
        AuditConfigurationError: an option is unusable.
    """

    def __init__(
        self,
        place: str,
        *,
        queries: bool,
        document: bool,
        exclude: Sequence[Exclude],
        user: Ask | None,
        company: Ask | None,
        service: Ask | None,
        action: Ask | None,
        privileged: Ask | None,
    ) -> None:
        check_exclusions(exclude, privileged)
        self._document = document
        self._auditing = Auditing(
            place, exclude=(*exclude, *(() if queries else (QUERIES,))), user=user,
            company=company, service=service, action=action,
            privileged=privileged or nobody,
        )  # fmt: skip

    def run(self, asked: Selected | None) -> Run | None:
        """Return the run of an operation, which has not begun, or None if it is left out."""
        if asked is None or self._leaves_out(asked):
            return None
        who = self._auditing.known(asked.raw)
        operation = audit_log.operation(
            action=self._auditing.named(asked.raw) or asked.action,
            type="GraphQL",
            data=self._data(asked, who),
            **who,
        )
        return Run(self, operation, asked)

    def _leaves_out(self, asked: Selected) -> bool:
        return all(
            self._auditing.leaves_out(_AskedField(asked, field))
            for field in dict.fromkeys(asked.fields or ("",))
        )

    def _data(self, asked: Selected, who: Mapping[str, object]) -> dict[str, object]:
        data: dict[str, object] = {
            "operation": asked.kind,
            "fields": [name[:LONGEST_NAME] for name in asked.fields[:MOST_FIELDS]],
        }
        if len(asked.fields) > MOST_FIELDS:
            data["fieldCount"] = len(asked.fields)
        if asked.variables:
            data["variables"] = dict(asked.variables)
        if self._document:
            data["document"] = asked.text
        if "user_id" not in who:
            data["userKnown"] = False
        return data

    def learn(self, operation: Operation, raw: Any) -> None:
        """Say in the outcome what is known by now."""
        operation._learn(**self._auditing.known(raw))
        named = self._auditing.named(raw)
        if named is not None:
            operation._learn(action=named)


class Binding:
    """Has the entries that resolvers make say that they came by GraphQL."""

    def __init__(self) -> None:
        self._before: Mapping[str, object] | None = None

    def bind(self) -> None:
        """Do so from now on."""
        self._before = audit_fields()
        bind_audit_context(type="GraphQL")

    def undo(self) -> None:
        """Bind what was bound before, in the same task or thread."""
        if self._before is not None:
            restore_audit_fields(self._before)
            self._before = None


class Run:
    """One operation on its way; it begins once and ends once.

    Attributes:
        operation: what is recorded of it.
        executed: whether its result is complete, whether or not the client receives it.
        messages: results of a subscription so far.
    """

    def __init__(self, auditing: GraphQLAuditing, operation: Operation, asked: Selected) -> None:
        self.operation = operation
        self.executed = False
        self.messages = 0
        self._auditing = auditing
        self._asked = asked
        self._errors: list[GraphQLError] = []
        self._tried = False
        self._begun = False
        self._ended = False
        self._start = perf_counter()

    @property
    def is_under_way(self) -> bool:
        """Whether it has begun and has not ended."""
        return self._begun and not self._ended

    @property
    def is_subscription(self) -> bool:
        """Whether it is one."""
        return self._asked.kind == "subscription"

    async def begin(self) -> None:
        """Have the Begin on record; make it the current operation, here too if it has begun.

        Raises:
            GraphQLError: it could not be recorded.
        """
        if self._begun:
            resume(self.operation)
            return
        self._try()
        try:
            await self.operation.__aenter__()
        except Exception as error:  # noqa: BLE001 - a processor may raise anything
            raise _refused(error) from None
        self._begun = True

    def begin_sync(self) -> None:
        """Do the same in a thread that may wait.

        Raises:
            GraphQLError: it could not be recorded.
        """
        if self._begun:
            resume(self.operation)
            return
        self._try()
        try:
            self.operation.__enter__()
        except Exception as error:  # noqa: BLE001 - a processor may raise anything
            raise _refused(error) from None
        self._begun = True

    def _try(self) -> None:
        if self._tried:  # refused, or cancelled while it waited
            raise unavailable()
        self._tried = True

    def step_out(self) -> None:
        """Leave this task or thread to what it did before; the operation goes on elsewhere."""
        resume(self.operation._around)

    def failed(self, errors: Iterable[GraphQLError] | None) -> None:
        """Take note of errors in a result."""
        self._errors.extend(errors or ())

    async def end(self, error: BaseException | None) -> None:
        """Record the outcome, once.

        Raises:
            GraphQLError: it was to be durable, and is not.
        """
        if self.is_under_way:
            error = self._judge(error)
            try:
                await self.operation.__aexit__(_type(error), error, None)
            except Exception as lost:  # noqa: BLE001 - a processor may raise anything
                self._lose(lost, error)

    def end_sync(self, error: BaseException | None) -> None:
        """Do the same in a thread that may wait; of one that may not, only if it is not durable.

        Raises:
            GraphQLError: it was to be durable, and is not.
        """
        if self.is_under_way:
            error = self._judge(error)
            try:
                self.operation.__exit__(_type(error), error, None)
            except Exception as lost:  # noqa: BLE001 - a processor may raise anything
                self._lose(lost, error)

    def _judge(self, error: BaseException | None) -> BaseException | None:
        self._ended = True
        self._auditing.learn(self.operation, self._asked.raw)
        found: dict[str, object] = {}
        if self.is_subscription:
            found["messages"] = self.messages
        if self._errors:
            self.operation.fail("the result has errors")
            found["errors"] = [_described(one) for one in self._errors[:MOST_ERRORS]]
            if len(self._errors) > MOST_ERRORS:
                found["errorCount"] = len(self._errors)
        found["durationMs"] = round((perf_counter() - self._start) * 1000, 3)
        if isinstance(self.operation.data, dict):
            self.operation.data.update(found)
        if self.executed and not isinstance(error, Exception):
            return None  # it was carried out; only the client has gone meanwhile
        return error

    def _lose(self, lost: Exception, error: BaseException | None) -> None:
        if self.operation.durable and (error is None or isinstance(error, Exception)):
            _log.error("a result was held back: its outcome could not be recorded: %s", lost)
            raise unavailable(NOT_ON_RECORD) from None
        _log.error("the outcome of operation %s is lost: %s", self.operation.operation_id, lost)


def _refused(error: Exception) -> GraphQLError:
    _log.error("a GraphQL operation was refused: its Begin could not be recorded: %s", error)
    return unavailable()


def _type(error: BaseException | None) -> type[BaseException] | None:
    return None if error is None else type(error)


def _described(error: GraphQLError) -> dict[str, object]:
    """Describe an error of a result like an exception, by that of the resolver if there is one."""
    cause = error.original_error
    described = exception_data(error if cause is None else cause)
    path = ".".join(map(str, error.path or ()))
    return {"path": path, "type": described["type"], "message": described["message"]}
