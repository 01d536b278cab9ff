"""Whatever a server does: confirmed, or the call raises within its deadline; nothing in between."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from servers import scripted
from servers.processes import NOBODY
from servers.scripted import ScriptedServer, Step, accepted

from structlog_audit import AuditError, AuditHandler, AuditWriteError, HttpSink, SeqSink
from structlog_audit.sinks._exchange import Answer, NoAnswer

MakeHandler = Callable[..., AuditHandler]


@pytest.fixture
def make_handler() -> Iterator[MakeHandler]:
    """Make handlers that do not wait at the end for a server that is gone."""
    made: list[AuditHandler] = []

    def make(sink: HttpSink) -> AuditHandler:
        made.append(AuditHandler(sink))
        return made[-1]

    yield make
    for handler in made:
        handler.sink.timeout = 0.05  # type: ignore[attr-defined]
        with contextlib.suppress(AuditError):
            handler.close()


SECRET = "hunter2-the-key"
SHORT = 0.6
"""Seconds of the deadline where a server never confirms."""


def call(make_handler: MakeHandler, url: str, timeout: float = SHORT, **entry: Any) -> Any:
    """Record an entry at a server like Seq; return the receipt or the error."""
    sink = SeqSink(url, api_key=SECRET, timeout=timeout)
    handler = make_handler(sink)
    answer: Any
    try:
        answer = handler.record({"action": "A", **entry})
    except AuditError as error:
        answer = error
    assert SECRET not in str(answer) + repr(answer) + repr(sink)
    return answer


def identities(requests: Sequence[scripted.Request]) -> list[tuple[str, int]]:
    """Return session and sequence of each event in the requests."""
    events = [json.loads(line) for request in requests for line in request.body.splitlines()]
    return [(event["AuditSession"], event["SequenceNumber"]) for event in events]


SOON = datetime.now(timezone.utc) - timedelta(hours=1)  # a date that is over: at once
RECOVERIES: dict[str, list[Step]] = {
    "busy": [scripted.error(503), accepted()],
    "error": [scripted.error(500), scripted.error(502), accepted()],
    "too many": [scripted.too_many(), accepted()],
    "too many, wait": [scripted.too_many(0), accepted()],
    "too many, until": [scripted.too_many(SOON), accepted()],
    "reset at once": [scripted.reset_before_reading(), accepted()],
    "reset in the body": [scripted.reset_mid_body(5), accepted()],
    "reset after it": [scripted.reset_after_reading(), accepted()],
    "closed after it": [scripted.close_after_reading(), accepted()],
    "stored, then reset": [scripted.storing(scripted.reset_after_reading()), accepted()],
    "stored, then closed": [scripted.storing(scripted.close_after_reading()), accepted()],
    "stored, then 500": [scripted.storing(scripted.error(500)), accepted()],
    "garbage": [scripted.garbage(), accepted()],
    "truncated": [scripted.truncated_body(), accepted()],
    "broken chunk": [scripted.broken_chunk(), accepted()],
    "reset on connect": [scripted.on_connect_reset(), accepted()],
}


@pytest.mark.parametrize("case", RECOVERIES)
def test_what_may_work_the_next_time_is_sent_again(case: str, make_handler: MakeHandler) -> None:
    """The same bytes, with the same identity; the call returns when they are confirmed."""
    with ScriptedServer(RECOVERIES[case]) as server:
        receipt = call(make_handler, server.url, 10.0)

        assert not isinstance(receipt, AuditError)
        assert len(set(server.stored)) == 1
        assert identities(server.requests[-1:]) == [(receipt.session, 1), (receipt.session, 2)]
        assert len({request.body for request in server.requests}) == 1
        keys = {request.headers["idempotency-key"] for request in server.requests}
        assert keys == {f"{receipt.session}-1-2-{receipt.hash[:16]}"}


FINAL: dict[str, tuple[Step, str, str]] = {
    "no key": (scripted.error(401), "no", r"answers 401.*AUDIT_SERVER_API_KEY"),
    "wrong key": (scripted.error(403), "no", r"answers 403.*key is wrong"),
    "not like Seq": (scripted.answer(404), "no", r"answers 404.*check the URL"),
    "no post": (scripted.answer(405), "no", r"answers 405"),
    "redirect": (scripted.redirect("http://127.0.0.1:1/"), "unknown", "redirect, which is not"),
    "moved": (scripted.redirect("http://127.0.0.1:1/", 308), "unknown", "redirect, which is not"),
    "a page": (scripted.html(200), "unknown", "answers 200"),
    "a page, 201": (scripted.html(201), "unknown", "not as Seq does"),
    "truncated JSON": (scripted.truncated_json(), "unknown", "not as Seq does"),
    "an empty answer": (scripted.answer(201), "unknown", "not as Seq does"),
    "half an answer": (scripted.status_line_only(), "unknown", "not as Seq does"),
    "a list": (scripted.answer(201, b"[]"), "unknown", "not as Seq does"),
    "100 MB": (scripted.stream(), "unknown", "not as Seq does"),
    "a level": (accepted("Warning"), "unknown", "minimum level, which drops audit entries"),
    "no content": (scripted.answer(204), "unknown", "answers 204"),
    "refused": (scripted.error(400, "bad"), "no", "refuses the entry with 400"),
    "too large": (scripted.error(413), "no", "refuses the entry with 413"),
    "long pause": (scripted.too_many(60), "no", r"answers 429; no confirmation within"),
    "long pause, 503": (scripted.too_many(60, 503), "unknown", r"answers 503; no confirmation"),
}


@pytest.mark.parametrize("case", FINAL)
def test_what_would_be_the_same_again_ends_the_call_at_once(
    case: str, make_handler: MakeHandler
) -> None:
    """One request (Seq's older page is asked after a 404); the message says what to do."""
    step, persisted, words = FINAL[case]
    with ScriptedServer([step]) as server:
        error = call(make_handler, server.url, 30.0)

        assert isinstance(error, AuditWriteError), error
        assert error.persisted == persisted
        assert re.search(words, str(error)), error
        assert len(server.requests) <= 2


def test_an_entry_that_is_refused_in_a_batch_of_two_is_found(make_handler: MakeHandler) -> None:
    """The session's Begin was in the same request; it is sent alone, then the culprit alone."""
    refuse, accept = scripted.error(400, "bad"), accepted()
    with ScriptedServer([refuse, accept, refuse, accept]) as server:
        handler = make_handler(SeqSink(server.url, timeout=10.0))
        with pytest.raises(AuditWriteError, match="refuses the entry with 400"):
            handler.record({"action": "Bad"})
        receipt = handler.record({"action": "Good"})

        stored = [json.loads(line) for body in server.stored for line in body.splitlines()]
        assert stored[0]["Action"] == "AuditSession"
        assert stored[-1]["Action"] == "Good"
        assert stored[-1]["SequenceNumber"] == receipt.sequence
        assert "Bad" not in {event["Action"] for event in stored}


NEVER: dict[str, tuple[Step, str]] = {
    "no answer": (scripted.never_answer(), "unknown"),
    "not read": (scripted.never_read(), "unknown"),
    "late": (scripted.after(30, accepted()), "unknown"),
    "dripped header": (scripted.drip_header(0.05), "unknown"),
    "dripped body": (scripted.drip_body(0.05), "unknown"),
    "silence on connect": (scripted.on_connect_silence(), "unknown"),
    "always 500": (scripted.error(500), "unknown"),
    "always 429": (scripted.too_many(), "no"),
    "always garbage": (scripted.garbage(), "unknown"),
    "always reset": (scripted.reset_after_reading(), "unknown"),
    "always reset early": (scripted.reset_before_reading(), "unknown"),
    "reset on connect": (scripted.on_connect_reset(), "no"),
}


@pytest.mark.parametrize("case", NEVER)
def test_who_is_never_confirmed_raises_within_the_deadline(
    case: str, make_handler: MakeHandler, exchanges: list[Answer | NoAnswer]
) -> None:
    """It would hang here otherwise; the fate is said as it is known."""
    step, persisted = NEVER[case]
    with ScriptedServer([step]) as server:
        error = call(make_handler, server.url)

        assert isinstance(error, AuditWriteError), error
        assert "no confirmation within 0.6 s" in str(error)
        # the last request, or all of them, may have had no time to be sent, or to be answered
        sent = any(isinstance(each, NoAnswer) and each.sent for each in exchanges)
        answered = any(isinstance(each, Answer) for each in exchanges)
        assert error.persisted == ("unknown" if sent else persisted if answered else "no")


def in_vain(make_handler: MakeHandler, url: str) -> AuditError:
    """Record at a server that nothing can be sent to; return the error.

    It tells of the last attempt, which may have begun just before the end: then again.
    """
    for _ in range(5):
        error = call(make_handler, url)
        assert error.persisted == "no"
        if "no answer in time" not in str(error):
            return error
    raise AssertionError(error)


def test_a_server_that_is_not_there_is_tried_until_the_deadline(make_handler: MakeHandler) -> None:
    """Nothing was sent, so nothing is stored."""
    error = in_vain(make_handler, f"http://127.0.0.1:{NOBODY}")

    assert "refused; no confirmation within 0.6 s" in str(error)
    assert "is the server running" in str(error)


def test_a_name_that_does_not_exist_is_told_of(make_handler: MakeHandler) -> None:
    """A typo in the URL."""
    error = in_vain(make_handler, "https://audit.invalid")

    assert "cannot be looked up" in str(error)


def test_a_fate_that_was_once_unknown_stays_unknown(make_handler: MakeHandler) -> None:
    """The first attempt may have been stored; that the second one was refused changes nothing."""
    steps = [scripted.storing(scripted.reset_after_reading()), scripted.error(401)]
    with ScriptedServer(steps) as server:
        error = call(make_handler, server.url, 10.0)

    assert error.persisted == "unknown"


def test_a_connection_that_was_closed_meanwhile_is_one_silent_repetition(
    make_handler: MakeHandler,
) -> None:
    """Both ends agreed to keep it, and the server closed it without a word."""
    with ScriptedServer([scripted.then_close(accepted()), accepted()]) as server:
        handler = make_handler(SeqSink(server.url, timeout=10.0))
        for _ in range(3):
            handler.record({"action": "A"})

        assert server.connections == 2
        assert len(server.stored) == 3


def test_calls_share_one_connection(make_handler: MakeHandler) -> None:
    """It is kept between them."""
    with ScriptedServer([accepted()]) as server:
        handler = make_handler(SeqSink(server.url))
        for _ in range(10):
            handler.record({"action": "A"})

        assert server.connections == 1


def test_an_older_server_gets_its_own_page(make_handler: MakeHandler) -> None:
    """Before 2024 Seq had no page for CLEF; it is found once."""
    with ScriptedServer([scripted.answer(404), accepted()]) as server:
        handler = make_handler(SeqSink(f"{server.url}/seq/"))
        handler.record({"action": "A"})
        handler.record({"action": "B"})

        pages = [request.line.split()[1] for request in server.requests]
        raw = "/seq/api/events/raw?clef"
        assert pages == ["/seq/ingest/clef", raw, raw]


def test_what_is_sent_to_seq(make_handler: MakeHandler) -> None:
    """Method, page, key and content type as its documentation has them."""
    with ScriptedServer([accepted()]) as server:
        call(make_handler, server.url)
        (request,) = server.requests

    assert request.line == "POST /ingest/clef HTTP/1.1"
    assert request.headers["x-seq-apikey"] == SECRET
    assert request.headers["content-type"] == "application/vnd.serilog.clef"
    assert request.headers["content-length"] == str(len(request.body))
    assert request.body.endswith(b"}\n")


def test_what_is_sent_to_another_server(make_handler: MakeHandler) -> None:
    """Our lines, byte for byte, as the file would have them."""
    with ScriptedServer([scripted.storing(scripted.answer(204))]) as server:
        handler = make_handler(
            HttpSink(server.url + "/in?x=1", api_key=SECRET, headers={"X-Scope": "audit"})
        )
        receipt = handler.record({"action": "A"})
        (request,) = server.requests
        assert repr(handler.sink) == f"HttpSink('{server.url}/in')"

    assert request.line == "POST /in?x=1 HTTP/1.1"
    assert request.headers["authorization"] == f"Bearer {SECRET}"
    assert request.headers["x-scope"] == "audit"
    assert request.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in request.body.splitlines()]
    assert [(line["session"], line["sequence"]) for line in lines] == [
        (receipt.session, 1),
        (receipt.session, 2),
    ]


def test_what_is_sent_is_compressed_when_asked_for(make_handler: MakeHandler) -> None:
    """A repetition has the same bytes."""
    with ScriptedServer([scripted.error(503), accepted()]) as server:
        handler = make_handler(HttpSink(server.url, compress=True))
        handler.record({"action": "A"})

    first, second = server.requests[:2]
    assert first.headers["content-encoding"] == "gzip"
    assert first.body == second.body
    assert [json.loads(line)["sequence"] for line in gzip.decompress(first.body).splitlines()]


def test_the_status_codes_that_confirm_are_the_callers(make_handler: MakeHandler) -> None:
    """And so is what its body has to say."""

    def accept(body: bytes) -> str | None:
        return None if b"flushed" in body else "it was not flushed"

    with ScriptedServer([scripted.answer(202, b"queued"), scripted.answer(202, b"flushed")]) as s:
        handler = make_handler(HttpSink(s.url, confirm=[202], accept=accept))
        with pytest.raises(AuditWriteError, match="it was not flushed"):
            handler.record({"action": "A"})
        handler.record({"action": "A"})

    with (
        ScriptedServer([scripted.answer(200)]) as server,
        pytest.raises(AuditWriteError, match="answers 200"),
    ):
        make_handler(HttpSink(server.url, confirm=[201])).record({"action": "A"})


def test_a_conflict_confirms_only_with_the_same_identity(make_handler: MakeHandler) -> None:
    """A server that recognises a repetition says which entry it has."""

    def conflict(exchange: scripted.Exchange) -> None:
        last = json.loads(exchange.read().body.splitlines()[-1])
        body = json.dumps({"session": last["session"], "sequence": last["sequence"]}).encode()
        exchange.send(scripted.response(409, body))

    other = scripted.answer(409, b'{"session":"x","sequence":1}')
    with ScriptedServer([conflict, other, scripted.answer(409, b"no")]) as server:
        handler = make_handler(HttpSink(server.url, confirm=[200, 409]))
        handler.record({"action": "A"})
        for _ in range(2):
            with pytest.raises(AuditWriteError, match="409 for something else"):
                handler.record({"action": "A"})


def test_a_proxy_of_the_environment_is_used_only_when_asked_for(
    make_handler: MakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables that some tool set must not decide where entries and keys go."""
    with ScriptedServer([accepted()]) as proxy, ScriptedServer([accepted()]) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        make_handler(SeqSink(server.url)).record({"action": "A"})
        assert (len(server.requests), len(proxy.requests)) == (1, 0)

        target = "http://localhost:1"
        make_handler(SeqSink(target, environment_proxies=True)).record({"action": "A"})
        assert proxy.requests[0].line == f"POST {target}/ingest/clef HTTP/1.1"


def test_a_netrc_gives_no_password_away(
    make_handler: MakeHandler, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """What some tool keeps for a host is not ours to send."""
    (tmp_path / "netrc").write_text("default login ada password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with ScriptedServer([accepted()]) as server:
        make_handler(SeqSink(server.url)).record({"action": "A"})

        assert "authorization" not in server.requests[0].headers


def test_callers_of_the_last_post_return_while_the_next_one_waits(
    make_handler: MakeHandler,
) -> None:
    """The sink tells when it only waits for an answer."""
    sink = SeqSink("http://127.0.0.1:1")
    told: list[int] = []
    with ScriptedServer([accepted()]) as server:
        sink = SeqSink(server.url)
        handler = make_handler(sink)
        sent = sink.on_sent
        assert sent is not None

        def tell() -> None:
            told.append(len(server.requests))
            sent()

        sink.on_sent = tell
        handler.record({"action": "A"})
        handler.record({"action": "B"})

    assert len(told) == 2


def test_a_loopback_address_is_found_whatever_it_resolves_to(make_handler: MakeHandler) -> None:
    """`localhost` may be ::1 first, where nobody listens."""
    with ScriptedServer([accepted()]) as server:
        make_handler(SeqSink(f"http://localhost:{server.port}")).record({"action": "A"})

        assert len(server.stored) == 1
