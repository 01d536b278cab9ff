"""WSGI: what is on record when, whatever the application, the server or the client does."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from structlog_audit import (
    AuditError,
    AuditHandler,
    AuditWriteError,
    audit_log,
    audit_processors,
    bind_audit_context,
    current_operation,
)
from structlog_audit.context import audit_fields
from structlog_audit.exclusions import Exclude
from structlog_audit.testing import FailingSink, MemorySink, capture_audit
from structlog_audit.web.wsgi import AuditMiddleware

TEXT = [("Content-Type", "text/plain")]
Start = Callable[..., Any]


@pytest.fixture
def entries() -> Iterator[list[dict[str, Any]]]:
    with capture_audit() as captured:
        yield captured


class Server:
    """Serves one request as PEP 3333 wants it, step by step."""

    def __init__(self, app: Any, environ: dict[str, Any]) -> None:
        self.status = ""
        self.headers: list[tuple[str, str]] = []
        self.body: list[bytes] = []
        self.has_sent = False
        self.response = app(environ, self.start_response)

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        if exc_info is not None and self.has_sent:
            raise exc_info[1].with_traceback(exc_info[2])
        assert exc_info is not None or not self.status
        self.status, self.headers = status, headers
        return self.send

    def send(self, part: bytes) -> None:
        assert self.status
        self.has_sent = self.has_sent or bool(part)
        self.body.append(part)

    def finish(self) -> Server:
        try:
            for part in self.response:
                self.send(part)
        finally:
            if hasattr(self.response, "close"):
                self.response.close()
        return self


def environ(method: str = "GET", path: str = "/orders", **more: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": "",
        "REMOTE_ADDR": "127.0.0.1", **more,
    }  # fmt: skip
    setup_testing_defaults(made)
    return made


def request(app: Any, method: str = "GET", **options: Any) -> Server:
    """Serve one request, with a validator on both sides of the middleware."""
    audited = validator(AuditMiddleware(validator(app), **options))  # type: ignore[arg-type]
    return Server(audited, environ(method)).finish()


def kinds(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["event"] for entry in entries]


class Body:
    """A body that counts how often it is closed."""

    def __init__(self, parts: Iterable[Any]) -> None:
        self.parts = iter(parts)
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        for part in self.parts:
            if isinstance(part, Exception):
                raise part
            yield part

    def close(self) -> None:
        self.closed += 1


def answering(body: Any, status: str = "200 OK") -> Any:
    def app(environ: Any, start_response: Start) -> Any:
        start_response(status, TEXT)
        return body

    return app


def late(environ: Any, start_response: Start) -> Iterator[bytes]:
    start_response("200 OK", TEXT)
    yield b"a"
    yield b""
    yield b"b"


def writing(environ: Any, start_response: Start) -> list[bytes]:
    write = start_response("200 OK", TEXT)
    write(b"a")
    write(b"b")
    return []


# before the application


def test_the_begin_is_on_record_when_the_application_is_called(entries: Any) -> None:
    """It names what is asked for; the outcome adds what was answered."""

    def app(environ: Any, start_response: Start) -> list[bytes]:
        assert kinds(entries) == ["Begin"]
        start_response("201 Created", TEXT)
        return [b"done"]

    assert request(app, "POST", user=lambda environ: environ.get("REMOTE_USER")).body == [b"done"]

    begin, end = entries
    assert begin["action"] == end["action"] == "POST /orders"
    assert begin["data"] == {"method": "POST", "path": "/orders", "userKnown": False}
    assert begin["clientIpAddress"] == end["clientIpAddress"] == "127.0.0.1"
    assert begin["operationId"] == end["operationId"]
    assert begin["requestId"] == end["requestId"]
    assert (end["event"], end["data"]["status"]) == ("Complete", 201)
    assert end["data"]["durationMs"] > 0


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_begin_that_fails_is_answered_by_503(method: str) -> None:
    """The application is not called, and the answer tells nothing of what went wrong."""
    with capture_audit(FailingSink()):
        answer = request(lambda *_: pytest.fail("it was called"), method)

    assert answer.status == "503 Service Unavailable"
    assert ("content-type", "application/problem+json") in answer.headers
    assert (b"was not carried out" in b"".join(answer.body)) is (method == "GET")


def test_service_goes_on_after_a_refusal() -> None:
    """One entry that fails costs one request."""
    with capture_audit(FailingSink(lambda number: number == 3)) as entries:
        answers = [request(answering([b"x"])).status[:3] for _ in range(3)]

    assert answers == ["200", "503", "200"]
    assert kinds(entries) == ["Begin", "Complete", "Begin", "Complete"]


def test_a_sink_that_raises_anything_keeps_the_application_from_running() -> None:
    """Whatever keeps the Begin from the record keeps the application from the request."""

    class Broken(MemorySink):
        def write(self, lines: Any) -> None:
            raise OSError("no such thing")

    with capture_audit(Broken()):
        assert request(lambda *_: pytest.fail("it was called")).status[:3] == "503"


def test_a_processor_of_the_host_that_raises_keeps_the_application_from_running(
    handler: AuditHandler,
) -> None:
    """What it raises goes to the server."""

    def broken(*given: Any) -> Any:
        raise LookupError("a processor")

    structlog.configure(processors=[broken, *audit_processors(handler=handler)])
    with pytest.raises(LookupError, match="a processor"):
        request(lambda *_: pytest.fail("it was called"))


# outcomes


@pytest.mark.parametrize(
    ("app", "body"),
    [
        (answering([b"ab"]), b"ab"),
        (answering([]), b""),
        (answering((b"a", b"", b"b")), b"ab"),
        (lambda *given: answering(iter([b"a", b"b"]))(*given), b"ab"),
        (late, b"ab"),
        (writing, b"ab"),
    ],
    ids=["list", "empty", "tuple", "iterator", "generator", "write"],
)
@pytest.mark.parametrize("durable", [False, True])
def test_a_response_arrives_whole_whatever_its_shape(
    app: Any, body: bytes, durable: bool, entries: Any
) -> None:
    """And its outcome is a Complete."""

    def asking(environ: Any, start_response: Start) -> Any:
        current_operation().durable = durable
        return app(environ, start_response)

    answer = request(asking)

    assert (answer.status, b"".join(answer.body)) == ("200 OK", body)
    assert kinds(entries) == ["Begin", "Complete"]


def test_a_server_error_is_a_fail(entries: Any) -> None:
    """The reason is the status, unless the application has told one."""

    def refused(environ: Any, start_response: Start) -> list[bytes]:
        current_operation().fail("the ledger is closed")
        start_response("503 Service Unavailable", TEXT)
        return []

    request(answering([], "500 Internal Server Error"))
    request(refused)

    assert kinds(entries) == ["Begin", "Fail"] * 2
    assert [entries[1]["data"]["reason"], entries[3]["data"]["reason"]] == [
        "status 500",
        "the ledger is closed",
    ]


def test_an_application_that_raises_has_failed(entries: Any) -> None:
    """Its exception comes through, and no status is claimed: the server answers another one."""

    def app(environ: Any, start_response: Start) -> list[bytes]:
        start_response("200 OK", TEXT)
        raise LookupError("no order")

    with pytest.raises(LookupError):
        request(app)

    assert kinds(entries) == ["Begin", "Fail"]
    assert entries[1]["data"]["exception"]["type"].endswith("LookupError")
    assert "status" not in entries[1]["data"]


def test_an_application_that_is_interrupted_has_abandoned(entries: Any) -> None:
    """gunicorn ends a worker that takes too long by a SystemExit."""

    def app(environ: Any, start_response: Start) -> list[bytes]:
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        request(app)

    assert kinds(entries) == ["Begin", "Abandon"]


def test_a_body_that_raises_half_way_has_failed_and_is_closed_once(entries: Any) -> None:
    """The status that has left is on record."""
    body = Body([b"a", LookupError("no more")])

    with pytest.raises(LookupError):
        Server(AuditMiddleware(answering(body)), environ()).finish()

    assert kinds(entries) == ["Begin", "Fail"]
    assert entries[1]["data"]["status"] == 200
    assert body.closed == 1


def test_a_client_that_goes_leaves_an_abandon(entries: Any) -> None:
    """A generator sees its end, and the body is closed once, however often the server does."""
    seen: list[str] = []

    def app(environ: Any, start_response: Start) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        try:
            yield b"a"
            yield b"b"
        finally:
            seen.append("closed")

    server = Server(AuditMiddleware(app), environ())
    assert next(iter(server.response)) == b"a"
    assert kinds(entries) == ["Begin"]
    server.response.close()
    server.response.close()

    assert kinds(entries) == ["Begin", "Abandon"]
    assert entries[1]["data"]["status"] == 200
    assert seen == ["closed"]


@pytest.mark.parametrize("parts", [[b"a"], []])
def test_a_body_is_closed_once_when_it_was_read(parts: list[bytes], entries: Any) -> None:
    """Also by a server that closes twice; and the outcome does not change any more."""
    body = Body(parts)
    server = Server(AuditMiddleware(answering(body)), environ()).finish()
    server.response.close()

    assert body.closed == 1
    assert kinds(entries) == ["Begin", "Complete"]


class Raising(Body):
    def close(self) -> None:
        super().close()
        raise OSError("cannot close")


def test_a_close_that_raises_comes_through(entries: Any) -> None:
    """Before the end it is why the request has failed."""
    server = Server(AuditMiddleware(answering(Raising([b"a"]))), environ())
    with pytest.raises(OSError, match="cannot close"):
        server.response.close()

    assert kinds(entries) == ["Begin", "Fail"]


def test_a_close_that_raises_at_the_end_does_not_break_the_response(entries: Any) -> None:
    """It comes through when the server closes, and the request has failed."""
    body = Raising([b"a"])
    server = Server(AuditMiddleware(answering(body)), environ())
    with pytest.raises(OSError, match="cannot close"):
        server.finish()

    assert server.body == [b"a"]
    assert body.closed == 1
    assert (entries[1]["event"], entries[1]["data"]["status"]) == ("Fail", 200)


def test_what_is_learned_when_the_body_is_closed_is_in_the_outcome(entries: Any) -> None:
    """Frameworks end a request's context there."""

    class Learning(Body):
        def close(self) -> None:
            current_operation().data["rows"] = 3

    Server(AuditMiddleware(answering(Learning([b"a"]))), environ()).finish()

    assert entries[1]["data"]["rows"] == 3


def test_a_head_whose_body_is_not_read_is_complete(entries: Any) -> None:
    """No body is due, so that none was read says nothing about the client."""
    Server(AuditMiddleware(answering([b"ab"])), environ("HEAD")).response.close()

    assert kinds(entries) == ["Begin", "Complete"]


def test_an_application_that_answers_nothing_has_failed(entries: Any) -> None:
    """It never called start_response; or it returned no body at all."""
    Server(AuditMiddleware(lambda environ, start_response: []), environ()).finish()
    with pytest.raises(TypeError):
        Server(AuditMiddleware(answering(None)), environ()).finish()

    assert kinds(entries) == ["Begin", "Fail"] * 2


def test_an_outcome_that_is_unusable_comes_with_what_the_begin_said(entries: Any) -> None:
    """What the application made unusable is left out, and the response stays."""

    def app(environ: Any, start_response: Start) -> list[bytes]:
        current_operation().action = ""
        return answering([b"x"])(environ, start_response)  # type: ignore[no-any-return]

    assert request(app).body == [b"x"]

    assert kinds(entries) == ["Begin", "Complete"]
    assert entries[1]["action"] == entries[0]["action"]
    assert "action" in entries[1]["data"]["unusable"]


# start_response


def failing_late(environ: Any, start_response: Start) -> Iterator[bytes]:
    start_response("200 OK", TEXT)
    if environ["PATH_INFO"] == "/sent":
        yield b"a"
    try:
        raise LookupError("no order")
    except LookupError:
        start_response("500 Internal Server Error", TEXT, sys.exc_info())
    yield b"sorry"


@pytest.mark.parametrize("durable", [False, True])
def test_an_error_page_takes_the_place_of_what_has_not_left(durable: bool, entries: Any) -> None:
    """The status on record is that which left."""

    def app(environ: Any, start_response: Start) -> Iterable[bytes]:
        current_operation().durable = durable
        return failing_late(environ, start_response)

    answer = request(app)

    assert (answer.status, answer.body) == ("500 Internal Server Error", [b"sorry"])
    assert (entries[1]["event"], entries[1]["data"]["status"]) == ("Fail", 500)


def test_an_error_page_comes_too_late_for_what_has_left(entries: Any) -> None:
    """The server raises the application's exception; the status on record is that which left."""
    with pytest.raises(LookupError):
        Server(AuditMiddleware(failing_late), environ(path="/sent")).finish()

    assert (entries[1]["event"], entries[1]["data"]["status"]) == ("Fail", 200)


@pytest.mark.parametrize("durable", [False, True])
def test_a_second_start_without_exc_info_is_a_mistake(durable: bool, entries: Any) -> None:
    """As it is without the middleware."""

    def app(environ: Any, start_response: Start) -> list[bytes]:
        current_operation().durable = durable
        start_response("200 OK", TEXT)
        start_response("200 OK", TEXT)
        return []

    with pytest.raises(AssertionError):
        Server(AuditMiddleware(app), environ()).finish()
    assert kinds(entries) == ["Begin", "Fail"]


STEPS = st.lists(
    st.one_of(
        st.sampled_from(["start", "restart", "raise"]),
        st.tuples(st.sampled_from(["write", "yield"]), st.sampled_from([b"", b"a", b"bc"])),
    ),
    max_size=6,
)


def scripted(steps: list[Any], is_generator: bool, closed: list[str]) -> Any:
    """Return an application that does what a script says: before it returns, or in its body."""

    def run(start_response: Start) -> Iterator[bytes]:
        write = None
        try:
            for number, step in enumerate(steps):
                if step == "start":
                    write = start_response(f"20{number} OK", TEXT)
                elif step == "restart":
                    try:
                        raise LookupError(number)
                    except LookupError:
                        write = start_response(f"50{number} Error", TEXT, sys.exc_info())
                elif step == "raise":
                    raise ZeroDivisionError
                elif step[0] == "yield":
                    yield step[1]
                elif write is not None:
                    write(step[1])
        finally:
            closed.append("closed")

    def app(environ: Any, start_response: Start) -> Iterable[bytes]:
        return run(start_response) if is_generator else list(run(start_response))

    return app


def seen_by_client(app: Any, read: int) -> tuple[Any, ...]:
    """Serve a request, reading so many parts of the response at most; tell all that happened."""
    server, error = None, None
    try:
        server = Server.__new__(Server)
        server.__init__(app, environ())  # type: ignore[misc]
        parts = iter(server.response)
        try:
            for part in itertools.islice(parts, read):
                server.send(part)
        finally:
            getattr(server.response, "close", lambda: None)()
    except Exception as raised:
        error = type(raised)
    return server.status, b"".join(server.body), error


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, is_generator=st.booleans(), read=st.integers(0, 7))
def test_a_client_sees_what_it_would_see_without_auditing(
    steps: list[Any], is_generator: bool, read: int
) -> None:
    """Whatever the application does and however much is read; and there is one outcome."""
    closed: list[str] = []
    app = scripted(steps, is_generator, closed)
    plain = seen_by_client(app, read)
    count = len(closed)
    with capture_audit() as entries:
        audited = seen_by_client(AuditMiddleware(app), read)

    assert audited == plain
    assert len(closed) == 2 * count
    assert kinds(entries)[0] == "Begin"
    assert len(entries) == 2
    assert not audit_fields()


# outcomes that are waited for


def durable(environ: Any, start_response: Start) -> list[bytes]:
    current_operation().durable = True
    start_response("200 OK", TEXT)
    return [b"paid"]


def test_a_durable_outcome_is_on_record_before_anything_leaves(entries: Any) -> None:
    """The server hears of no status before."""
    server = Server(AuditMiddleware(durable), environ())
    assert not server.status
    assert next(iter(server.response)) == b"paid"

    assert server.status == "200 OK"
    assert kinds(entries) == ["Begin", "Complete"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_durable_outcome_that_fails_is_answered_by_503(method: str) -> None:
    """The answer does not claim that nothing was done, and nothing of the application's leaves."""
    with capture_audit(FailingSink(lambda number: number == 2)):
        answer = request(durable, method)

    assert answer.status == "503 Service Unavailable"
    text = b"".join(answer.body)
    assert b"paid" not in text
    assert (b"may have been carried out" in text) is (method == "GET")


def streaming(environ: Any, start_response: Start) -> Iterator[bytes]:
    current_operation().durable = True
    start_response("200 OK", TEXT)
    yield b"a"
    yield b"b"


def writing_durably(environ: Any, start_response: Start) -> list[bytes]:
    current_operation().durable = True
    return writing(environ, start_response)


@pytest.mark.parametrize("app", [streaming, writing_durably])
def test_the_last_part_does_not_leave_without_its_durable_outcome(app: Any) -> None:
    """What has left cannot be taken back; the response breaks off."""
    sink = FailingSink(lambda number: number > 1)
    with capture_audit(sink):
        server = Server(AuditMiddleware(app), environ())
        with pytest.raises(AuditWriteError):
            server.finish()

    assert server.body == [b"a"]


def test_an_error_page_replaces_what_was_kept_back(entries: Any) -> None:
    """No part of the response that failed stands before it."""

    def app(environ: Any, start_response: Start) -> Iterator[bytes]:
        current_operation().durable = True
        return failing_late(environ, start_response)

    server = Server(AuditMiddleware(app), environ(path="/sent")).finish()

    assert (server.status, server.body) == ("500 Internal Server Error", [b"sorry"])
    assert entries[1]["event"] == "Fail"


def test_a_durable_outcome_is_asked_for_too_late_to_answer_503() -> None:
    """The server was told the status already, so that the response breaks off."""

    def app(environ: Any, start_response: Start) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        current_operation().durable = True
        yield b"a"

    with capture_audit(FailingSink(lambda number: number > 1)):
        server = Server(AuditMiddleware(app), environ())
        with pytest.raises(AuditError):
            server.finish()
    assert not server.body


# what is bound


def bound_body(seen: list[Any]) -> Any:
    def app(environ: Any, start_response: Start) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        bind_audit_context(user_id=environ["PATH_INFO"])
        try:
            for _ in range(3):
                fields = audit_fields()
                seen.append((fields["user_id"], fields["client_ip"]))
                yield b"x"
        finally:
            seen.append((audit_fields()["user_id"], current_operation().receipt is not None))

    return app


@pytest.mark.parametrize(
    "exclude", [(), [Exclude(kind="health", when=lambda asked: True, reason="test")]]
)
def test_who_asks_is_bound_at_each_step_and_gone_between_them(exclude: Any, entries: Any) -> None:
    """Two responses that one thread reads in turns do not mix, nor do they leave anything."""
    bind_audit_context(user_id="before")
    seen: list[Any] = []
    app = AuditMiddleware(bound_body(seen), exclude=exclude)
    one = app(environ(path="/1", REMOTE_ADDR="192.0.2.1"), lambda *_: None)
    two = app(environ(path="/2", REMOTE_ADDR="192.0.2.2"), lambda *_: None)
    for iterator in (iter(one), iter(two), iter(one)):
        next(iterator)
        assert audit_fields() == {"user_id": "before"}
        assert current_operation().receipt is None
    two.close()  # type: ignore[attr-defined]
    one.close()  # type: ignore[attr-defined]

    audited = not exclude
    assert seen == [
        ("/1", "192.0.2.1"), ("/2", "192.0.2.2"), ("/1", "192.0.2.1"),
        ("/2", audited), ("/1", audited),
    ]  # fmt: skip
    assert audit_fields() == {"user_id": "before"}


def test_a_response_may_be_read_and_closed_in_other_threads(entries: Any) -> None:
    """What is bound goes along, and the thread that began keeps nothing."""
    seen: list[Any] = []
    response = AuditMiddleware(bound_body(seen))(environ(), lambda *_: None)
    for step in (lambda: next(iter(response)), response.close):  # type: ignore[attr-defined]
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()

    assert seen == [("/orders", "127.0.0.1"), ("/orders", True)]
    assert kinds(entries) == ["Begin", "Abandon"]
    assert not audit_fields()


def test_nothing_stays_bound_when_the_application_raises(entries: Any) -> None:
    """A thread that is used again does not begin with what another request bound."""

    def app(environ: Any, start_response: Start) -> list[bytes]:
        bind_audit_context(user_id="7")
        raise LookupError

    with pytest.raises(LookupError):
        request(app)
    assert not audit_fields()
    assert current_operation().receipt is None


def test_entries_of_the_application_carry_who_asks(entries: Any) -> None:
    """Also those recorded while the body is read."""

    def app(environ: Any, start_response: Start) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        audit_log.info(action="OrderRead")
        yield b""

    request(app)

    assert len({entry["requestId"] for entry in entries}) == 1
    assert [entry["action"] for entry in entries][1] == "OrderRead"


# what the environ says


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"PATH_INFO": "/caf\u00c3\u00a9"}, "/café"),
        ({"PATH_INFO": "/\u00ff"}, "/\ufffd"),
        ({"PATH_INFO": "/\u20ac"}, "/?"),
        ({"PATH_INFO": ""}, "/"),
        ({"PATH_INFO": "/orders", "SCRIPT_NAME": "/shop"}, "/shop/orders"),
        ({"PATH_INFO": "", "SCRIPT_NAME": "/shop"}, "/shop"),
    ],
)
def test_a_path_is_what_the_client_asked_for(given: Any, path: str, entries: Any) -> None:
    """UTF-8 that servers decode as latin-1; what is no UTF-8 does no harm."""
    Server(AuditMiddleware(answering([])), {**environ(), **given}).finish()

    assert entries[0]["data"]["path"] == path


@pytest.mark.parametrize("peer", [None, "", "unix:"])
def test_a_peer_without_an_address_is_left_out(peer: str | None, entries: Any) -> None:
    """Behind a Unix socket there is none."""
    made = environ()
    made.pop("REMOTE_ADDR", None)
    if peer is not None:
        made["REMOTE_ADDR"] = peer
    Server(AuditMiddleware(answering([])), made).finish()

    assert "clientIpAddress" not in entries[0]
    assert "remoteAddress" not in entries[0]


def test_a_header_counts_only_behind_a_trusted_proxy(entries: Any) -> None:
    """What it said is on record in any case."""
    made = environ(HTTP_X_FORWARDED_FOR="203.0.113.9", HTTP_X_REQUEST_ID="r-1")
    Server(AuditMiddleware(answering([])), made).finish()
    Server(AuditMiddleware(answering([]), trusted_proxies=["127.0.0.0/8"]), made).finish()

    found = [(e["clientIpAddress"], e["forwardedFor"], e["requestId"]) for e in entries[::2]]
    assert found == [("127.0.0.1", "203.0.113.9", "r-1"), ("203.0.113.9", "203.0.113.9", "r-1")]


def test_what_the_application_learns_is_in_the_outcome(entries: Any) -> None:
    """An authentication within puts it into the environ; a better name is kept."""

    def app(environ: Any, start_response: Start) -> list[bytes]:
        environ["REMOTE_USER"] = "2780"
        current_operation().action = "OrderCancel"
        start_response("200 OK", TEXT)
        return []

    request(app, user=lambda environ: environ.get("REMOTE_USER"))

    assert "userId" not in entries[0]
    assert (entries[1]["userId"], entries[1]["action"]) == ("2780", "OrderCancel")


# exclusions


def test_an_excluded_request_is_handed_on_as_it_is(entries: Any) -> None:
    """Lists and the server's own way to send files are not wrapped; other requests are audited."""
    exclude = [Exclude(kind="health", path="/healthz", reason="probe")]
    for body in ([b"ok"], (b"ok",), FileWrapper(open(__file__, "rb"))):  # noqa: SIM115
        app = AuditMiddleware(answering(body), exclude=exclude)
        made = {**environ(path="/healthz"), "wsgi.file_wrapper": FileWrapper}
        assert app(made, lambda *_: None) is body
    body.close()  # type: ignore[union-attr]
    assert not entries

    request(answering([]), exclude=exclude)
    assert kinds(entries) == ["Begin", "Complete"]


def test_the_body_of_an_excluded_request_is_closed_once(entries: Any) -> None:
    """Also by a server that closes twice."""
    body = Body([b"ok"])
    exclude = [Exclude(kind="health", when=lambda asked: True, reason="probe")]
    server = Server(AuditMiddleware(answering(body), exclude=exclude), environ()).finish()
    server.response.close()

    assert (server.body, body.closed) == ([b"ok"], 1)


def test_a_function_of_the_application_that_raises_costs_nothing(
    entries: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The request is audited without what it should have told."""

    def broken(environ: Any) -> str:
        raise LookupError

    with caplog.at_level(logging.ERROR, "structlog_audit"):
        request(answering([]), user=broken, action=broken)

    assert kinds(entries) == ["Begin", "Complete"]
    assert "the function for user, " in caplog.text
