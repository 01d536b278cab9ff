"""The mode that records requests in full: on the host's word, loudly, and without secrets."""

from __future__ import annotations

import gc
from datetime import datetime, timedelta, timezone
from typing import Any

import orjson
import pytest

from structlog_audit import AuditConfigurationError, Settings, doctor
from structlog_audit.testing import FailingSink, capture_audit
from structlog_audit.web._verbose import LIMIT, Transcript, Verbosity

VERBOSE = "verbose_including_cid"
HEADERS = [
    ("authorization", "Bearer hunter2"), ("cookie", "sid=hunter2"), ("x-api-key", "hunter2"),
    ("proxy-authorization", "Basic hunter2"), ("accept", "*/*"), ("x-a", "1"), ("x-a", "2"),
]  # fmt: skip


def transcript(kind: str, body: bytes, *chunks: bytes) -> dict[str, Any]:
    """Return what is kept of a request with such a body."""
    kept = Transcript("POST /x", [*HEADERS, ("content-type", kind)], "token=hunter2&a=1&a=2")
    for chunk in (body, *chunks):
        kept.receive(chunk)
    data: dict[str, Any] = orjson.loads(orjson.dumps(kept.data()))
    return data


def test_keys_and_cookies_are_redacted_even_then() -> None:
    """In headers of both sides, in the query, in forms and in JSON."""
    kept = Transcript("POST /x", [*HEADERS, ("content-type", "application/json")], "token=hunter2")
    kept.receive(b'{"password": "hunter2", "deep": [{"apiKey": "hunter2", "b": 1}]}')
    kept.start(
        200, [("set-cookie", "sid=hunter2"), ("content-type", "application/x-www-form-urlencoded")]
    )
    kept.send(b"access_token=hunter2&c=3")
    text = orjson.dumps(kept.data()).decode()

    assert "hunter2" not in text
    data = kept.data()
    assert data["request"]["headers"]["x-a"] == ["1", "2"]
    assert data["request"]["body"]["deep"][0]["b"] == 1
    assert data["response"]["body"]["c"] == "3"
    assert data["response"]["status"] == 200


@pytest.mark.parametrize(
    ("kind", "body", "what"),
    [
        ("application/json", b'{"password": "hunter2"' + b" " * LIMIT, "cut"),
        ("application/json", b'{"password": hunter2', "no json"),
        ("multipart/form-data; boundary=x", b"--x\r\nhunter2", "bytes"),
        ("application/x-www-form-urlencoded", b"password=hunter2&" + b"a" * LIMIT, "cut"),
        ("", b"hunter2", "bytes"),
    ],
)
def test_a_body_in_which_nothing_can_be_redacted_is_not_kept(
    kind: str, body: bytes, what: str
) -> None:
    """Its size and hash are."""
    data = transcript(kind, body)

    assert data["request"]["body"]["$audit"] == what
    assert data["request"]["body"]["bytes"] == len(body)
    assert len(data["request"]["body"]["sha256"]) == 64
    assert "hunter2" not in str(data)


def test_a_long_text_is_cut_with_a_mark() -> None:
    """However it comes."""
    data = transcript("text/plain; charset=utf-8", b"a" * LIMIT, b"b" * 10)

    assert data["request"]["body"]["$audit"] == "cut"
    assert data["request"]["body"]["begin"] == "a" * LIMIT
    assert data["request"]["body"]["bytes"] == LIMIT + 10


def test_no_body_is_none() -> None:
    """Neither of the request nor of a response that never came."""
    data = Transcript("GET /x", [], "").data()

    assert data == {"request": {"line": "GET /x", "headers": {}}, "response": {}}


def test_the_host_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code may not raise what the environment has said."""
    monkeypatch.setenv("AUDIT_LOG_MODE", "basic")
    with pytest.raises(AuditConfigurationError, match="the environment names a mode"):
        Verbosity("verbose_including_cid")
    assert not Verbosity().is_active
    assert not Verbosity("basic").is_active


def test_code_decides_where_the_host_says_nothing() -> None:
    """And nothing said is basic."""
    assert Verbosity("verbose_including_cid").is_active
    assert not Verbosity().is_active
    with pytest.raises(AuditConfigurationError, match="mode is one of"):
        Verbosity("loud")  # type: ignore[arg-type]


@pytest.mark.parametrize(("hours", "active"), [(1, True), (-1, False)])
def test_it_ends_by_itself(hours: int, active: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is basic again."""
    until = datetime.now(timezone.utc) + timedelta(hours=hours)
    monkeypatch.setenv("AUDIT_LOG_MODE", VERBOSE)
    monkeypatch.setenv("AUDIT_LOG_VERBOSE_UNTIL", until.isoformat().replace("+00:00", "Z"))

    assert Verbosity().is_active is active


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AUDIT_LOG_VERBOSE_UNTIL": "2026-11-25T18:00:00Z"}, "is the end of"),
        ({"AUDIT_LOG_MODE": VERBOSE, "AUDIT_LOG_VERBOSE_UNTIL": "tomorrow"}, "must be a time"),
        ({"AUDIT_LOG_MODE": VERBOSE, "AUDIT_LOG_VERBOSE_UNTIL": "2026-11-25T18:00"}, "time zone"),
    ],
)
def test_an_end_that_is_none_is_refused(variables: dict[str, str], words: str) -> None:
    """It would never come."""
    with pytest.raises(AuditConfigurationError, match=words):
        Settings.from_environ(variables)


@pytest.mark.parametrize(
    ("until", "words"),
    [
        (None, "without an end"),
        ("2020-01-01T00:00:00Z", "is over since"),
        ("2999-01-01T00:00:00Z", "in full until"),
    ],
)
def test_the_report_has_a_line_for_it(
    until: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever left it on finds it there."""
    monkeypatch.setenv("AUDIT_LOG_DIR", "/dev/stdout")
    monkeypatch.setenv("AUDIT_LOG_MODE", VERBOSE)
    if until is not None:
        monkeypatch.setenv("AUDIT_LOG_VERBOSE_UNTIL", until)

    assert any(words in problem for problem in doctor.diagnose().problems)


def wsgi_exchange(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Send a form through a WSGI application in verbose mode; return the entries."""
    from io import BytesIO
    from wsgiref.util import setup_testing_defaults

    from structlog_audit.web.wsgi import AuditMiddleware

    monkeypatch.setenv("AUDIT_LOG_MODE", VERBOSE)

    def app(environ: Any, start_response: Any) -> list[bytes]:
        environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        start_response(
            "200 OK", [("Content-Type", "application/json"), ("Set-Cookie", "a=hunter2")]
        )
        return [b'{"token": "hunter2",', b'"ok": 1}']

    body = b"password=hunter2&name=ada"
    environ: dict[str, Any] = {
        "wsgi.input": BytesIO(body), "REQUEST_METHOD": "POST", "PATH_INFO": "/login",
        "CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": "application/x-www-form-urlencoded",
        "QUERY_STRING": "token=hunter2&x=1", "HTTP_AUTHORIZATION": "Bearer hunter2",
    }  # fmt: skip
    setup_testing_defaults(environ)
    with capture_audit() as entries:
        for _ in range(2):
            response = AuditMiddleware(app)(dict(environ), lambda *_: lambda part: None)
            assert b"".join(response)
            response.close()  # type: ignore[attr-defined]
    return entries


def test_a_request_is_in_the_outcome_in_full(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After an entry and a warning that say so."""
    announced, begin, outcome, *_ = wsgi_exchange(monkeypatch)

    assert announced["action"] == "AuditModeVerbose"
    assert "recorded in full" in caplog.text
    assert "request" not in begin["data"]
    assert outcome["data"]["request"]["body"]["name"] == "ada"
    assert outcome["data"]["request"]["query"]["x"] == "1"
    assert outcome["data"]["response"]["body"]["ok"] == 1
    assert "hunter2" not in str(outcome)


def test_an_asgi_request_is_in_the_outcome_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many parts as it comes, and the application streams all the same."""
    import asyncio

    from structlog_audit.web.asgi import AuditMiddleware

    monkeypatch.setenv("AUDIT_LOG_MODE", VERBOSE)
    sent: list[Any] = []
    parts = [b'{"password": "hunter2",', b'"name": "ada"}']

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        head = [(b"Content-Type", b"text/plain"), (b"Set-Cookie", b"a=hunter2")]
        await send({"type": "http.response.start", "status": 201, "headers": head})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        assert len(sent) == 2
        await send({"type": "http.response.body", "body": b"two"})

    async def receive() -> Any:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/login", "query_string": b"token=hunter2",
        "client": ("10.0.0.1", 1), "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    with capture_audit() as entries:
        asyncio.run(AuditMiddleware(app)(scope, receive, send))

    announced, begin, outcome = entries
    assert announced["action"] == "AuditModeVerbose"
    assert "request" not in begin["data"]
    assert outcome["data"]["request"]["body"]["name"] == "ada"
    assert outcome["data"]["response"]["body"] == "one two"
    assert outcome["data"]["response"]["status"] == 201
    assert "hunter2" not in str(outcome)


def test_a_request_is_refused_when_the_mode_cannot_be_announced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And announced with the next one that can be recorded."""
    import asyncio

    from structlog_audit.web.asgi import AuditMiddleware

    monkeypatch.setenv("AUDIT_LOG_MODE", VERBOSE)
    called: list[bool] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(True)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    middleware = AuditMiddleware(app)
    with capture_audit(FailingSink()):
        asyncio.run(middleware(scope, send, send))  # type: ignore[arg-type]
    gc.collect()  # the operation that did not begin complains of nothing
    assert not called
    assert sent[0]["status"] == 503
    with capture_audit() as entries:
        asyncio.run(middleware(scope, send, send))  # type: ignore[arg-type]
    assert entries[0]["action"] == "AuditModeVerbose"
    assert called


def test_a_mode_that_is_over_is_not_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is basic, as if it had never been set."""
    monkeypatch.setenv("AUDIT_LOG_MODE", VERBOSE)
    monkeypatch.setenv("AUDIT_LOG_VERBOSE_UNTIL", "2020-01-01T00:00:00Z")

    assert not Verbosity().is_due


def test_a_body_that_nobody_read_has_a_mark() -> None:
    """It is not that there was none."""
    kept = Transcript("POST /x", [("content-length", "12"), ("content-type", "text/plain")], "")

    assert kept.data()["request"]["body"] == {"$audit": "not read", "bytes": 12}


def test_the_announcement_is_nothing_that_a_client_did() -> None:
    """It bears no address and no request."""
    entry = Verbosity("verbose_including_cid").announcement()

    assert entry["client_ip"] is entry["request_id"] is entry["type"] is None
