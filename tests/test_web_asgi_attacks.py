"""What no server and no sensible application does to the ASGI middleware, and some do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from asgi_servers import Wire, answer, begin, http_scope, outcome, outcomes, websocket_scope
from running import run_loop

from structlog_audit import (
    AuditConfigurationError,
    audit_log,
    bind_audit_context,
    context,
    current_operation,
)
from structlog_audit.exclusions import Exclude
from structlog_audit.testing import FailingSink, capture_audit
from structlog_audit.web._client import ClientAddress
from structlog_audit.web.asgi import AuditMiddleware

Entry = dict[str, Any]
HEALTH = Exclude(kind="health", path="/healthz", reason="probe")
DISCONNECT = {"type": "http.disconnect"}


@pytest.fixture
def entries() -> Iterator[list[Entry]]:
    with capture_audit() as entries:
        yield entries


def call(app: Any, scope: Any = None, wire: Wire | None = None, **options: Any) -> Wire:
    """Call an application once, as a server would."""
    wire = wire or Wire()
    scope = http_scope() if scope is None else scope
    run_loop(AuditMiddleware(app, **options)(scope, wire.receive, wire.send))
    return wire


async def done(scope: Any, receive: Any, send: Any) -> None:
    await answer(send)


# --- scopes


def test_a_scope_without_client_headers_and_extensions_is_served(entries: list[Entry]) -> None:
    """Unix sockets have no client; keys with a default may be missing."""
    scope = {"type": "http", "method": "GET", "path": "/"}

    assert call(done, scope).status == 200
    assert call(done, http_scope(client=None, headers=None, extensions=None)).status == 200
    assert call(done, http_scope(client=("/run/app.sock", None))).status == 200
    assert call(done, http_scope(client=(None, None))).status == 200
    assert call(done, http_scope(client=(7, 7))).status == 200
    assert {entry.get("remoteAddress") for entry in outcomes(entries, 5)} == {None}


@pytest.mark.parametrize("path", ["/" + "a" * 10_000, "/\ud800\udfff", "", "/\x00\n", "//", "*"])
def test_a_path_of_any_length_and_kind_is_served_and_recorded(
    entries: list[Entry], path: str
) -> None:
    """Long ones are cut; what is no text is marked as such."""
    scope = http_scope(path, raw_path=b"")

    assert call(done, scope).status == 200
    assert outcome(entries)["event"] == "Complete"
    assert len(str(begin(entries)["data"]["path"])) < 1_100


def test_headers_of_any_bytes_and_capitals_are_read(entries: list[Entry]) -> None:
    """No header raises, and names count whatever their case."""
    headers = [(b"X-Request-ID", b"r-9"), (b"\xff\xfe", b"\x00"), (b"traceparent", b"\xe2\x82")]

    assert call(done, http_scope(headers=headers)).status == 200
    assert outcome(entries)["requestId"] == "r-9"


def test_a_scope_that_the_application_changes_changes_no_entry(entries: list[Entry]) -> None:
    """Mounts change path and root_path; what was asked for stays."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope.update(path="/other", method="DELETE", headers=[], client=None, root_path="/x")
        await answer(send)

    call(app)

    assert outcome(entries)["action"] == "GET /orders"
    assert outcome(entries)["remoteAddress"] == "192.0.2.7"


def test_an_unknown_type_of_scope_passes_through(entries: list[Entry]) -> None:
    """Extensions of the future are handed on as they are."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend((scope, receive, send))

    scope, wire = {"type": "webtransport"}, Wire()
    run_loop(AuditMiddleware(app)(scope, wire.receive, wire.send))

    assert seen[0] is scope
    assert seen[1:] == [wire.receive, wire.send]
    assert not entries


# --- contexts


def test_nothing_is_bound_after_a_request_in_the_same_task(entries: list[Entry]) -> None:
    """Servers may run one request after the other in a task; also when another task sent."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        bind_audit_context(user_id="mallory")
        await asyncio.create_task(answer(send))
        assert current_operation().receipt is not None

    async def two() -> None:
        middleware = AuditMiddleware(app)
        for _ in range(2):
            await middleware(http_scope(), Wire().receive, Wire().send)
            assert current_operation().receipt is None
            assert not context.audit_fields()

    run_loop(two())

    assert "userId" not in [e for e in entries if e["event"] == "Begin"][1]


def test_nothing_is_bound_after_a_request_that_was_refused() -> None:
    """Neither who asked nor the operation."""

    async def refused() -> None:
        await AuditMiddleware(done)(http_scope(), Wire().receive, Wire().send)
        assert current_operation().receipt is None
        assert not context.audit_fields()

    with capture_audit(FailingSink()):
        run_loop(refused())


def test_requests_at_the_same_time_share_nothing(entries: list[Entry]) -> None:
    """A hundred tasks in one loop, each with what is its own."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        bind_audit_context(user_id=scope["path"])
        await asyncio.sleep(0)
        current_operation().data["mine"] = scope["path"]
        await audit_log.ainfo(action="Inside")
        await answer(send)

    async def many() -> None:
        middleware = AuditMiddleware(app)
        scopes = [http_scope(f"/{n}", client=(f"192.0.2.{n}", 1)) for n in range(100)]
        await asyncio.gather(*(middleware(s, Wire().receive, Wire().send) for s in scopes))

    run_loop(many())

    for entry in outcomes(entries, 100):
        assert entry["action"] == "GET " + entry["data"]["mine"]
    for entry in (e for e in entries if e["action"] == "Inside"):
        assert entry["remoteAddress"] == "192.0.2." + entry["userId"][1:]


# --- who and what


def test_what_the_application_says_of_its_operation_stands(entries: list[Entry]) -> None:
    """Its action and its user are not overwritten by what the middleware knows."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        operation = current_operation()
        operation.action = "OrderDelete"
        operation.bind(user_id="alice")
        await answer(send)

    call(app, action=lambda scope: "Named", user=lambda scope: "from-the-session")

    assert begin(entries)["action"] == "Named"
    assert begin(entries)["userId"] == "from-the-session"
    assert outcome(entries)["action"] == "OrderDelete"
    assert outcome(entries)["userId"] == "alice"


def test_a_user_who_is_known_only_afterwards_is_in_the_outcome(entries: list[Entry]) -> None:
    """The Begin says that the user is not known yet."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["user"] = "alice"
        await answer(send)

    call(app, user=lambda scope: scope.get("user"), company=lambda scope: 7)

    assert "userId" not in begin(entries)
    assert begin(entries)["data"]["userKnown"] is False
    assert begin(entries)["companyId"] == "7"
    assert outcome(entries)["userId"] == "alice"


def test_functions_that_raise_cost_no_entry(
    entries: list[Entry], caplog: pytest.LogCaptureFixture
) -> None:
    """What they would have said is missing, and the log tells why, without values."""

    def broken(scope: Any) -> Any:
        raise LookupError("secret")

    assert call(done, user=broken, action=broken, service=broken).status == 200

    assert outcome(entries)["event"] == "Complete"
    assert "LookupError" in caplog.text
    assert "secret" not in caplog.text


def test_a_user_that_is_no_identity_refuses_the_request(entries: list[Entry]) -> None:
    """A wrong function is found with the first request, not by the auditor."""
    assert call(done, user=lambda scope: object()).status == 503
    assert not entries


def test_data_that_the_application_ruins_costs_no_outcome(entries: list[Entry]) -> None:
    """The outcome matters more than its data."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current_operation().data = None
        await answer(send)

    assert call(app).status == 200
    assert outcome(entries)["event"] == "Complete"


# --- applications


def test_a_second_response_does_not_change_what_is_recorded(entries: list[Entry]) -> None:
    """The server refuses it; the first one is the outcome."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await answer(send)
        await answer(send, 500)

    with contextlib.suppress(AssertionError):
        call(app)

    assert (outcome(entries)["event"], outcome(entries)["data"]["status"]) == ("Complete", 200)


def test_an_application_that_swallows_its_cancellation_has_an_outcome(
    entries: list[Entry],
) -> None:
    """It returns as if nothing was; it gave no response."""
    cancelled = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()

    async def cancel() -> None:
        wire = Wire()
        task = asyncio.create_task(AuditMiddleware(app)(http_scope(), wire.receive, wire.send))
        while not entries:
            await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        task.cancel()
        await task

    run_loop(cancel())

    assert outcome(entries)["event"] == "Fail"


def test_a_request_that_times_out_is_abandoned(entries: list[Entry]) -> None:
    """`asyncio.wait_for` around the application cancels it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async def bounded(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.wait_for(AuditMiddleware(app)(scope, receive, send), 0.2)

    with pytest.raises(asyncio.TimeoutError):
        run_loop(bounded(http_scope(), Wire().receive, Wire().send))

    assert outcome(entries)["event"] == "Abandon"


def test_a_server_that_raises_in_receive_is_passed_on(entries: list[Entry]) -> None:
    """The application sees the error as it would without us."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    with pytest.raises(ConnectionError):
        call(app, wire=Wire(ConnectionError("reset")))

    assert outcome(entries)["event"] == "Fail"


def test_a_server_that_raises_on_send_means_that_the_client_has_gone(
    entries: list[Entry],
) -> None:
    """Since ASGI 2.4 servers say so with an OSError."""

    class Gone(Wire):
        async def send(self, message: Any) -> None:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        call(done, wire=Gone())

    assert outcome(entries)["event"] == "Abandon"
    assert outcome(entries)["data"]["reason"] == "the client has gone"


def test_a_response_given_in_full_to_nobody_is_complete_and_says_so(entries: list[Entry]) -> None:
    """The application did its work; that the client had gone stands beside."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()
        await answer(send)

    call(app, wire=Wire({"type": "http.request", "body": b""}, DISCONNECT))

    assert outcome(entries)["event"] == "Complete"
    assert outcome(entries)["data"]["clientGone"] is True


@pytest.mark.parametrize("kind", ["http.response.pathsend", "http.response.zerocopysend"])
def test_files_that_the_server_sends_are_the_end_of_a_response(
    entries: list[Entry], kind: str
) -> None:
    """The extensions for sending files have an outcome like any body."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": kind, "path": "/etc/hosts", "file": 1})

    call(app)

    assert outcome(entries)["event"] == "Complete"


def test_trailers_and_hints_pass_through(entries: list[Entry]) -> None:
    """Messages of extensions arrive at the server, in order."""
    messages = [
        {"type": "http.response.early_hint", "links": []},
        {"type": "http.response.start", "status": 200, "headers": [], "trailers": True},
        {"type": "http.response.body", "body": b"x"},
        {"type": "http.response.trailers", "headers": [], "more_trailers": False},
    ]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current_operation().durable = True
        for message in messages:
            await send(message)

    assert call(app).sent == messages
    assert outcome(entries)["event"] == "Complete"


# --- durable outcomes


def second_fails() -> FailingSink:
    return FailingSink(lambda number: number == 2)


async def durable(scope: Any, receive: Any, send: Any) -> None:
    current_operation().durable = True
    await answer(send, body=b"settled")


def test_an_application_that_answers_the_lost_outcome_cannot_answer_twice() -> None:
    """Its error handler sends a page; the 503 has left already."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await durable(scope, receive, send)
        except Exception:
            await answer(send, 500, b"page")

    with capture_audit(second_fails()):
        wire = call(app)

    assert wire.status == 503
    assert b"page" not in wire.body


def test_a_group_of_exceptions_around_the_lost_outcome_does_not_get_out() -> None:
    """Task groups wrap what ends the application's part."""
    anyio = pytest.importorskip("anyio")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            tasks.start_soon(durable, scope, receive, send)
            current_operation().durable = True

    with capture_audit(second_fails()):
        assert call(app).status == 503


def test_a_cancellation_with_the_lost_outcome_is_passed_on() -> None:
    """What cancels a task must end it, whatever became of the response."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await durable(scope, receive, send)
        except Exception:
            raise asyncio.CancelledError from None

    with capture_audit(second_fails()), pytest.raises(asyncio.CancelledError):
        call(app)


def test_an_error_of_the_application_outlives_its_lost_durable_outcome(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The application's exception is what error trackers want to see; the log tells of the loss."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current_operation().durable = True
        raise LookupError("no such order")

    with capture_audit(second_fails()), pytest.raises(LookupError):
        call(app)

    assert "outcome could not be recorded" in caplog.text


def test_an_outcome_that_the_application_made_unusable_comes_without_what_it_said(
    entries: list[Entry],
) -> None:
    """Every Begin has an outcome; the response stays."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current_operation().bind(user_id=object())
        await answer(send)

    assert call(app).status == 200

    assert outcome(entries)["event"] == "Complete"
    assert "user_id" in outcome(entries)["data"]["unusable"]


# --- WebSockets


def test_a_server_without_the_extension_is_told_to_close() -> None:
    """1013: try again later; the connect message is taken first, as the protocol has it."""
    wire = Wire({"type": "websocket.connect"})
    with capture_audit(FailingSink()):
        call(done, websocket_scope(), wire)

    assert wire.sent == [{"type": "websocket.close", "code": 1013}]
    assert not wire.messages


def test_a_websocket_whose_client_goes_before_it_is_accepted_is_abandoned(
    entries: list[Entry],
) -> None:
    """There was no answer, so there is no status."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()

    messages = {"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1006}
    call(app, websocket_scope(), Wire(*messages))

    assert outcome(entries)["event"] == "Abandon"
    assert "status" not in outcome(entries)["data"]


def test_a_disconnect_that_a_framework_raises_is_no_failure(entries: list[Entry]) -> None:
    """Starlette and Litestar raise an exception with the client's code in `receive_text`."""

    class WebSocketDisconnect(Exception):
        code = 1001

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        raise WebSocketDisconnect

    messages = {"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1001}
    with contextlib.suppress(WebSocketDisconnect):
        call(app, websocket_scope(), Wire(*messages))

    assert outcome(entries)["event"] == "Complete"
    assert outcome(entries)["data"]["closeCode"] == 1001
    assert "exception" not in outcome(entries)["data"]


def test_an_error_after_the_client_left_a_websocket_is_a_failure(entries: list[Entry]) -> None:
    """Cleaning up may fail like anything else."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        raise LookupError("while cleaning up")

    messages = {"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": None}
    with contextlib.suppress(LookupError):
        call(app, websocket_scope(), Wire(*messages))

    assert (outcome(entries)["event"], outcome(entries)["data"]["closeCode"]) == ("Fail", 1005)


# --- options


@pytest.mark.parametrize(
    "options",
    [{"user": "alice"}, {"exclude": ["/healthz"]}, {"privileged": True},
     {"client": ClientAddress(), "trusted_proxies": 1}, {"trusted_proxies": ["nonsense"]}],
)  # fmt: skip
def test_unusable_options_are_refused_at_once(options: dict[str, Any]) -> None:
    """Not with the first request."""
    with pytest.raises(AuditConfigurationError):
        AuditMiddleware(done, **options)


def test_an_exclusion_that_raises_does_not_count(
    entries: list[Entry], caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be told is audited."""

    def broken(scope: Any) -> bool:
        raise LookupError("secret")

    exclude = [Exclude(kind="own_read", reason="own", when=broken)]
    call(done, exclude=exclude, privileged=lambda scope: False)

    assert outcome(entries)["event"] == "Complete"
    assert "LookupError" in caplog.text


def test_privileged_callers_are_left_out_only_with_health_probes(entries: list[Entry]) -> None:
    """And who cannot be told is taken for one."""
    own = Exclude(kind="own_read", path="/me", reason="own")

    def ask(scope: Any) -> bool:
        return scope["admin"]

    for more in ({"admin": True}, {"admin": False}, {}):
        call(done, http_scope("/me", **more), exclude=[own, HEALTH], privileged=ask)
        call(done, http_scope("/healthz", **more), exclude=[own, HEALTH], privileged=ask)

    assert [entry["action"] for entry in outcomes(entries, 2)] == ["GET /me", "GET /me"]


def test_a_refusal_is_logged_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    """Operators see why; clients do not."""
    with capture_audit(FailingSink()), caplog.at_level(logging.ERROR, "structlog_audit"):
        call(done)

    assert "its Begin could not be recorded" in caplog.text
