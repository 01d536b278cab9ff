"""Plain ASGI applications under uvicorn and hypercorn: what is recorded of a request, and when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from asgi_servers import (
    SERVERS,
    Uvicorn,
    answer,
    begin,
    outcome,
    outcomes,
    serving,
)
from running import HANG, eventually
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from structlog_audit import audit_log, current_operation
from structlog_audit.exclusions import Exclude
from structlog_audit.testing import FailingSink, capture_audit
from structlog_audit.web.asgi import AuditMiddleware

Entry = dict[str, Any]
HEALTH = Exclude(kind="health", path="/healthz", reason="probe")


@pytest.fixture
def entries() -> Iterator[list[Entry]]:
    with capture_audit() as entries:
        yield entries


@pytest.fixture(params=SERVERS, ids=lambda server: server.__name__)
def server(request: pytest.FixtureRequest) -> Any:
    return request.param


def get(running: Any, path: str = "/orders", method: str = "GET", **options: Any) -> httpx.Response:
    url = f"http://127.0.0.1:{running.port}{path}"
    return httpx.request(method, url, timeout=HANG, trust_env=False, **options)


def feed(running: Any, path: str = "/feed") -> Any:
    return connect(f"ws://127.0.0.1:{running.port}{path}", open_timeout=HANG, proxy=None)


def raw(running: Any, request: bytes) -> socket.socket:
    """Send bytes as they are."""
    connection = socket.create_connection(("127.0.0.1", running.port), HANG)
    connection.sendall(request)
    return connection


def audited(app: Any, **options: Any) -> Any:
    """Wrap an application; lifespan is none of its business."""

    async def without_lifespan(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await app(scope, receive, send)

    return AuditMiddleware(without_lifespan, **options)


# --- requests


def test_a_request_has_its_begin_before_the_application_runs(
    server: Any, entries: list[Entry]
) -> None:
    """The application finds the Begin already recorded, and can add to the outcome."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(entry["event"] for entry in entries)
        current_operation().data["rows"] = 3
        await answer(send, 201)

    with serving(audited(app), server) as running:
        response = get(running, "/orders?secret=1", headers={"x-request-id": "r-1"})

    assert (response.status_code, seen) == (201, ["Begin"])
    first, last = begin(entries), outcome(entries)
    assert first["action"] == last["action"] == "GET /orders"
    assert first["data"] == {"method": "GET", "path": "/orders", "userKnown": False}
    assert last["event"] == "Complete"
    assert last["data"].pop("durationMs") > 0
    assert last["data"] == {"rows": 3, "status": 201}
    assert {first["type"], last["type"]} == {"REST"}
    assert {first["clientIpAddress"], last["remoteAddress"]} == {"127.0.0.1"}
    assert first["requestId"] == last["requestId"] == "r-1"


def test_a_server_error_is_a_failure_and_a_refusal_is_not(
    server: Any, entries: list[Entry]
) -> None:
    """Status 503 makes a Fail; 403 is an answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, int(scope["path"][1:]))

    with serving(audited(app), server) as running:
        get(running, "/503")
        get(running, "/403")
        found = outcomes(entries, 2)

    assert [(e["event"], e["data"]["status"]) for e in found] == [("Fail", 503), ("Complete", 403)]
    assert found[0]["data"]["reason"] == "status 503"


def test_an_application_that_raises_has_failed_with_500(server: Any, entries: list[Entry]) -> None:
    """The exception is in the outcome, and so is what the server answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("no such order")

    with serving(audited(app), server) as running:
        assert get(running).status_code == 500

    last = outcome(entries)
    assert (last["event"], last["data"]["status"]) == ("Fail", 500)
    assert last["data"]["exception"]["type"] == "LookupError"


def test_a_request_whose_begin_fails_is_refused_and_has_no_effect(server: Any) -> None:
    """The application is never called, and the next request is served when the sink is back."""
    calls: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope["path"])
        await answer(send)

    sink = FailingSink(lambda number: number == 1)
    with capture_audit(sink), serving(audited(app), server) as running:
        refused = get(running, "/first", "POST", content=b"x" * 100_000)
        assert get(running, "/second").status_code == 200
        outcome(sink.entries)

    assert refused.status_code == 503
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.headers["cache-control"] == "no-store"
    assert refused.json()["status"] == 503
    assert "told to fail" not in refused.text
    assert calls == ["/second"]


def test_excluded_requests_are_served_whatever_becomes_of_the_log(server: Any) -> None:
    """A health probe is neither recorded nor refused, and there is no operation to add to."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current_operation().data["x"] = 1
        await answer(send)

    sink = FailingSink()
    with capture_audit(sink), serving(audited(app, exclude=[HEALTH]), server) as running:
        assert get(running, "/healthz").status_code == 200
        assert get(running, "/healthz/../orders").status_code == 503
        assert get(running, "/orders").status_code == 503

    assert not sink.entries


def test_a_head_request_is_complete_without_a_body(server: Any, entries: list[Entry]) -> None:
    """Its response has no body, and still an end."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, body=b"", content_length="4")

    with serving(audited(app), server) as running:
        assert get(running, method="HEAD").status_code == 200

    assert outcome(entries)["event"] == "Complete"
    assert begin(entries)["data"]["method"] == "HEAD"


def test_a_stream_is_over_with_its_last_part(server: Any, entries: list[Entry]) -> None:
    """Begin first, outcome after the last chunk; not before."""
    go_on = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await asyncio.to_thread(go_on.wait, HANG)
        await send({"type": "http.response.body", "body": b"last"})

    with serving(audited(app), server) as running:
        url = f"http://127.0.0.1:{running.port}/"
        with httpx.stream("GET", url, timeout=HANG, trust_env=False) as response:
            parts = response.iter_bytes()
            assert next(parts) == b"first"
            assert [entry["event"] for entry in entries] == ["Begin"]
            go_on.set()
            assert next(parts) == b"last"

    assert outcome(entries)["event"] == "Complete"


def test_an_application_that_breaks_off_its_response_has_failed(
    server: Any, entries: list[Entry]
) -> None:
    """An exception after the response began: the status was sent, and is on record."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        raise LookupError("the table is gone")

    with serving(audited(app), server) as running, contextlib.suppress(httpx.HTTPError):
        get(running)

    last = outcome(entries)
    assert (last["event"], last["data"]["status"]) == ("Fail", 200)
    assert last["data"]["exception"]["message"] == "the table is gone"


def test_an_application_that_returns_without_a_response_has_failed(
    server: Any, entries: list[Entry]
) -> None:
    """No response is no success."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    with serving(audited(app), server) as running, contextlib.suppress(httpx.HTTPError):
        get(running)

    last = outcome(entries)
    assert last["event"] == "Fail"
    assert last["data"]["reason"] == "the application gave no complete response"


def test_a_client_that_goes_in_mid_upload_leaves_an_abandoned_operation(
    server: Any, entries: list[Entry]
) -> None:
    """Also where the application answers a request of which it got the half."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
        if scope["path"] == "/answers":
            with contextlib.suppress(Exception):
                await answer(send, 400)

    with serving(audited(app), server) as running:
        for number, path in enumerate([b"/returns", b"/answers"], 1):
            upload = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf"
            connection = raw(running, upload)
            eventually(lambda at=number: len([e for e in entries if e["event"] == "Begin"]) == at)
            connection.close()
            outcomes(entries, number)

    assert [entry["event"] for entry in outcomes(entries, 2)] == ["Abandon", "Abandon"]
    assert {e["data"]["reason"] for e in outcomes(entries, 2)} == {"the client has gone"}


def test_a_client_that_goes_in_mid_stream_leaves_an_abandoned_operation(
    server: Any, entries: list[Entry]
) -> None:
    """An application that listens for it stops; what it sent is on record."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    with serving(audited(app), server) as running:
        connection = raw(running, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.recv(1000)
        connection.close()
        last = outcome(entries)

    assert last["event"] == "Abandon"
    assert last["data"]["status"] == 200
    assert last["data"]["clientGone"] is True


def test_a_request_cancelled_at_shutdown_is_abandoned(entries: list[Entry]) -> None:
    """uvicorn cancels what does not end in time."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(HANG)

    with serving(audited(app), Uvicorn, timeout_graceful_shutdown=1) as running:
        connection = raw(running, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(lambda: bool(entries))
    connection.close()

    last = outcome(entries)
    assert last["event"] == "Abandon"
    assert last["data"]["exception"]["type"].endswith("CancelledError")


def test_what_happens_after_the_response_is_not_in_its_outcome(
    server: Any, entries: list[Entry]
) -> None:
    """A background task that fails later does not make the request a failure."""
    after = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send)
        after.set()
        raise LookupError("in the background")

    with serving(audited(app), server) as running:
        assert get(running).status_code == 200
        assert after.wait(HANG)

    last = outcome(entries)
    assert last["event"] == "Complete"
    assert "exception" not in last["data"]


def test_bytes_that_are_no_text_do_no_harm(server: Any, entries: list[Entry]) -> None:
    """Header values and paths of any bytes, and capitals in names."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send)

    request = (
        b"GET /%ff%fe/%00%0a%e2%82%ac HTTP/1.1\r\nHost: x\r\nX-REQUEST-ID: R-7\r\n"
        b"X-Forwarded-For: \xff\xfe\xe2\r\nX-Odd: \x80\x81\r\nConnection: close\r\n\r\n"
    )
    with serving(audited(app), server) as running:
        with raw(running, request) as connection:
            assert b" 200 " in connection.recv(1000)

    assert outcome(entries)["requestId"] == "R-7"
    assert begin(entries)["data"]["path"].endswith("€")


def test_requests_on_one_connection_share_nothing(server: Any, entries: list[Entry]) -> None:
    """Keep-alive: each request has its own operation, and an excluded one has none."""
    seen: list[object] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(current_operation().receipt)
        current_operation().data[scope["path"]] = 1
        await answer(send)

    with serving(audited(app, exclude=[HEALTH]), server) as running:
        with httpx.Client(base_url=f"http://127.0.0.1:{running.port}", trust_env=False) as client:
            for path in ("/a", "/healthz", "/b"):
                assert client.get(path).status_code == 200

    assert seen[0] is not None
    assert seen[1] is None
    assert seen[2] not in (None, seen[0])
    assert [set(e["data"]) - {"status", "durationMs"} for e in outcomes(entries, 2)] == [
        {"/a"}, {"/b"}
    ]  # fmt: skip


# --- durable outcomes


async def settles(scope: Any, receive: Any, send: Any) -> None:
    """Answer with an outcome that has to be durable first."""
    current_operation().durable = True
    await answer(send, body=b"settled")


def test_a_durable_outcome_is_recorded_before_the_response_leaves(server: Any, audit_dir) -> None:
    """A client that has the response can find the outcome in the file."""
    sink = FailingSink(lambda number: False)
    with capture_audit(sink), serving(audited(settles), server) as running:
        assert get(running).text == "settled"
        assert [entry["event"] for entry in sink.entries] == ["Begin", "Complete"]


def test_a_durable_outcome_that_fails_takes_the_place_of_the_response(server: Any) -> None:
    """The client is told 503, and never what the application would have said."""
    sink = FailingSink(lambda number: number == 2)
    with capture_audit(sink), serving(audited(settles), server) as running:
        response = get(running)

    assert response.status_code == 503
    assert response.json()["status"] == 503


def test_a_durable_outcome_precedes_the_last_byte_where_the_length_is_known(server: Any) -> None:
    """A response whose end comes in a message without bytes is not whole before its outcome."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current_operation().durable = True
        headers = [(b"content-length", b"8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"all of i", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    sink = FailingSink(lambda number: number == 2)
    with capture_audit(sink), serving(audited(app), server) as running:
        assert get(running).status_code == 503


def test_a_durable_stream_is_broken_off_when_its_outcome_fails(server: Any) -> None:
    """What has begun cannot be replaced: the client sees that it is incomplete."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current_operation().durable = True
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await send({"type": "http.response.body", "body": b"last"})

    sink = FailingSink(lambda number: number == 2)
    with capture_audit(sink), serving(audited(app), server) as running:
        with pytest.raises(httpx.RemoteProtocolError):
            get(running)


# --- WebSockets


async def echoes(scope: Any, receive: Any, send: Any) -> None:
    """Say everything twice, and do what the text says."""
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        text = message.get("text")
        if text == "raise":
            raise LookupError("no such feed")
        if text == "close":
            await send({"type": "websocket.close", "code": 4001})
            return
        for _ in range(2):
            await send({"type": "websocket.send", "text": text})


def test_a_websocket_is_recorded_from_accept_to_close(server: Any, entries: list[Entry]) -> None:
    """Messages are counted, and the client's code is on record."""
    with serving(audited(echoes), server) as running:
        with feed(running) as socket:
            socket.send("one")
            assert [socket.recv(HANG), socket.recv(HANG)] == ["one", "one"]
            assert [entry["event"] for entry in entries] == ["Begin"]
        last = outcome(entries)

    assert begin(entries)["type"] == "WebSocket"
    assert begin(entries)["action"] == "WEBSOCKET /feed"
    assert (last["data"]["received"], last["data"]["sent"]) == (1, 2)
    # hypercorn 0.18 gives 1006 to its application whatever the client closed with
    given = ("Complete", 1000) if server is Uvicorn else ("Abandon", 1006)
    assert (last["event"], last["data"]["closeCode"]) == given


def test_a_websocket_closed_by_the_application_carries_its_code(
    server: Any, entries: list[Entry]
) -> None:
    """A code of the application's own is its business, and no failure."""
    with serving(audited(echoes), server) as running, feed(running) as socket:
        socket.send("close")
        with pytest.raises(ConnectionClosed):
            socket.recv(HANG)

    last = outcome(entries)
    assert (last["event"], last["data"]["closeCode"]) == ("Complete", 4001)


def test_a_websocket_whose_application_raises_has_failed(server: Any, entries: list[Entry]) -> None:
    """Servers close it with 1011."""
    with serving(audited(echoes), server) as running, feed(running) as socket:
        socket.send("raise")
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(HANG)

    last = outcome(entries)
    assert closed.value.rcvd is None or closed.value.rcvd.code == 1011
    assert (last["event"], last["data"]["closeCode"]) == ("Fail", 1011)
    assert last["data"]["exception"]["type"] == "LookupError"


def test_a_websocket_that_breaks_has_the_code_that_the_server_gives(
    server: Any, entries: list[Entry]
) -> None:
    """The other end is gone without a word."""
    with serving(audited(echoes), server) as running, feed(running) as socket:
        socket.send("one")
        assert socket.recv(HANG) == "one"
        socket.socket.shutdown(2)
        last = outcome(entries)

    # uvicorn 0.54 gives 1005, as where a client closes without a code; the two cannot be told apart
    given = ("Complete", 1005) if server is Uvicorn else ("Abandon", 1006)
    assert (last["event"], last["data"]["closeCode"]) == given


async def _closes(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1008})


async def _denies(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.http.response.start", "status": 401, "headers": []})
    await send({"type": "websocket.http.response.body", "body": b"who are you"})


async def _raises(scope: Any, receive: Any, send: Any) -> None:
    raise LookupError("no such feed")


async def _says_nothing(scope: Any, receive: Any, send: Any) -> None:
    await receive()


@pytest.mark.parametrize(
    ("app", "event", "status"),
    [(_closes, "Complete", 403), (_denies, "Complete", 401), (_raises, "Fail", 500),
     (_says_nothing, "Fail", 500)],
)  # fmt: skip
def test_a_websocket_that_is_not_accepted_has_a_status(
    server: Any, entries: list[Entry], app: Any, event: str, status: int
) -> None:
    """What the client was told is what is on record."""
    if app is _says_nothing and server is not Uvicorn:
        pytest.skip("hypercorn leaves the client waiting")
    with serving(audited(app), server) as running:
        with pytest.raises(InvalidStatus) as refused:
            feed(running)

    last = outcome(entries)
    assert refused.value.response.status_code == status
    assert (last["event"], last["data"]["status"]) == (event, status)


def test_a_websocket_whose_begin_fails_is_refused_before_it_is_accepted(server: Any) -> None:
    """The application is never called."""
    calls: list[object] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope)

    with capture_audit(FailingSink()), serving(audited(app), server) as running:
        with pytest.raises(InvalidStatus) as refused:
            feed(running)

    assert refused.value.response.status_code == 503
    assert json.loads(refused.value.response.body)["status"] == 503
    assert not calls


def test_a_read_exclusion_leaves_out_a_websocket_only_by_name(
    server: Any, entries: list[Entry]
) -> None:
    """What goes both ways is no read, unless somebody says that it is."""
    options = [
        Exclude(kind="public_read", path="/*feed", reason="prices"),
        Exclude(kind="public_read", path="/ticker", method="WEBSOCKET", reason="prices"),
    ]
    with serving(
        audited(echoes, exclude=options, privileged=lambda scope: False), server
    ) as running:
        with feed(running, "/feed"):
            pass
        with feed(running, "/ticker"):
            pass

    assert outcome(entries)["action"] == "WEBSOCKET /feed"


# --- lifespan


def test_lifespan_passes_through_and_records_nothing(server: Any, entries: list[Entry]) -> None:
    """An application that writes entries at its start does so by itself."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        seen.append((scope, receive, send))
        seen.append((await receive())["type"])
        await audit_log.ainfo(action="Started")
        await send({"type": "lifespan.startup.complete"})
        seen.append((await receive())["type"])
        await send({"type": "lifespan.shutdown.complete"})

    with serving(AuditMiddleware(app), server):
        pass

    assert seen[1:] == ["lifespan.startup", "lifespan.shutdown"]
    assert [entry["action"] for entry in entries] == ["Started"]
