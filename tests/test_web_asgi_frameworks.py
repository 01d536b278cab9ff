"""Starlette, FastAPI, Litestar and Quart under uvicorn: routes, users, outcomes, order."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from asgi_servers import SERVERS, Wire, begin, http_scope, outcome, outcomes, serving
from running import HANG, run_loop
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from structlog_audit import current_operation
from structlog_audit.exclusions import Exclude
from structlog_audit.testing import FailingSink, capture_audit
from structlog_audit.web.asgi import AuditMiddleware

fastapi = pytest.importorskip("fastapi")
litestar = pytest.importorskip("litestar")
quart = pytest.importorskip("quart")
from fastapi.responses import FileResponse, StreamingResponse  # noqa: E402
from fastapi.staticfiles import StaticFiles  # noqa: E402
from litestar.exceptions import NotAuthorizedException  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser  # noqa: E402
from starlette.background import BackgroundTask  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402
from starlette.middleware.authentication import AuthenticationMiddleware  # noqa: E402
from starlette.middleware.base import BaseHTTPMiddleware  # noqa: E402
from starlette.middleware.gzip import GZipMiddleware  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute  # noqa: E402

Entry = dict[str, Any]


@pytest.fixture
def entries() -> Iterator[list[Entry]]:
    with capture_audit() as entries:
        yield entries


def get(running: Any, path: str, method: str = "GET", **options: Any) -> httpx.Response:
    url = f"http://127.0.0.1:{running.port}{path}"
    return httpx.request(method, url, timeout=HANG, trust_env=False, **options)


def feed(running: Any, path: str) -> Any:
    return connect(f"ws://127.0.0.1:{running.port}{path}", open_timeout=HANG, proxy=None)


def user_of(scope: Any) -> Any:
    """Return who was authenticated, in applications with Starlette's own middleware."""
    user = scope.get("user")
    return user.display_name if user is not None and user.is_authenticated else None


class ByHeader(AuthenticationBackend):  # type: ignore[misc]
    async def authenticate(self, connection: Any) -> Any:
        name = connection.headers.get("authorization")
        return (AuthCredentials(["authenticated"]), SimpleUser(name)) if name else None


# --- Starlette


async def show(request: Any) -> Any:
    current_operation().data["seen"] = request.path_params
    return PlainTextResponse("shown")


def show_in_a_thread(request: Any) -> Any:
    current_operation().data["thread"] = threading.current_thread() is not threading.main_thread()
    current_operation().bind(user_id="alice")
    return PlainTextResponse("shown")


async def listen(websocket: Any) -> None:
    await websocket.accept()
    while True:
        await websocket.receive_text()


async def refuse(websocket: Any) -> None:
    raise HTTPException(401)


async def raising(request: Any) -> Any:
    raise LookupError("no such order")


async def stream(request: Any) -> Any:
    async def parts() -> Any:
        for number in range(3):
            current_operation().data["part"] = number
            yield b"part"

    return StreamingResponse(parts())


def starlette(*, inside: bool = True, **options: Any) -> Any:
    app = Starlette(
        routes=[
            Route("/orders/{number:int}", show, name="OrderShow"),
            Route("/threaded", show_in_a_thread),
            Route("/raising", raising),
            Route("/stream", stream),
            WebSocketRoute("/feed", listen, name="Feed"),
            WebSocketRoute("/private", refuse),
            Mount("/shops/{shop}", routes=[Route("/items/{item}", show, name="ItemShow")]),
            Mount("/sub", app=Starlette(routes=[Route("/leaf", show, name="Leaf")])),
            Host("api.example", app=Router([Route("/hosted", show, name="Hosted")])),
        ]
    )
    if not inside:
        return AuditMiddleware(app, **options)
    app.add_middleware(AuditMiddleware, **options)
    return app


@pytest.mark.parametrize("inside", [True, False], ids=["added", "around"])
@pytest.mark.parametrize(
    ("path", "action", "template"),
    [
        ("/orders/7", "OrderShow", "/orders/{number}"),
        ("/shops/a/items/b", "ItemShow", "/shops/{shop}/items/{item}"),
        ("/sub/leaf", "Leaf", "/sub/leaf"),
        ("/sub/none", "/sub", "/sub"),
        ("/none", "GET /none", None),
        ("/orders/x", "GET /orders/x", None),
    ],
)
def test_the_begin_of_starlette_tells_the_route(
    entries: list[Entry], inside: bool, path: str, action: str, template: str | None
) -> None:
    """By the router's own choice, below mounts and in applications within."""
    wire = Wire()
    run_loop(starlette(inside=inside)(http_scope(path), wire.receive, wire.send))

    for entry in (begin(entries), outcome(entries)):
        assert entry["action"] == action
        assert entry["data"].get("route") == template
    assert outcome(entries)["data"]["status"] == (404 if "none" in path or "x" in path else 200)


def test_around_what_hides_its_router_the_route_is_in_the_outcome(entries: list[Entry]) -> None:
    """By then a mount has changed the scope; the route is that of the request as it came."""
    app = Starlette(routes=[Mount("/shops/{shop}", routes=[Route("/items/{item}", show)])])

    async def hiding(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    wire = Wire()
    run_loop(AuditMiddleware(hiding)(http_scope("/shops/a/items/b"), wire.receive, wire.send))

    assert begin(entries)["action"] == "GET /shops/a/items/b"
    assert outcome(entries)["action"] == "show"
    assert outcome(entries)["data"]["route"] == "/shops/{shop}/items/{item}"


def test_a_route_by_host_is_found(entries: list[Entry]) -> None:
    """Starlette routes by the name of the host, too."""
    wire = Wire()
    scope = http_scope("/hosted", headers=[(b"host", b"api.example")])
    run_loop(starlette()(scope, wire.receive, wire.send))

    assert begin(entries)["action"] == "Hosted"


def test_a_number_that_python_does_not_convert_costs_no_entry(entries: list[Entry]) -> None:
    """5,000 digits: the router itself raises, and what was asked for is on record as failed."""
    with contextlib.suppress(ValueError):
        run_loop(starlette()(http_scope("/orders/" + "9" * 5_000), Wire().receive, Wire().send))

    assert begin(entries)["action"].startswith("GET /orders/999")
    assert outcome(entries)["event"] == "Fail"


def test_an_endpoint_in_the_thread_pool_adds_to_its_outcome(entries: list[Entry]) -> None:
    """Contexts are copied there; the operation is the same."""
    with serving(starlette()) as running:
        assert get(running, "/threaded").status_code == 200

    assert outcome(entries)["userId"] == "alice"
    assert outcome(entries)["data"]["thread"] is True


def test_a_streaming_endpoint_adds_to_its_outcome_while_it_streams(entries: list[Entry]) -> None:
    """The outcome comes after the last part."""
    with serving(starlette()) as running:
        assert get(running, "/stream").content == b"part" * 3

    assert (outcome(entries)["event"], outcome(entries)["data"]["part"]) == ("Complete", 2)


@pytest.mark.parametrize("inside", [True, False], ids=["added", "around"])
def test_an_unhandled_exception_is_a_failure_with_500(entries: list[Entry], inside: bool) -> None:
    """Whether Starlette's own error page is inside or outside of us."""
    with serving(starlette(inside=inside)) as running:
        assert get(running, "/raising").status_code == 500

    last = outcome(entries)
    assert (last["event"], last["data"]["status"]) == ("Fail", 500)


def test_users_are_known_at_the_begin_inside_of_authentication_and_later_outside(
    entries: list[Entry],
) -> None:
    """The order of middlewares decides; what is known afterwards is in the outcome."""

    def built(*order: Any) -> Any:
        app = Starlette(routes=[Route("/", show)])
        for middleware, options in order:
            app.add_middleware(middleware, **options)
        return app

    audit = AuditMiddleware, {"user": user_of}
    authentication = AuthenticationMiddleware, {"backend": ByHeader()}
    for order in ((audit, authentication), (authentication, audit)):  # the last added is outermost
        with serving(built(*order)) as running:
            assert get(running, "/", headers={"authorization": "alice"}).status_code == 200
    found = outcomes(entries, 2)
    first, second = (entry for entry in entries if entry["event"] == "Begin")

    assert first["userId"] == "alice"
    assert "userKnown" not in first["data"]
    assert "userId" not in second
    assert second["data"]["userKnown"] is False
    assert [entry["userId"] for entry in found] == ["alice", "alice"]


@pytest.mark.parametrize("outside", [True, False])
def test_base_http_middleware_and_compression_change_no_outcome(
    entries: list[Entry], outside: bool
) -> None:
    """They call the application in tasks of their own."""

    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    app = Starlette(routes=[Route("/stream", stream), Route("/orders/{number}", show)])
    others = [(BaseHTTPMiddleware, {"dispatch": dispatch}), (GZipMiddleware, {})]
    for middleware, options in [*others, (AuditMiddleware, {})][:: 1 if outside else -1]:
        app.add_middleware(middleware, **options)
    with serving(app) as running:
        assert get(running, "/stream").content == b"part" * 3
        assert get(running, "/orders/1").text == "shown"

    assert [entry["event"] for entry in outcomes(entries, 2)] == ["Complete"] * 2
    assert outcomes(entries, 2)[0]["data"]["part"] == 2


@pytest.mark.parametrize(
    ("inner", "streams"),
    [("nothing", False), ("nothing", True), ("base", False), ("base", True), ("gzip", False)],
)
def test_a_durable_outcome_that_is_lost_replaces_a_response_of_starlette(
    inner: str, streams: bool
) -> None:
    """Through middlewares and their task groups; the client gets 503."""

    async def settle(request: Any) -> Any:
        current_operation().durable = True
        if streams:
            return StreamingResponse(iter([b"settled"]), headers={"content-length": "7"})
        return PlainTextResponse("settled")

    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    app = Starlette(routes=[Route("/", settle)])
    if inner == "base":
        app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    elif inner == "gzip":
        app.add_middleware(GZipMiddleware)
    app.add_middleware(AuditMiddleware)
    with capture_audit(FailingSink(lambda number: number == 2)), serving(app) as running:
        response = get(running, "/")

    assert response.status_code == 503
    assert "settled" not in response.text


def test_a_background_task_that_fails_does_not_change_the_outcome(entries: list[Entry]) -> None:
    """The response was given; the task is an effect of its own."""
    ran = threading.Event()

    def task() -> None:
        ran.set()
        raise LookupError("in the background")

    async def with_task(request: Any) -> Any:
        return PlainTextResponse("done", background=BackgroundTask(task))

    app = Starlette(routes=[Route("/", with_task)])
    app.add_middleware(AuditMiddleware)
    with serving(app) as running:
        assert get(running, "/").status_code == 200
        assert ran.wait(HANG)

    assert outcome(entries)["event"] == "Complete"


def test_a_websocket_of_starlette_ends_as_its_client_says(entries: list[Entry]) -> None:
    """`receive_text` raises when the client closes; that is no failure."""
    with serving(starlette()) as running:
        with feed(running, "/feed") as socket:
            socket.send("one")
        last = outcome(entries)

    assert begin(entries)["action"] == "Feed"
    assert begin(entries)["data"]["route"] == "/feed"
    assert (last["event"], last["data"]["closeCode"]) == ("Complete", 1000)
    assert last["data"]["received"] == 1


def test_a_websocket_that_starlette_denies_has_its_status(entries: list[Entry]) -> None:
    """An HTTPException before the accept is a response, or nothing at all in older versions."""
    with serving(starlette()) as running:
        with pytest.raises(InvalidStatus) as refused:
            feed(running, "/private")

    assert outcome(entries)["data"]["status"] == refused.value.response.status_code
    assert refused.value.response.status_code in (401, 500)


# --- FastAPI


def who(request: fastapi.Request) -> str:
    name = request.headers.get("authorization")
    if name is None:
        raise fastapi.HTTPException(401)
    if name == "eve":
        raise fastapi.HTTPException(403)
    return name


def a_fastapi(directory: Path | None = None, **options: Any) -> Any:
    app = fastapi.FastAPI()
    app.add_middleware(AuditMiddleware, **options)
    orders = fastapi.APIRouter(prefix="/orders")
    items = fastapi.APIRouter(prefix="/{number}/items")

    @orders.get("/{number}")
    def read_order(number: int, user: Annotated[str, fastapi.Depends(who)]) -> Any:
        current_operation().bind(user_id=user)
        current_operation().data["number"] = number
        return {}

    @orders.post("/", operation_id="OrderCreate", status_code=201)
    async def create(order: dict[str, Any], tasks: fastapi.BackgroundTasks) -> Any:
        current_operation().data["rows"] = len(order)
        tasks.add_task(lambda: 1 / 0)
        return {}

    @items.get("/{item}")
    async def read_item(number: int, item: str) -> Any:
        return {}

    @orders.websocket("/feed/{number}")
    async def order_feed(websocket: fastapi.WebSocket, number: int) -> None:
        await websocket.accept()
        await websocket.send_json({})
        await websocket.close(4000 + number)

    @app.get("/file")
    def file() -> Any:
        assert directory is not None
        return FileResponse(directory / "file.txt")

    orders.include_router(items)
    app.include_router(orders, prefix="/v1")
    within = fastapi.FastAPI()
    within.include_router(items, prefix="/carts")
    app.mount("/sub", within)
    if directory is not None:
        app.mount("/static", StaticFiles(directory=directory), name="static")
    return app


@pytest.mark.parametrize(
    ("path", "action", "template", "status"),
    [
        ("/v1/orders/7", "read_order", "/v1/orders/{number}", 401),
        ("/v1/orders/7/items/x", "read_item", "/v1/orders/{number}/items/{item}", 200),
        ("/sub/carts/7/items/x", "read_item", "/sub/carts/{number}/items/{item}", 200),
        ("/v1/orders/seven/items/x", "read_item", "/v1/orders/{number}/items/{item}", 422),
        ("/v1/nothing", "GET /v1/nothing", None, 404),
        ("/openapi.json", "openapi", "/openapi.json", 200),
    ],
)
def test_the_begin_of_fastapi_tells_the_route(
    entries: list[Entry], path: str, action: str, template: str | None, status: int
) -> None:
    """Of included routers, nested ones, and applications within the application."""
    wire = Wire()
    run_loop(a_fastapi()(http_scope(path), wire.receive, wire.send))

    for entry in (begin(entries), outcome(entries)):
        assert (entry["action"], entry["data"].get("route")) == (action, template)
    assert (outcome(entries)["event"], outcome(entries)["data"]["status"]) == ("Complete", status)


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.__name__)
def test_fastapi_under_a_server(server: Any, entries: list[Entry], tmp_path: Path) -> None:
    """Dependencies that refuse, sync and async endpoints, bodies, files, background tasks."""
    (tmp_path / "file.txt").write_text("x" * 200_000)
    with serving(a_fastapi(tmp_path), server) as running:
        answers = [
            get(running, "/v1/orders/7"),
            get(running, "/v1/orders/7", headers={"authorization": "eve"}),
            get(running, "/v1/orders/7", headers={"authorization": "alice"}),
            get(running, "/v1/orders/", "POST", json={"a": 1, "b": 2}),
            get(running, "/v1/orders/", "POST", content=b"{"),
            get(running, "/file"),
            get(running, "/file", headers={"range": "bytes=0-9"}),
            get(running, "/file", "HEAD"),
            get(running, "/static/file.txt"),
            get(running, "/v1/orders/7", "DELETE"),
        ]
        found = outcomes(entries, len(answers))

    assert [a.status_code for a in answers] == [401, 403, 200, 201, 422, 200, 206, 405, 200, 405]
    assert [e["data"]["status"] for e in found] == [a.status_code for a in answers]
    assert {entry["event"] for entry in found} == {"Complete"}
    assert found[2]["userId"] == "alice"
    assert found[2]["data"]["number"] == 7
    assert (found[3]["action"], found[3]["data"]["rows"]) == ("OrderCreate", 2)
    assert (found[8]["action"], found[8]["data"]["route"]) == ("static", "/static")


def test_a_websocket_of_an_included_router_has_its_route(entries: list[Entry]) -> None:
    """And the code with which the application closes it."""
    with serving(a_fastapi()) as running:
        with feed(running, "/v1/orders/feed/7") as socket, contextlib.suppress(Exception):
            while True:
                socket.recv(HANG)
        last = outcome(entries)

    assert begin(entries)["data"]["route"] == "/v1/orders/feed/{number}"
    assert last["action"] == "order_feed"
    assert (last["data"]["sent"], last["data"]["closeCode"]) == (1, 4007)


def test_exclusions_by_route_and_static_files_are_served_whatever_becomes_of_the_log(
    tmp_path: Path,
) -> None:
    """Everything else is refused."""
    (tmp_path / "file.txt").write_text("x")
    exclude = [
        Exclude(kind="public_read", route="read_item", reason="catalogue"),
        Exclude(kind="public_read", path="/static/*", reason="pictures"),
    ]
    app = a_fastapi(tmp_path, exclude=exclude, privileged=lambda scope: False)
    with capture_audit(FailingSink()), serving(app) as running:
        answers = [
            get(running, "/v1/orders/7/items/x"),
            get(running, "/static/file.txt"),
            get(running, "/v1/orders/7/items/x", "POST"),
            get(running, "/static/file.txt", "POST"),
            get(running, "/file"),
            get(running, "/static/%2e%2e/file.txt"),
        ]

    assert [a.status_code for a in answers] == [200, 200, 503, 503, 503, 503]


def test_a_client_that_stops_reading_a_stream_abandons_it(entries: list[Entry]) -> None:
    """Starlette cancels the stream when the client has gone."""

    async def endless(request: Any) -> Any:
        async def parts() -> Any:
            while True:
                yield b"part"
                await asyncio.sleep(0.001)

        return StreamingResponse(parts())

    app = Starlette(routes=[Route("/", endless)])
    app.add_middleware(AuditMiddleware)
    with serving(app) as running:
        url = f"http://127.0.0.1:{running.port}/"
        with httpx.stream("GET", url, timeout=HANG, trust_env=False) as response:
            next(response.iter_raw())
        last = outcome(entries)

    assert (last["event"], last["data"]["clientGone"]) == ("Abandon", True)


# --- Litestar


@litestar.get("/orders/{number:int}", name="OrderShow")
async def litestar_show(request: litestar.Request) -> dict[str, int]:
    current_operation().data["number"] = request.path_params["number"]
    return {}


@litestar.get("/threaded", sync_to_thread=True)
def litestar_threaded() -> str:
    current_operation().data["thread"] = True
    return ""


@litestar.get("/refusing")
async def litestar_refusing() -> None:
    raise NotAuthorizedException


@litestar.get("/raising")
async def litestar_raising() -> None:
    raise LookupError("no such order")


@litestar.websocket("/feed")
async def litestar_feed(socket: litestar.WebSocket) -> None:
    await socket.accept()
    while True:
        await socket.receive_text()


HANDLERS = [
    litestar_show, litestar_threaded, litestar_refusing, litestar_raising, litestar_feed
]  # fmt: skip


def a_litestar(*, inside: bool, **options: Any) -> Any:
    if not inside:
        return AuditMiddleware(litestar.Litestar(HANDLERS), **options)

    def factory(app: Any) -> Any:
        return AuditMiddleware(app, **options)

    return litestar.Litestar(HANDLERS, middleware=[factory])


@pytest.mark.parametrize("inside", [True, False], ids=["added", "around"])
def test_litestar_inside_and_around(entries: list[Entry], inside: bool) -> None:
    """Inside, the route is known at the Begin; around, in the outcome."""
    with serving(a_litestar(inside=inside)) as running:
        paths = ["/orders/7", "/threaded", "/refusing", "/raising"]
        statuses = [get(running, path).status_code for path in paths]
        found = outcomes(entries, 4)
    begins = [entry for entry in entries if entry["event"] == "Begin"]

    assert statuses == [200, 200, 401, 500]
    assert [entry["data"]["status"] for entry in found] == statuses
    assert [entry["event"] for entry in found] == ["Complete", "Complete", "Complete", "Fail"]
    assert found[0]["action"] == "OrderShow"
    assert found[0]["data"]["route"].startswith("/orders/{number")  # older ones keep the type
    assert found[0]["data"]["number"] == 7
    assert found[1]["data"]["thread"] is True
    assert found[1]["action"] == "litestar_threaded"
    assert begins[0]["action"] == ("OrderShow" if inside else "GET /orders/7")


@pytest.mark.parametrize("inside", [True, False], ids=["added", "around"])
def test_a_websocket_of_litestar(entries: list[Entry], inside: bool) -> None:
    """The client's close is no failure."""
    with serving(a_litestar(inside=inside)) as running:
        with feed(running, "/feed") as socket:
            socket.send("one")
        last = outcome(entries)

    assert (last["event"], last["data"]["closeCode"]) == ("Complete", 1000)
    assert last["action"] == "litestar_feed"


@pytest.mark.parametrize("inside", [True, False], ids=["added", "around"])
def test_litestar_refuses_when_the_begin_fails(inside: bool) -> None:
    """503, and the handler does not run."""
    with capture_audit(FailingSink()), serving(a_litestar(inside=inside)) as running:
        assert get(running, "/orders/7").status_code == 503
        with pytest.raises(InvalidStatus):
            feed(running, "/feed")


# --- Quart


def a_quart(**options: Any) -> Any:
    app = quart.Quart("shop")

    @app.get("/orders/<int:number>")
    async def order_show(number: int) -> Any:
        current_operation().data["number"] = number
        return ""

    @app.get("/threaded")
    def threaded() -> Any:
        current_operation().data["thread"] = True
        return ""

    @app.get("/raising")
    async def failing() -> Any:
        raise LookupError("no such order")

    @app.get("/stream")
    async def streaming() -> Any:
        async def parts() -> Any:
            yield b"part"
            yield b"part"

        return parts()

    @app.get("/settle")
    async def settle() -> Any:
        current_operation().durable = True
        return "settled"

    @app.websocket("/feed")
    async def order_feed() -> None:
        while True:
            await quart.websocket.send(await quart.websocket.receive())

    app.asgi_app = AuditMiddleware(app.asgi_app, **options)
    return app


def test_quart_around_its_asgi_app(entries: list[Entry]) -> None:
    """The route is found in its map before it is called."""
    with serving(a_quart()) as running:
        paths = ["/orders/7", "/threaded", "/raising", "/stream", "/none", "/settle"]
        statuses = [get(running, path).status_code for path in paths]
        found = outcomes(entries, 6)
    begins = [entry for entry in entries if entry["event"] == "Begin"]

    assert statuses == [200, 200, 500, 200, 404, 200]
    assert [entry["data"]["status"] for entry in found] == statuses
    assert [entry["event"] for entry in found].count("Fail") == 1
    assert [entry["action"] for entry in begins] == [
        "order_show", "threaded", "failing", "streaming", "GET /none", "settle"
    ]  # fmt: skip
    assert begins[0]["data"]["route"] == "/orders/<int:number>"
    assert found[0]["data"]["number"] == 7
    assert found[1]["data"]["thread"] is True


def test_a_websocket_of_quart(entries: list[Entry]) -> None:
    """Accepted with its first message."""
    with serving(a_quart()) as running:
        with feed(running, "/feed") as socket:
            socket.send("one")
            assert socket.recv(HANG) == "one"
        last = outcome(entries)

    assert begin(entries)["action"] == "order_feed"
    assert (last["event"], last["data"]["closeCode"]) == ("Complete", 1000)


@pytest.mark.parametrize(("path", "number"), [("/orders/7", 1), ("/settle", 2)])
def test_quart_refuses_when_an_entry_fails(path: str, number: int) -> None:
    """The Begin, or an outcome that was to be durable."""
    sink = FailingSink(lambda write: write == number)
    with capture_audit(sink), serving(a_quart()) as running:
        response = get(running, path)

    assert response.status_code == 503
    assert "settled" not in response.text
