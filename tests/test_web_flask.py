"""Flask: the route is known beforehand, the user afterwards, and nothing runs off the record."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import flask_login
import pytest
from flask import Blueprint, Flask, Response, abort, g, request, send_file, stream_with_context
from flask.views import MethodView
from running import in_threads, run_well
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import Client, EnvironBuilder

from structlog_audit import AuditConfigurationError, audit_log, current_operation
from structlog_audit.context import audit_fields
from structlog_audit.exclusions import Exclude, audit_exempt, listed
from structlog_audit.testing import FailingSink, capture_audit
from structlog_audit.web.flask import Audit

Entries = list[dict[str, Any]]


@pytest.fixture
def entries() -> Iterator[Entries]:
    with capture_audit() as captured:
        yield captured


def shop() -> Flask:
    """An application as they are: a blueprint, streams, files, errors."""
    data = str(Path(__file__).parent / "data")
    app = Flask("shop", static_folder=data, static_url_path="/static")
    orders = Blueprint("orders", "orders", url_prefix="/orders")

    @orders.get("/<int:number>")
    def show(number: int) -> dict[str, int]:
        g.user = "2780"
        return {"number": number}

    @orders.post("/")
    def create() -> tuple[dict[str, Any], int]:
        audit_log.info(action="OrderPlaced")
        return request.get_json(), 201

    app.register_blueprint(orders)

    @app.get("/stream")
    def stream() -> Response:
        def parts() -> Iterator[str]:
            for number in range(3):
                yield f"{number} {audit_fields()['request_id'] is not None} {request.path}\n"
            g.user = "late"

        return Response(stream_with_context(parts()))

    @app.get("/file")
    def file() -> Response:
        return send_file(io.BytesIO(b"x" * 100_000), "text/plain")

    @app.post("/upload")
    def upload() -> dict[str, int]:
        return {"size": len(request.files["file"].read())}

    @app.get("/broken")
    def broken() -> str:
        g.user = "2780"
        raise LookupError("no order")

    @app.get("/forbidden")
    def forbidden() -> str:
        abort(403)

    app.wsgi_app = validator(app.wsgi_app)  # type: ignore[arg-type, method-assign]
    return app


def who(asked: Any) -> Any:
    return g.get("user")


def get(app: Any, path: str, method: str = "GET", **options: Any) -> Any:
    """Send a request, with a validator between the client and the application."""
    app = app if not isinstance(app, Flask) else app.wsgi_app
    return Client(validator(app), Response).open(path, method=method, buffered=True, **options)


def nobody(asked: object) -> bool:
    """Say that the caller has no privileged roles."""
    return False


def told(entries: Entries) -> list[tuple[str, str]]:
    return [(entry["action"], entry["event"]) for entry in entries]


def ask(path: str, method: str = "GET", app: Flask | None = None, **options: Any) -> Entries:
    """Return what is recorded of one request to an audited shop."""
    app = shop() if app is None else app
    Audit(app, **options)
    with capture_audit() as captured:
        get(app, path, method)
    return captured


# what the entries say


def test_the_action_is_the_endpoint_and_the_user_is_known_at_the_end(entries: Entries) -> None:
    """A function that needs the request's context answers None before it is there."""
    app = shop()
    Audit(app, user=who)
    assert get(app, "/orders/4").json == {"number": 4}

    begin, end = entries
    assert begin["action"] == end["action"] == "orders.show"
    assert begin["data"] == {
        "method": "GET", "path": "/orders/4", "route": "/orders/<int:number>", "userKnown": False,
    }  # fmt: skip
    assert "userId" not in begin
    assert (end["event"], end["userId"], end["data"]["status"]) == ("Complete", "2780", 200)


@pytest.mark.parametrize(
    ("method", "path", "action", "status"),
    [
        ("GET", "/nothing", "GET /nothing", 404),
        ("PUT", "/orders/4", "PUT /orders/4", 405),
        ("POST", "/orders", "POST /orders", 308),
        ("OPTIONS", "/orders/4", "orders.show", 200),
        ("HEAD", "/orders/4", "orders.show", 200),
        ("GET", "/forbidden", "forbidden", 403),
        ("GET", "/orders/four", "GET /orders/four", 404),
        ("GET", "/static/nothing", "static", 404),
    ],
)
def test_what_has_no_route_is_named_by_method_and_path(
    method: str, path: str, action: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of it raises, and all of it is audited, also what Flask answers itself."""
    begin, end = ask(path, method)

    assert not caplog.records

    assert (begin["action"], end["action"]) == (action, action)
    assert (end["event"], end["data"]["status"]) == ("Complete", status)


def test_an_exception_that_flask_turns_into_a_response_is_in_the_outcome() -> None:
    """And who it was is there as well."""
    (_, end) = ask("/broken", user=who)

    assert end["event"] == "Fail"
    assert end["data"]["status"] == 500
    assert end["data"]["exception"]["type"].endswith("LookupError")
    assert end["userId"] == "2780"


def test_an_exception_that_comes_through_is_a_fail(entries: Entries) -> None:
    """In tests and debuggers Flask lets it pass."""
    app = shop()
    app.testing = True
    Audit(app, user=who)
    with pytest.raises(LookupError):
        get(app, "/broken")

    assert told(entries) == [("broken", "Begin"), ("broken", "Fail")]
    assert entries[1]["userId"] == "2780"


def test_nothing_of_a_request_is_kept_after_it(entries: Entries) -> None:
    """An environ that held what holds it would stay until the next garbage collection."""
    app = shop()
    Audit(app)
    environ = EnvironBuilder("/orders/4").get_environ()
    response = app.wsgi_app(environ, lambda *_: lambda part: None)
    assert b"".join(response) == b'{"number":4}\n'
    response.close()  # type: ignore[attr-defined]

    assert not [key for key in environ if key.startswith("structlog_audit")]


def test_a_stream_ends_before_its_outcome(entries: Entries) -> None:
    """Its context ends with it, and what was learned in it is there."""
    app = shop()
    Audit(app, user=who)
    assert get(app, "/stream").text.splitlines() == [f"{n} True /stream" for n in range(3)]

    assert told(entries) == [("stream", "Begin"), ("stream", "Complete")]
    assert entries[1]["userId"] == "late"


def test_a_stream_that_nobody_reads_has_a_user_all_the_same(entries: Entries) -> None:
    """The context of a HEAD ends when the body is closed, after its (empty) end."""
    app = shop()
    Audit(app, user=lambda asked: asked.headers.get("X-User") if g else None)
    get(app, "/stream", "HEAD", headers={"X-User": "2780"})

    assert (entries[1]["event"], entries[1]["userId"]) == ("Complete", "2780")


def test_a_stream_that_the_client_leaves_is_an_abandon(entries: Entries) -> None:
    """Its context ends in close()."""
    app = shop()
    Audit(app)
    response = Client(app.wsgi_app, Response).get("/stream")
    next(iter(response.response))  # type: ignore[call-overload]
    response.close()

    assert told(entries) == [("stream", "Begin"), ("stream", "Abandon")]
    assert not audit_fields()


def test_files_come_and_go_unharmed(entries: Entries) -> None:
    """A download by the server's file wrapper, a static file, and an upload."""
    app = shop()
    app.config["USE_X_SENDFILE"] = False
    Audit(app)
    name = next(path.name for path in Path(app.static_folder or "").iterdir() if path.is_file())
    assert len(get(app, "/file").data) == 100_000
    assert get(app, f"/static/{name}").data == (Path(app.static_folder or "") / name).read_bytes()
    upload = {"file": (io.BytesIO(b"y" * 200_000), "orders.csv")}
    assert get(app, "/upload", "POST", data=upload).json == {"size": 200_000}

    assert [action for action, event in told(entries) if event == "Complete"] == [
        "file", "static", "upload",
    ]  # fmt: skip


def test_a_function_that_reads_the_body_does_not_take_it_from_the_view(entries: Entries) -> None:
    """Beforehand the request is shallow; at the end it is the view's own."""
    app = shop()
    Audit(app, company=lambda asked: asked.get_json()["company"])
    order = {"company": "2350"}
    assert get(app, "/orders/", "POST", json=order).json == order

    assert "companyId" not in entries[0]
    assert (entries[1]["action"], entries[1]["event"]) == ("OrderPlaced", "Record")
    assert entries[2]["companyId"] == "2350"


def test_what_is_in_the_request_is_known_at_the_begin() -> None:
    """Endpoint and arguments of the view are in the request already."""
    (begin, _) = ask(
        "/orders/4",
        user=lambda asked: asked.headers.get("X-User", "anonymous"),
        action=lambda asked: f"{asked.endpoint}#{asked.view_args['number']}",
    )

    assert (begin["userId"], begin["action"]) == ("anonymous", "orders.show#4")


def test_a_function_is_not_asked_outside_of_the_context_at_the_end() -> None:
    """What it says there would replace what it has said within."""
    (_, end) = ask("/orders/4", user=lambda asked: g.get("user") if g else "nobody")

    assert end["userId"] == "2780"


def test_the_context_of_another_request_is_not_asked(entries: Entries) -> None:
    """As in a test that keeps a context: the Begin would name somebody else."""
    app = shop()
    Audit(app, user=who)
    with app.test_request_context():
        g.user = "somebody else"
        get(app, "/orders/4")

    assert "userId" not in entries[0]
    assert entries[1]["userId"] == "2780"


def test_a_function_that_raises_at_the_end_hides_nothing(
    entries: Entries, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the response nor the exception of the view."""

    def broken(asked: Any) -> str:
        raise ZeroDivisionError

    app = shop()
    Audit(app, user=broken, action=broken)
    assert get(app, "/orders/4").status_code == 200
    assert get(app, "/broken").status_code == 500

    assert told(entries)[1::2] == [("orders.show", "Complete"), ("broken", "Fail")]
    assert "the function for user, " in caplog.text


def test_a_view_names_its_operation_better() -> None:
    """What it says itself is not replaced by the endpoint."""
    app = Flask("shop")

    @app.get("/")
    def index() -> str:
        current_operation().action = "OrderCancel"
        current_operation().bind(user_id="7")
        return ""

    (_, end) = ask("/", app=app)
    assert (end["action"], end["userId"]) == ("OrderCancel", "7")


def test_flask_login_knows_the_user_at_the_end(entries: Entries) -> None:
    """Beforehand its `current_user` is None, which costs nothing and is not logged."""
    app = Flask("shop")
    app.secret_key = "secret"
    manager = flask_login.LoginManager(app)

    class User(flask_login.UserMixin):  # type: ignore[misc]
        id = "2780"

    manager.request_loader(lambda asked: User() if asked.headers.get("X-Key") == "k" else None)

    @app.get("/account")
    @flask_login.login_required  # type: ignore[untyped-decorator]
    def account() -> str:
        return "yours"

    Audit(app, user=lambda asked: flask_login.current_user.get_id())
    assert get(app, "/account").status_code == 401
    response = get(app, "/account", headers={"X-Key": "k"})
    assert response.status_code == 200

    assert [entry.get("userId") for entry in entries] == [None, None, None, "2780"]
    assert [entry["data"].get("status") for entry in entries] == [None, 401, None, 200]


# refusals


def test_a_begin_that_fails_keeps_flask_from_running() -> None:
    """No view, no hook and no teardown runs."""
    app = shop()
    Audit(app)
    app.before_request(lambda: pytest.fail("it ran"))
    with capture_audit(FailingSink()):
        response = get(app, "/orders/4")

    assert (response.status_code, response.mimetype) == (503, "application/problem+json")


def test_a_durable_outcome_that_fails_takes_the_place_of_the_response() -> None:
    """What the view answered does not leave."""
    app = Flask("shop")

    @app.post("/pay")
    def pay() -> str:
        current_operation().durable = True
        return "paid"

    Audit(app)
    with capture_audit(FailingSink(lambda number: number == 2)):
        response = get(app, "/pay", "POST")

    assert response.status_code == 503
    assert b"paid" not in response.data


# exclusions


def exempt_app() -> Flask:
    app = Flask("shop")

    @app.route("/prices", methods=["GET", "POST"])
    @audit_exempt(kind="public_read", reason="prices are public")
    def prices() -> str:
        return "7"

    class Me(MethodView):
        @audit_exempt(kind="own_read", reason="the caller's own")
        def get(self) -> str:
            return "you"

        def post(self) -> str:
            return "changed"

    app.add_url_rule("/me", view_func=Me.as_view("me"))
    return app


def test_an_exempt_view_is_left_out_and_only_for_what_it_is_exempt_from() -> None:
    """A view that is exempt as a read is audited when it writes."""
    app = exempt_app()
    Audit(app, privileged=nobody)
    with capture_audit() as entries:
        for path in ("/prices", "/me"):
            for method in ("GET", "HEAD", "POST"):
                assert get(app, path, method).status_code == 200

    assert told(entries)[::2] == [("prices", "Begin"), ("me", "Begin")]
    assert {entry["data"]["method"] for entry in entries[::2]} == {"POST"}


def test_a_privileged_caller_is_audited_in_an_exempt_view() -> None:
    """So is one of whom it cannot be told beforehand."""
    for privileged in (lambda asked: True, lambda asked: g.roles):
        assert told(ask("/prices", app=exempt_app(), privileged=privileged)) == [
            ("prices", "Begin"),
            ("prices", "Complete"),
        ]
    assert not ask("/prices", app=exempt_app(), privileged=lambda asked: False)


def test_exclusions_go_by_endpoint_and_path(caplog: pytest.LogCaptureFixture) -> None:
    """One that fits is not reported."""
    exclude = [
        Exclude(kind="public_read", route="orders.*", reason="test"),
        Exclude(kind="public_read", path="/static/*", reason="test"),
        Exclude(kind="public_read", path="/orders/4*", reason="test"),
    ]
    assert not ask("/orders/4", exclude=exclude, privileged=nobody)
    assert not ask("/static/x", exclude=exclude, privileged=nobody)
    assert ask("/stream", exclude=exclude, privileged=nobody)
    assert not caplog.records


def test_an_exclusion_that_fits_no_rule_is_reported_once(
    entries: Entries, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelt probe would be audited, and one of a rule that is gone would wait for another."""
    app = shop()
    Audit(
        app,
        exclude=[
            Exclude(kind="health", path="/helthz", reason="probe"),
            Exclude(kind="public_read", route="order.show", reason="public"),
            Exclude(kind="public_read", when=lambda asked: False, reason="whatever"),
        ],
        privileged=nobody,
    )
    with caplog.at_level(logging.WARNING, "structlog_audit"):
        get(app, "/orders/4")
        get(app, "/orders/4")

    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "/helthz" in caplog.text
    assert "order.show" in caplog.text


# applications


def test_two_applications_share_the_options_and_are_told_apart(
    entries: Entries, caplog: pytest.LogCaptureFixture
) -> None:
    """By a factory, too; each is reported by its own name."""
    audit = Audit(exclude=[Exclude(kind="health", path="/healthz", reason="probe")])
    one, two = shop(), Flask("other")
    for app in (one, two):
        audit.init_app(app)
    two.add_url_rule("/healthz", "health", lambda: "")
    get(one, "/orders/4")
    get(two, "/healthz")
    get(two, "/orders/4")

    assert told(entries)[::2] == [("orders.show", "Begin"), ("GET /orders/4", "Begin")]
    assert "'shop'" in caplog.text
    assert "'other'" not in caplog.text


def test_the_exclusions_of_two_audits_are_both_reported() -> None:
    """The report of the host hides none behind another."""
    for path in ("/one", "/two"):
        Audit(shop(), exclude=[Exclude(kind="health", path=path, reason="probe")])

    assert [line.split(":")[0] for _, line in listed()] == ["path /one", "path /two"]


def test_registering_twice_is_an_error() -> None:
    """Each request would be on record twice."""
    app = shop()
    Audit(app)
    with pytest.raises(AuditConfigurationError, match="'shop' are audited already"):
        Audit().init_app(app)


def test_unusable_options_are_found_at_once() -> None:
    """Not at the first request."""
    with pytest.raises(AuditConfigurationError, match="user= must be callable"):
        Audit(user="2780")  # type: ignore[arg-type]


def test_a_mounted_application_is_recorded_by_the_path_of_the_client(
    entries: Entries, caplog: pytest.LogCaptureFixture
) -> None:
    """And routed by its own; exclusions by path name that of the client, too."""
    app = shop()
    exclude = [Exclude(kind="public_read", path="/shop/file", reason="test")]
    Audit(app, exclude=exclude, privileged=nobody)
    mounted = DispatcherMiddleware(Flask("top").wsgi_app, {"/shop": app.wsgi_app})
    get(mounted, "/shop/orders/4")
    get(mounted, "/shop/file")

    assert told(entries) == [("orders.show", "Begin"), ("orders.show", "Complete")]
    assert entries[0]["data"]["path"] == "/shop/orders/4"
    assert not caplog.records


def test_routes_are_found_by_host_and_subdomain(entries: Entries) -> None:
    """As Flask finds them; a host that is not served is no error."""
    app = Flask("shop", host_matching=True, static_host="static.example")
    app.add_url_rule("/", "home", lambda: "", host="shop.example")
    Audit(app)
    for host in ("shop.example", "other.example"):
        get(app, "/", base_url=f"http://{host}")

    sub = Flask("sub", subdomain_matching=True)
    sub.config["SERVER_NAME"] = "shop.example"
    sub.add_url_rule("/", "admin", lambda: "", subdomain="admin")
    Audit(sub)
    get(sub, "/", base_url="http://admin.shop.example")

    assert [action for action, _ in told(entries)[::2]] == ["home", "GET /", "admin"]


def test_a_converter_that_raises_does_not_keep_the_request_from_the_record(
    entries: Entries, caplog: pytest.LogCaptureFixture
) -> None:
    """Flask meets the same exception afterwards."""
    app = Flask("shop")

    class Broken(app.url_map.converters["int"]):  # type: ignore[name-defined, misc]
        def to_python(self, value: str) -> int:
            raise LookupError

    app.url_map.converters["broken"] = Broken
    app.add_url_rule("/<broken:x>", "x", lambda x: "")
    Audit(app)
    assert get(app, "/4").status_code == 500

    assert told(entries) == [("GET /4", "Begin"), ("GET /4", "Fail")]


def test_a_proxy_fix_outside_gives_the_address_of_the_client(entries: Entries) -> None:
    """It has to be put on after init_app."""
    app = shop()
    Audit(app)
    app.wsgi_app = ProxyFix(app.wsgi_app)  # type: ignore[method-assign]
    get(app, "/orders/4", headers={"X-Forwarded-For": "203.0.113.9"})

    assert entries[0]["clientIpAddress"] == "203.0.113.9"


def test_requests_at_once_do_not_mix(entries: Entries) -> None:
    """Each has its own user, request and outcome."""
    app = Flask("shop")
    together = threading.Barrier(8)

    @app.get("/<name>")
    def show(name: str) -> str:
        together.wait(10)
        g.user = name
        audit_log.info(action="Shown", user_id=name)
        return name

    Audit(app, user=who)
    in_threads([lambda name=str(n): get(app, f"/{name}") for n in range(8)])  # type: ignore[misc]

    by_request: dict[str, set[str]] = {}
    for entry in entries:
        if "userId" in entry:
            by_request.setdefault(entry["requestId"], set()).add(entry["userId"])
    assert len(by_request) == 8
    assert sorted(map(len, by_request.values())) == [1] * 8
    assert len(entries) == 24


def test_the_page_for_wsgi_does_not_need_flask() -> None:
    """Only the module of a framework imports it."""
    run_well(
        "import sys, structlog_audit.web.wsgi\nassert not {'flask', 'werkzeug'} & set(sys.modules)"
    )
    assert "flask" in sys.modules
