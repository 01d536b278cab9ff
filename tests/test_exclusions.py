"""What is left out of auditing: only what somebody named, and for all to see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from asgi_servers import Wire, answer, http_scope
from reading import is_own, read_sessions
from running import run_loop

import structlog_audit
from structlog_audit import AuditConfigurationError, AuditHandler, audit_log, exclusions
from structlog_audit.exclusions import Exclude, audit_exempt, digest, listed, register
from structlog_audit.testing import capture_audit
from structlog_audit.web.asgi import AuditMiddleware

Entry = dict[str, Any]


@dataclass
class Asked:
    """A request, as exclusions see it."""

    method: str = "GET"
    path: str = "/"
    route: str | None = None
    operation: str | None = None
    raw: Any = None


def health(**more: Any) -> Exclude:
    return Exclude(kind="health", reason="probe", **more)


# --- what makes sense


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "boring", "path": "/x"},
        {"kind": ["health"], "path": "/x"},
        {"reason": " ", "path": "/x"},
        {"reason": None, "path": "/x"},
        {},
        {"method": "GET"},
        {"path": "x"},
        {"path": ""},
        {"path": 7},
        {"route": b"x"},
        {"when": "always"},
        {"path": "/x", "method": ()},
        {"path": "/x", "method": ""},
        {"path": "/x", "method": "GET,POST"},
        {"path": "/x", "method": ("GET", 1)},
        {"path": "/x", "method": {"GET": 1}},
        {"kind": "public_read", "path": "/x", "method": "POST"},
        {"kind": "own_read", "path": "/x", "method": ("GET", "delete")},
    ],
    ids=str,
)
def test_an_exclusion_that_makes_no_sense_is_refused(given: dict[str, Any]) -> None:
    """When it is made, not when a request comes."""
    with pytest.raises(AuditConfigurationError):
        Exclude(**{"kind": "health", "reason": "probe", **given})


@pytest.mark.parametrize(
    "given",
    [{"path": "*"}, {"path": "/*"}, {"path": "/**/*"}, {"route": "*"}, {"operation": "*"},
     {"path": "/*", "route": "*"}],
    ids=str,
)  # fmt: skip
def test_an_exclusion_of_everything_is_refused(given: dict[str, Any]) -> None:
    """A star that was meant for less leaves everything out, and nobody notices."""
    with pytest.raises(AuditConfigurationError, match="names a path"):
        health(**given)


def test_everything_under_a_condition_is_an_exclusion() -> None:
    """The condition says what is left out."""
    assert health(path="/*", when=lambda raw: True).fits(Asked())
    assert health(path="/").fits(Asked())


# --- what fits


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("/healthz", "/healthz", True),
        ("/healthz", "/healthz/", False),
        ("/healthz", "/healthz2", False),
        ("/healthz", "/HEALTHZ", False),
        ("/healthz", "/api/healthz", False),
        ("/static/*", "/static/a/b.css", True),
        ("/static/*", "/static/", True),
        ("/static/*", "/static", False),
        ("*/ping", "/a/ping", True),
        ("/a.c", "/abc", False),
        ("/[ab]", "/a", False),
        ("/a?", "/ab", False),
        ("/static/*", "/static/€/ä.css", True),
    ],
)
def test_a_path_fits_its_pattern_and_nothing_else(pattern: str, path: str, fits: bool) -> None:
    """Only the star is special."""
    assert health(path=pattern).fits(Asked(path=path)) is fits


@pytest.mark.parametrize(
    "path",
    ["/static/../admin", "/static/./x", "/static/..", "/static//admin", "//static/x",
     "/static/%2e%2e/x", "/static/a%2fb", "/static/..\\admin", "/static/a\x00b", "/static/a\nb",
     "/static/../", "/static/."],
)  # fmt: skip
def test_a_path_that_may_mean_another_is_never_left_out(path: str) -> None:
    """What the file system, a proxy or a router makes of it is not ours to guess."""
    assert not health(path="/static/*").fits(Asked(path=path))
    assert not health(path="/*/x*", when=lambda raw: True).fits(Asked(path=path))


def test_dots_within_names_are_no_odd_path() -> None:
    """Files have endings, and some begin with a dot."""
    for path in ("/static/.well-known/x", "/static/a..b", "/static/...", "/static/x.tar.gz"):
        assert health(path="/static/*").fits(Asked(path=path))


def test_all_that_is_given_must_fit() -> None:
    """A path, a method, a route, an operation and a condition."""
    one = health(path="/a", method=("get", "PUT"), route="r*", when=lambda raw: raw == 1)

    assert one.fits(Asked("PUT", "/a", "read", raw=1))
    assert not one.fits(Asked("POST", "/a", "read", raw=1))
    assert not one.fits(Asked("PUT", "/b", "read", raw=1))
    assert not one.fits(Asked("PUT", "/a", "write", raw=1))
    assert not one.fits(Asked("PUT", "/a", None, raw=1))
    assert not one.fits(Asked("PUT", "/a", "read", raw=2))


def test_a_condition_must_be_true_and_not_merely_something() -> None:
    """A function that forgets to call, or returns a list, leaves nothing out."""
    assert not health(when=lambda raw: 1).fits(Asked())  # type: ignore[arg-type, return-value]
    assert not health(when=lambda raw: [raw]).fits(Asked())  # type: ignore[arg-type, return-value]


def test_reads_fit_only_methods_that_read() -> None:
    """Without a method given, too; a write under the same path is audited."""
    one = Exclude(kind="public_read", path="/prices", reason="public")

    assert {m for m in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "WEBSOCKET")
            if one.fits(Asked(m, "/prices"))} == {"GET", "HEAD", "OPTIONS"}  # fmt: skip


def test_operations_of_graphql_come_by_post() -> None:
    """What stands for their method is the kind of the operation."""
    one = Exclude(kind="public_read", operation="prices", reason="public")
    by_get = Exclude(kind="public_read", operation="prices", method="GET", reason="public")

    assert one.fits(Asked("QUERY", "/graphql", operation="prices"))
    assert not one.fits(Asked("QUERY", "/graphql", operation="pricesSet"))
    assert not one.fits(Asked("MUTATION", "/graphql", operation="prices"))
    assert not one.fits(Asked("QUERY", "/graphql"))
    assert not by_get.fits(Asked("QUERY", "/graphql", operation="prices"))


# --- what is seen of them


def test_every_exclusion_in_force_is_listed() -> None:
    """Also those of a second interceptor of a kind, and of views."""
    AuditMiddleware(None, exclude=[health(path="/a")])  # type: ignore[arg-type]
    AuditMiddleware(None, exclude=[health(path="/b")])  # type: ignore[arg-type]

    @audit_exempt(kind="own_read", reason="own profile")
    def profile() -> None: ...

    lines = [f"{place}: {line}" for place, line in listed()]
    assert "ASGI: path /a: a health probe (probe)" in lines
    assert "ASGI: path /b: a health probe (probe)" in lines
    assert any("profile" in line and "(own profile)" in line for line in lines)


def test_the_digest_changes_with_each_exclusion_and_not_with_their_order() -> None:
    """Without any there is none."""
    assert digest() is None
    register("ASGI", [health(path="/a")])
    alone = digest()
    register("ASGI", [health(path="/a")])
    assert digest() == alone
    register("ASGI", [health(path="/b")])
    both = digest()
    assert both != alone

    exclusions._in_force = exclusions._InForce()
    register("ASGI", [health(path="/b"), health(path="/a")])
    assert digest() == both


def test_a_session_begins_with_the_digest_and_ends_when_it_changes(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """Leaving something more out cannot go unnoticed in the log."""
    handler.record({"action": "A"})
    register("ASGI", [health(path="/a")])
    first = digest()
    handler.record({"action": "B"})
    handler.record({"action": "C"})
    register("ASGI", [health(path="/b")])
    handler.record({"action": "D"})
    handler.close()

    sessions = read_sessions(audit_dir)
    assert [s[0]["data"].get("exclusions") for s in sessions] == [None, first, digest()]
    assert [[e["action"] for e in s if not is_own(e)] for s in sessions] == [
        ["A"],
        ["B", "C"],
        ["D"],
    ]
    assert [s[-1]["data"]["reason"] for s in sessions][:2] == ["exclusions changed"] * 2


# --- views


@pytest.fixture
def entries() -> Iterator[list[Entry]]:
    with capture_audit() as entries:
        yield entries


def call(app: Any, path: str, method: str = "GET", **options: Any) -> int | None:
    wire = Wire()
    run_loop(
        AuditMiddleware(app, **options)(http_scope(path, method=method), wire.receive, wire.send)
    )
    return wire.status


def starlette_app(endpoint: Any, **options: Any) -> Any:
    applications = pytest.importorskip("starlette.applications")
    routing = pytest.importorskip("starlette.routing")
    return applications.Starlette(routes=[routing.Route("/me", endpoint, **options)])


def nobody(scope: Any) -> bool:
    """Say that the caller has no privileged roles."""
    return False


def test_an_exempt_view_is_left_out_by_its_methods(entries: list[Entry]) -> None:
    """A view that reads and writes is exempt only where it reads."""
    responses = pytest.importorskip("starlette.responses")

    @audit_exempt(kind="own_read", reason="own profile")
    async def profile(request: Any) -> Any:
        return responses.Response("")

    app = starlette_app(profile, methods=["GET", "POST"])
    assert call(app, "/me", privileged=nobody) == 200
    assert not entries
    assert call(app, "/me", "POST", privileged=nobody) == 200
    assert [entry["event"] for entry in entries] == ["Begin", "Complete"]


def test_an_exempt_view_audits_privileged_callers(entries: list[Entry]) -> None:
    """The same rule as for exclusions."""
    responses = pytest.importorskip("starlette.responses")

    @audit_exempt(kind="own_read", reason="own profile")
    async def profile(request: Any) -> Any:
        return responses.Response("")

    assert call(starlette_app(profile), "/me", privileged=lambda scope: True) == 200
    assert entries[0]["action"] == "profile"


def test_a_subclass_of_an_exempt_view_is_not_exempt(entries: list[Entry]) -> None:
    """It may do anything; the exemption was given for what stands there."""
    endpoints = pytest.importorskip("starlette.endpoints")
    responses = pytest.importorskip("starlette.responses")

    @audit_exempt(kind="own_read", reason="own profile")
    class Profile(endpoints.HTTPEndpoint):  # type: ignore[misc, name-defined]
        async def get(self, request: Any) -> Any:
            return responses.Response("")

    class Everybody(Profile): ...

    assert call(starlette_app(Profile), "/me", privileged=nobody) == 200
    assert not entries
    assert call(starlette_app(Everybody), "/me") == 200
    assert entries


# --- exclusions that fit no route


async def _view(request: Any) -> None: ...


@pytest.mark.parametrize(
    ("exclusion", "fits"),
    [
        ({"path": "/healthz"}, True),
        ({"path": "/helthz"}, False),
        ({"path": "/orders/7"}, True),
        ({"path": "/orders/*"}, True),
        ({"path": "/orders/*/items"}, True),  # an order's number may hold anything, to us
        ({"path": "/static/*.css"}, True),
        ({"path": "/statics/*"}, False),
        ({"path": "/api/users/*"}, True),
        ({"path": "/users/*"}, False),
        ({"path": "/api/v2/*"}, False),
        ({"path": "/behind/orders/7"}, False),
        ({"route": "read_order"}, True),
        ({"route": "read_*"}, True),
        ({"route": "write_order"}, False),
        ({"route": "read_user"}, True),
        ({"path": "/healthz", "method": "POST"}, False),
        ({"path": "/feed", "method": "WEBSOCKET"}, True),
        ({"path": "/healthz", "route": "read_order"}, False),
        ({"when": lambda scope: False}, True),
        ({"path": "/" + "a*" * 300}, True),  # too long to compare
    ],
    ids=str,
)
@pytest.mark.parametrize("framework", ["starlette", "fastapi"])
def test_an_exclusion_that_fits_no_route_is_warned_of(
    caplog: pytest.LogCaptureFixture, framework: str, exclusion: dict[str, Any], fits: bool
) -> None:
    """A typing error leaves nothing out, and a route that was renamed is audited again."""
    module = pytest.importorskip(framework)
    routing = pytest.importorskip("starlette.routing")
    mount = routing.Mount("/static", app=answer, name="static")
    if framework == "fastapi":
        app, api = module.FastAPI(), module.APIRouter(prefix="/api")
        app.get("/healthz")(lambda: 1)
        app.get("/orders/{number}", name="read_order")(lambda number: 1)
        app.websocket("/feed")(_view)
        api.get("/users/{name}", name="read_user")(lambda name: 1)
        app.include_router(api)
        app.router.routes.append(mount)
    else:
        app = pytest.importorskip("starlette.applications").Starlette(routes=[
            routing.Route("/healthz", _view),
            routing.Route("/orders/{number:int}", _view, name="read_order"),
            routing.WebSocketRoute("/feed", _view),
            routing.Mount("/api", routes=[routing.Route("/users/{name}", _view, name="read_user")]),
            mount,
        ])  # fmt: skip

    with capture_audit():
        call(app, "/nothing", exclude=[health(**exclusion)])

    assert ("fits no route" in caplog.text) is not fits


def test_an_exclusion_below_a_root_path_is_no_stranger(caplog: pytest.LogCaptureFixture) -> None:
    """Servers put the root path before the path."""
    middleware = AuditMiddleware(
        starlette_app(_view), exclude=[health(path="/behind/me"), health(path="/you")]
    )
    wire = Wire()
    with capture_audit():
        for _ in range(2):
            scope = http_scope("/behind/x", root_path="/behind")
            run_loop(middleware(scope, wire.receive, Wire().send))

    assert caplog.text.count("fits no route") == 1
    assert "path /you" in caplog.text


def test_an_application_without_known_routes_is_not_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What a plain application routes by itself, nobody knows."""

    async def plain(scope: Any, receive: Any, send: Any) -> None:
        await answer(send)

    with capture_audit():
        call(plain, "/", exclude=[health(path="/x")])

    assert not caplog.text


def test_the_session_of_an_application_that_is_put_together_late_tells_of_its_exclusions(
    make_handler: Callable[..., AuditHandler], audit_dir: Path
) -> None:
    """Starlette makes its middlewares with the first request, after the first entry."""
    import structlog

    handler = make_handler()
    structlog.configure(processors=[*structlog_audit.audit_processors(handler=handler)])
    app = starlette_app(_view)
    app.add_middleware(AuditMiddleware, exclude=[health(path="/me")])
    audit_log.info(action="Started")
    wire = Wire()
    run_loop(app(http_scope("/other"), wire.receive, wire.send))
    handler.close()

    assert [s[0]["data"].get("exclusions") is None for s in read_sessions(audit_dir)] == [
        True,
        False,
    ]
