"""Two GraphQL services alike; their resolvers write into SQLite what they do, and for whom."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import strawberry
from ariadne import MutationType, QueryType, SubscriptionType, make_executable_schema
from ariadne import graphql as ariadne_graphql
from ariadne import graphql_sync as ariadne_graphql_sync
from graphql import GraphQLSchema

from structlog_audit import audit_log, current_operation
from structlog_audit.web import ariadne as audited_ariadne
from structlog_audit.web import strawberry as audited_strawberry

ASYNC = ("strawberry", "ariadne")
ALL = (*ASYNC, "strawberry-sync", "ariadne-sync")
SDL = """
    type Query { invoices: Int!  secrets: Int! }
    type Mutation {
        deleteInvoice(id: Int!): Int
        login(name: String!, password: String!): Int
        fail(text: String!): Int
        nested: Int
        hang: Int
        durable(id: Int!): Int
    }
    type Subscription { ticks(to: Int!): Int!  fails: Int! }
"""
Info = strawberry.Info


class Database:
    """What took effect."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with closing(self.connect()) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("CREATE TABLE effects (name, id, operation, sequence)")

    def connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=30)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    def write(self, name: str, number: int = 0) -> int:
        operation = current_operation()
        begun = -1 if operation.receipt is None else operation.receipt.sequence
        row = (name, number, operation.operation_id, begun)
        with closing(self.connect()) as connection:
            connection.execute("INSERT INTO effects VALUES (?, ?, ?, ?)", row)
        return number

    def rows(self) -> list[tuple[Any, ...]]:
        with closing(self.connect()) as connection:
            return connection.execute("SELECT * FROM effects").fetchall()

    def names(self) -> list[str]:
        return [row[0] for row in self.rows()]


async def ticking(db: Database, to: int) -> AsyncIterator[int]:
    for number in range(to):
        db.write("ticks", number)
        yield number
        await asyncio.sleep(0)


async def failing(db: Database) -> AsyncIterator[int]:
    yield 0
    raise ValueError("the source is dry")


async def hanging(db: Database) -> int:
    db.write("hang")
    await asyncio.sleep(60)
    return db.write("woke up")


def confirmed(db: Database, number: int) -> int:
    current_operation().durable = True
    return db.write("durable", number)


@strawberry.type
class Query:
    @strawberry.field
    def invoices(self, info: Info) -> int:
        return info.context["db"].write("invoices")

    @strawberry.field
    def secrets(self, info: Info) -> int:
        return info.context["db"].write("secrets")


@strawberry.type
class Mutation:
    @strawberry.mutation
    def delete_invoice(self, info: Info, id: int) -> int | None:
        return info.context["db"].write("deleteInvoice", id)

    @strawberry.mutation
    def login(self, info: Info, name: str, password: str) -> int | None:
        return info.context["db"].write("login")

    @strawberry.mutation
    def fail(self, info: Info, text: str) -> int | None:
        raise ValueError(text)

    @strawberry.mutation
    def nested(self, info: Info) -> int | None:
        audit_log.info(action="Nested")
        return 1

    @strawberry.mutation
    async def hang(self, info: Info) -> int | None:
        return await hanging(info.context["db"])

    @strawberry.mutation
    def durable(self, info: Info, id: int) -> int | None:
        return confirmed(info.context["db"], id)


@strawberry.type
class Subscription:
    @strawberry.subscription
    async def ticks(self, info: Info, to: int) -> AsyncIterator[int]:
        async for number in ticking(info.context["db"], to):
            yield number

    @strawberry.subscription
    async def fails(self, info: Info) -> AsyncIterator[int]:
        async for number in failing(info.context["db"]):
            yield number


def strawberry_schema(*extensions: Any, **options: Any) -> strawberry.Schema:
    return strawberry.Schema(
        query=Query, mutation=Mutation, subscription=Subscription, extensions=extensions, **options
    )


def ariadne_schema() -> GraphQLSchema:
    query, mutation, subscription = QueryType(), MutationType(), SubscriptionType()
    for name in ("invoices", "secrets"):
        query.set_field(name, lambda _, info: info.context["db"].write(info.field_name))
    mutation.set_field(
        "deleteInvoice", lambda _, info, id: info.context["db"].write("deleteInvoice", id)
    )
    mutation.set_field("login", lambda _, info, name, password: info.context["db"].write("login"))
    mutation.set_field("nested", lambda _, info: audit_log.info(action="Nested") and 1)
    mutation.set_field("hang", lambda _, info: hanging(info.context["db"]))
    mutation.set_field("durable", lambda _, info, id: confirmed(info.context["db"], id))

    @mutation.field("fail")
    def fail(_: Any, info: Any, text: str) -> int:
        raise ValueError(text)

    subscription.set_source("ticks", lambda _, info, to: ticking(info.context["db"], to))
    subscription.set_source("fails", lambda _, info: failing(info.context["db"]))
    for name in ("ticks", "fails"):
        subscription.set_field(name, lambda event, info, **_: event)
    return make_executable_schema(SDL, query, mutation, subscription)


class Service:
    """One of the two frameworks, called in process."""

    def __init__(self, framework: str, db: Database, **options: Any) -> None:
        self.framework = framework
        self.db = db
        self.is_sync = framework.endswith("-sync")
        module: Any = audited_strawberry if "strawberry" in framework else audited_ariadne
        make = module.AuditExtensionSync if self.is_sync else module.AuditExtension
        self.audit = make(**options)
        self.schema: Any = (
            strawberry_schema(self.audit)
            if "strawberry" in framework
            else self.audit.subscriptions(ariadne_schema())
        )

    def run(self, document: str, variables: Any = None, name: str | None = None) -> dict[str, Any]:
        """Execute a document; return data and errors as a client sees them."""
        if self.framework == "strawberry-sync":
            return _plain(
                self.schema.execute_sync(document, variables, self.context, operation_name=name)
            )
        if self.framework == "ariadne-sync":
            data = {"query": document, "variables": variables, "operationName": name}
            return ariadne_graphql_sync(
                self.schema, data, context_value=self.context, extensions=[self.audit]
            )[1]
        return asyncio.run(self.arun(document, variables, name))

    async def arun(
        self, document: str, variables: Any = None, name: str | None = None
    ) -> dict[str, Any]:
        if self.framework == "strawberry":
            return _plain(
                await self.schema.execute(document, variables, self.context, operation_name=name)
            )
        data = {"query": document, "variables": variables, "operationName": name}
        done = await ariadne_graphql(
            self.schema, data, context_value=self.context, extensions=[self.audit]
        )
        return done[1]

    @property
    def context(self) -> dict[str, Any]:
        return {"db": self.db, "user": "ada"}


def _plain(result: Any) -> dict[str, Any]:
    answer = {"data": result.data}
    if result.errors:
        answer["errors"] = [error.formatted for error in result.errors]
    return answer
