"""Both frameworks behind the HTTP middleware, on a real server and over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from ariadne.asgi import GraphQL
from ariadne.asgi.handlers import GraphQLHTTPHandler, GraphQLTransportWSHandler
from fastapi import FastAPI
from graphql_apps import Database, ariadne_schema, strawberry_schema
from running import HANG
from strawberry.fastapi import GraphQLRouter
from strawberry.schema.config import StrawberryConfig
from test_web_graphql import NOT_CARRIED_OUT, check_effects, events
from websockets.asyncio.client import connect

from structlog_audit.exclusions import Exclude
from structlog_audit.testing import FailingSink, MemorySink, capture_audit
from structlog_audit.web import ariadne as audited_ariadne
from structlog_audit.web import strawberry as audited_strawberry
from structlog_audit.web.asgi import AuditMiddleware

FRAMEWORKS = ("strawberry", "ariadne")
DELETE = "mutation($id: Int!) { deleteInvoice(id: $id) }"


def make_app(framework: str, db: Database) -> FastAPI:
    app = FastAPI()
    if framework == "strawberry":
        schema = strawberry_schema(
            audited_strawberry.AuditExtension(),
            config=StrawberryConfig(batching_config={"max_operations": 10}),
        )
        router = GraphQLRouter(schema, "/", context_getter=lambda: {"db": db})
        app.include_router(router, prefix="/api")
    else:
        audit = audited_ariadne.AuditExtension()
        served = GraphQL(
            audit.subscriptions(ariadne_schema()),
            context_value=lambda request, data: {"db": db, "request": request},
            http_handler=GraphQLHTTPHandler(extensions=[audit]),
            websocket_handler=GraphQLTransportWSHandler(),
        )
        app.mount("/api", served)
    elsewhere = Exclude(kind="elsewhere", path="/api*", reason="AuditExtension")
    app.add_middleware(AuditMiddleware, exclude=[elsewhere])
    return app


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an application on a port of its own; return the address without its scheme."""
    config = uvicorn.Config(app, port=0, log_level="critical", ws="websockets-sansio")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/api/"
    finally:
        server.should_exit = True
        thread.join(HANG)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database(tmp_path / "effects.db")


def post(address: str, document: str, **variables: Any) -> httpx.Response:
    body = {"query": document, "variables": variables}
    return httpx.post(f"http://{address}", json=body, trust_env=False)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_request_has_one_entry_pair_that_says_who_asked(framework: str, db: Database) -> None:
    """The HTTP middleware leaves it to GraphQL, and binds the client's address for it."""
    with capture_audit() as entries, served(make_app(framework, db)) as address:
        assert post(address, DELETE, id=4).json()["data"] == {"deleteInvoice": 4}

    assert events(entries) == [("deleteInvoice", "Begin"), ("deleteInvoice", "Complete")]
    assert {e["clientIpAddress"] for e in entries} == {"127.0.0.1"}
    assert {e["type"] for e in entries} == {"GraphQL"}
    assert entries[0]["requestId"] == entries[1]["requestId"]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_hundreds_of_mutations_at_once_each_have_their_begin(framework: str, db: Database) -> None:
    """Each effect carries the number of its Begin, which is below that of its outcome."""

    async def all_at_once(address: str) -> list[int]:
        limits = httpx.Limits(max_connections=20)
        async with httpx.AsyncClient(limits=limits, timeout=HANG, trust_env=False) as client:
            bodies = [{"query": DELETE, "variables": {"id": n}} for n in range(250)]
            answers = [client.post(f"http://{address}", json=body) for body in bodies]
            return [answer.status_code for answer in await asyncio.gather(*answers)]

    with capture_audit() as entries, served(make_app(framework, db)) as address:
        assert set(asyncio.run(all_at_once(address))) == {200}

    check_effects(db, entries, 250)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_refused_mutation_has_no_effect_and_the_next_one_runs(
    framework: str, db: Database
) -> None:
    """Over HTTP a GraphQL error with a code; nothing of the cause."""
    sink = FailingSink(lambda number: number == 3)
    with capture_audit(sink), served(make_app(framework, db)) as address:
        first, refused, last = (post(address, DELETE, id=n).json() for n in range(3))

    assert "errors" not in first
    assert "errors" not in last
    assert refused["errors"][0]["message"] == NOT_CARRIED_OUT
    assert refused["errors"][0]["extensions"]["code"] == "AUDIT_UNAVAILABLE"
    assert not any((refused["data"] or {}).values())
    assert [row[1] for row in db.rows()] == [0, 2]


def test_a_batch_makes_an_entry_for_each_of_its_operations(db: Database) -> None:
    """One that is refused does not stop the others, nor they it."""
    batch = [{"query": DELETE, "variables": {"id": n}} for n in range(3)]
    with capture_audit() as entries, served(make_app("strawberry", db)) as address:
        answers = httpx.post(f"http://{address}", json=batch, trust_env=False).json()

    assert [answer["data"]["deleteInvoice"] for answer in answers] == [0, 1, 2]
    check_effects(db, entries, 3)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_clients_that_go_away_leave_no_begin_without_outcome(framework: str, db: Database) -> None:
    """They have sent a mutation and do not wait for its answer."""

    async def send_and_go(address: str, number: int) -> None:
        host, port = address.removesuffix("/api/").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"query": DELETE, "variables": {"id": number}})
        writer.write(
            f"POST /api/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        await writer.drain()
        writer.close()

    async def all_at_once(address: str) -> None:
        await asyncio.gather(*(send_and_go(address, number) for number in range(20)))

    with capture_audit() as entries, served(make_app(framework, db)) as address:
        asyncio.run(all_at_once(address))
        post(address, DELETE, id=20)
        until(lambda: len(entries) % 2 == 0)

    begins = [e for e in entries if e["event"] == "Begin"]
    assert len(entries) == 2 * len(begins)
    assert {row[2] for row in db.rows()} <= {e["operationId"] for e in begins}


async def subscription(address: str, document: str, take: int) -> list[dict[str, Any]]:
    """Subscribe by graphql-transport-ws; break the connection after so many messages."""
    found: list[dict[str, Any]] = []
    async with connect(f"ws://{address}", subprotocols=["graphql-transport-ws"], proxy=None) as ws:
        await ws.send(json.dumps({"type": "connection_init"}))
        await ws.recv()
        payload = {"query": document}
        await ws.send(json.dumps({"id": "1", "type": "subscribe", "payload": payload}))
        while len(found) < take and (not found or found[-1]["type"] == "next"):
            found.append(json.loads(await asyncio.wait_for(ws.recv(), HANG)))
    return found


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_subscription_over_a_websocket_is_one_operation(framework: str, db: Database) -> None:
    """From before its first event to its end."""
    with capture_audit() as entries, served(make_app(framework, db)) as address:
        found = asyncio.run(subscription(address, "subscription Clock { ticks(to: 3) }", 9))
        until(lambda: len(entries) == 2)

    assert [one["type"] for one in found] == ["next"] * 3 + ["complete"]
    assert events(entries) == [("Clock", "Begin"), ("Clock", "Complete")]
    assert entries[1]["data"]["messages"] == 3
    assert {row[3] for row in db.rows()} == {entries[0]["sequence"]}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_broken_websocket_abandons_its_subscription(framework: str, db: Database) -> None:
    """The client is gone before the last event."""
    document = "subscription { ticks(to: 1000000) }"
    with capture_audit() as entries, served(make_app(framework, db)) as address:
        asyncio.run(subscription(address, document, 2))
        until(lambda: len(entries) == 2)

    assert events(entries) == [("ticks", "Begin"), ("ticks", "Abandon")]
    assert entries[1]["data"]["messages"] >= 2


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_subscription_over_a_websocket_without_begin_has_no_event(
    framework: str, db: Database
) -> None:
    """The client reads why, and the connection serves on."""
    with capture_audit(FailingSink()), served(make_app(framework, db)) as address:
        found = asyncio.run(subscription(address, "subscription { ticks(to: 3) }", 1))

    assert NOT_CARRIED_OUT in json.dumps(found)
    assert "AUDIT_UNAVAILABLE" in json.dumps(found)
    assert db.rows() == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_mutation_over_a_websocket_is_audited_too(framework: str, db: Database) -> None:
    """The protocol carries every kind of operation."""
    with capture_audit(MemorySink()) as entries, served(make_app(framework, db)) as address:
        asyncio.run(subscription(address, "mutation { deleteInvoice(id: 1) }", 2))
        until(lambda: len(entries) == 2)

    assert events(entries) == [("deleteInvoice", "Begin"), ("deleteInvoice", "Complete")]
    assert db.rows()[0][3] == entries[0]["sequence"]
