"""What an attacker tried with the interceptors: no effect without a Begin, and one outcome each."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from structlog_audit import (
    AuditConfigurationError,
    Exclude,
    audit_context,
    audit_log,
    audited,
)
from structlog_audit.exclusions import is_like
from structlog_audit.testing import capture_audit
from structlog_audit.web.asgi import AuditMiddleware

PRICES = Exclude(kind="public_read", route="prices", reason="public")


def nobody(asked: object) -> bool:
    """Say that nobody is privileged."""
    return False


def ask(app: Any, path: str, method: str = "GET", **scope: Any) -> None:
    """Send a request to an ASGI application."""

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        pass

    asked = {"type": "http", "method": method, "path": path, "headers": [], **scope}
    asyncio.run(app(asked, receive, send))


async def plain(scope: Any, receive: Any, send: Any) -> None:
    """Answer everything."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_a_router_above_tells_nothing_of_a_mounted_application() -> None:
    """Its route of the same path is another one, and exempt for itself alone."""
    applications = pytest.importorskip("starlette.applications")
    routing = pytest.importorskip("starlette.routing")

    async def prices(request: Any) -> Any: ...

    inner = AuditMiddleware(plain, exclude=[PRICES], privileged=nobody)
    app = applications.Starlette(
        routes=[routing.Route("/prices", prices, name="prices"), routing.Mount("/admin", inner)]
    )
    with capture_audit() as entries:
        ask(app, "/admin/prices", query_string=b"")

    assert [entry["event"] for entry in entries] == ["Begin", "Complete"]


def test_a_dispatcher_is_not_looked_through() -> None:
    """Whatever it holds, what it does with a request is its own."""
    applications = pytest.importorskip("starlette.applications")
    routing = pytest.importorskip("starlette.routing")

    async def prices(request: Any) -> Any: ...

    class Dispatcher:
        app = applications.Starlette(routes=[routing.Route("/{x:path}", prices, name="prices")])

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await plain(scope, receive, send)

    with capture_audit() as entries:
        ask(AuditMiddleware(Dispatcher(), exclude=[PRICES], privileged=nobody), "/admin/delete")

    assert len(entries) == 2


@pytest.mark.parametrize("matching", ["host", "subdomain"])
def test_an_application_that_looks_at_the_host_is_not_second_guessed(matching: str) -> None:
    """The same path is another view on another host."""
    quart = pytest.importorskip("quart")
    options: dict[str, Any] = (
        {"host_matching": True, "static_host": "a.test"}
        if matching == "host"
        else {"subdomain_matching": True}
    )
    app = quart.Quart("shop", **options)
    app.add_url_rule(
        "/", "prices", lambda: "x", **({"host": "a.test"} if matching == "host" else {})
    )
    middleware = AuditMiddleware(app.asgi_app, exclude=[PRICES], privileged=nobody)
    with capture_audit() as entries:
        middleware.app = plain
        ask(middleware, "/", headers=[(b"host", b"a.test")], scheme="http", root_path="")

    assert len(entries) == 2


def test_a_method_in_lower_case_is_no_read() -> None:
    """An application that compares it with GET takes it for something else."""
    exclude = [Exclude(kind="public_read", path="/prices", reason="public")]
    with capture_audit() as entries:
        ask(AuditMiddleware(plain, exclude=exclude, privileged=nobody), "/prices", "get")

    assert entries[0]["data"]["method"] == "get"


def test_a_password_in_a_url_is_not_recorded() -> None:
    """Clients may send the whole of it."""
    with capture_audit() as entries:
        ask(AuditMiddleware(plain), "http://user:hunter2@host/x")

    assert "hunter2" not in str(entries)
    assert entries[0]["data"]["path"] == "http://host/x"


def test_an_outcome_in_another_requests_task_tells_of_its_own_request() -> None:
    """A worker that was started by the first request answers the second."""

    async def run() -> None:
        operations = []
        for number in (1, 2):
            with audit_context(client_ip=f"10.0.0.{number}", request_id=f"r{number}"):
                operation = audit_log.operation(action=f"A{number}")
                await operation.__aenter__()
                operations.append(operation)
        with audit_context(client_ip="10.0.0.1", request_id="r1", user_id="ada"):
            await operations[1].__aexit__(None, None, None)
            await operations[0].__aexit__(None, None, None)

    with capture_audit() as entries:
        asyncio.run(run())

    second, first = entries[2:]
    assert (second["requestId"], second["clientIpAddress"]) == ("r2", "10.0.0.2")
    assert second.get("userId") is None
    assert (first["requestId"], first["userId"]) == ("r1", "ada")


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        ("/a", "/a", True), ("/a", "/ab", False), ("/a*", "/a", True), ("*", "", True),
        ("/a*b", "/ab", True), ("/a*b", "/a", False), ("/aba*aba", "/aba", False),
        ("/*/x/*/y", "/1/x/2/y", True), ("/*/x/*/y", "/1/x/y", False), ("/**b", "/b", True),
    ],
)  # fmt: skip
def test_a_star_stands_for_any_text(pattern: str, text: str, fits: bool) -> None:
    """Also for none."""
    assert is_like(pattern, text) is fits


def test_a_client_does_not_choose_how_long_a_pattern_takes() -> None:
    """A megabyte that nearly fits again and again; a backtracking search would take days."""
    assert not is_like("/shops/*/items/*/photos/*/thumb", "/shops/a" + "/items/a/photos/a" * 60_000)


def hidden_coroutine() -> Any:
    """Return a plain function around a coroutine function."""

    async def body() -> None: ...

    @functools.wraps(body)
    def wrapper() -> Any:
        return body()

    return wrapper


@contextmanager
def block() -> Iterator[None]:
    """Be a context manager."""
    yield


@pytest.mark.parametrize("function", [hidden_coroutine(), block])
def test_what_hides_that_it_runs_later_is_refused(function: Any) -> None:
    """Its outcome would come before its body."""
    with pytest.raises(AuditConfigurationError, match="runs later"):
        audited()(function)


def test_a_function_that_returns_what_runs_later_is_abandoned() -> None:
    """Nothing of it runs, and nobody is told that it is complete."""
    ran: list[bool] = []

    async def later() -> None:
        ran.append(True)

    with capture_audit() as entries, pytest.raises(AuditConfigurationError):
        audited(action="A")(lambda: later())()

    assert [entry["event"] for entry in entries] == ["Begin", "Abandon"]
    assert not ran


def test_a_variable_is_redacted_by_the_argument_that_it_is_for() -> None:
    """The client chooses the variable's name, and not the argument's."""
    graphql = pytest.importorskip("graphql")
    from structlog_audit.web._graphql import select

    document = graphql.parse(
        "mutation($p: String!, $q: String, $n: Int) "
        "{ login(password: $p, more: [{token: $q}], number: $n) }"
    )
    asked = select(document, None, {"p": "hunter2", "q": "hunter2", "n": 7}, None)

    assert asked is not None
    assert "hunter2" not in str(asked.variables)
    assert asked.variables["n"] == 7


def test_two_fields_under_one_key_are_both_seen() -> None:
    """Without validation, the first of them runs."""
    graphql = pytest.importorskip("graphql")
    from structlog_audit.web._graphql import select

    asked = select(graphql.parse("mutation { a: deleteAll a: setTheme }"), None, None, None)

    assert asked is not None
    assert asked.fields == ("deleteAll", "setTheme")
