"""Who the server is, and what of the key is seen: by wires, messages, reprs and tracebacks."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import scripted
from servers.certificates import Certificates, make_certificates
from servers.processes import SeqServer
from servers.scripted import ScriptedServer, accepted

from structlog_audit import (
    AuditConfigurationError,
    AuditHandler,
    AuditWriteError,
    HttpSink,
    SeqSink,
)

MakeHandler = Callable[..., AuditHandler]
SECRET = "hunter2-the-key"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tls(certificates: Certificates) -> Iterator[ScriptedServer]:
    """A server with a good certificate."""
    with ScriptedServer([accepted()], tls=certificates.good.server_context()) as server:
        yield server


def record(sink: HttpSink) -> Any:
    """Record one entry, and close while the server is still there."""
    handler = AuditHandler(sink)
    try:
        return handler.record({"action": "A"})
    finally:
        sink.timeout = 0.1
        handler.close()


def test_a_server_with_a_certificate_of_a_known_authority(
    tls: ScriptedServer, certificates: Certificates
) -> None:
    """Over TLS, with the authority that was named."""
    record(SeqSink(tls.url, ca=certificates.ca))

    assert tls.stored


@pytest.mark.parametrize(
    ("kind", "words", "hint"),
    [
        ("wrong_name", "certificate is not trusted: .*mismatch", "for another host"),
        ("expired", "certificate is not trusted: .*expired", "have it renewed"),
        ("foreign", "certificate is not trusted: ", "AUDIT_SERVER_CA"),
    ],
)
def test_a_server_that_cannot_prove_itself_gets_nothing(
    kind: str, words: str, hint: str, certificates: Certificates
) -> None:
    """Neither the entry nor the key; it is not tried again."""
    context = getattr(certificates, kind).server_context()
    with ScriptedServer([accepted()], tls=context) as server:
        sink = SeqSink(server.url, api_key=SECRET, ca=certificates.ca, timeout=10.0)

        with pytest.raises(AuditWriteError, match=words) as caught:
            record(sink)
        with pytest.raises(AuditConfigurationError, match=words):
            AuditHandler(sink).check()

    assert caught.value.persisted == "no"
    assert hint in str(caught.value)
    assert (server.requests, server.cut) == ([], [])


def test_a_self_signed_server_is_not_trusted_by_default(tls: ScriptedServer) -> None:
    """The usual authorities do not know it."""
    with pytest.raises(AuditWriteError, match="certificate is not trusted"):
        record(SeqSink(tls.url))


def test_a_named_authority_is_the_only_one(certificates: Certificates) -> None:
    """Others are not trusted beside it."""
    with (
        ScriptedServer([accepted()], tls=certificates.foreign.server_context()) as server,
        pytest.raises(AuditWriteError, match="certificate is not trusted"),
    ):
        record(SeqSink(server.url, ca=certificates.ca))


@pytest.mark.parametrize("kind", ["client", "foreign_client", None])
def test_a_server_that_wants_our_certificate(kind: str | None, certificates: Certificates) -> None:
    """It gets it, or refuses us."""
    context = certificates.good.server_context(certificates.ca)
    with ScriptedServer([accepted()], tls=context) as server:
        pair = getattr(certificates, kind) if kind else None
        sink = SeqSink(
            server.url, ca=certificates.ca, timeout=10 if kind == "client" else 0.5,
            client_cert=pair and pair.cert, client_key=pair and pair.private,
        )  # fmt: skip
        if kind == "client":
            record(sink)
        else:
            with pytest.raises(AuditWriteError):
                record(sink)

        assert bool(server.stored) == (kind == "client")


def test_a_server_that_stays_silent_in_the_handshake(certificates: Certificates) -> None:
    """The deadline holds there, too."""
    context = certificates.good.server_context()
    with (
        ScriptedServer([scripted.on_connect_silence()], tls=context) as server,
        pytest.raises(AuditWriteError, match="no answer in time") as caught,
    ):
        record(SeqSink(server.url, ca=certificates.ca, timeout=0.5))

    assert caught.value.persisted == "no"


@pytest.mark.parametrize("interval", [0.05])
def test_a_server_that_drips_over_tls(interval: float, certificates: Certificates) -> None:
    """Its bytes come inside records; the deadline of the whole exchange holds."""
    context = certificates.good.server_context()
    with (
        ScriptedServer([scripted.drip_header(interval)], tls=context) as server,
        pytest.raises(AuditWriteError, match="no answer in time") as caught,
    ):
        record(SeqSink(server.url, ca=certificates.ca, timeout=1.5))

    assert caught.value.persisted == "unknown"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://logs.example.com", "is not encrypted"),
        ("http://10.0.0.1:5341", "is not encrypted"),
        ("https://ada:hunter2@logs.example.com", "carries a key or a password"),
        ("https://logs.example.com/#hunter2", "carries a key or a password"),
        ("https://logs.example.com?apiKey=hunter2", "carries a key or a password"),
        ("logs.example.com", "looks like https://"),
        ("ftp://logs.example.com", "looks like https://"),
        ("https://", "looks like https://"),
        ("https://logs.example.com:99999", "looks like https://"),
        ("https://logs.example.com/a b", "looks like https://"),
        ("https://logs.example.com/\r\nX: y", "looks like https://"),
        (None, "looks like https://"),
        (b"https://logs.example.com", "looks like https://"),
    ],
)
def test_a_url_that_cannot_work_or_betrays_is_refused(url: Any, words: str) -> None:
    """When it is given, and without repeating what is secret in it."""
    with pytest.raises(AuditConfigurationError, match=words) as caught:
        SeqSink(url)

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://localhost:5341", "http://127.0.0.2", "http://[::1]:1"])
def test_this_machine_needs_no_encryption(url: str) -> None:
    """And neither does another one when that is accepted."""
    SeqSink(url)
    SeqSink("http://logs.example.com", allow_insecure=True)


@pytest.mark.parametrize("key", ["", "a b", "a\r\nX: y", "ä", 5, b"key"])
def test_a_key_that_no_header_can_carry_is_refused(key: Any) -> None:
    """When it is given; it is not shown."""
    with pytest.raises(AuditConfigurationError, match="the key is empty, or has characters"):
        SeqSink("http://localhost", api_key=key)


@pytest.mark.parametrize(
    "headers", [{"X Y": "z"}, {"X": "a\nb"}, {"X": "ä"}, {"": "x"}, {"X": 5}, {"a:b": "c"}]
)
def test_a_header_that_cannot_be_sent_is_refused(headers: Any) -> None:
    """When it is given."""
    with pytest.raises(AuditConfigurationError, match="header"):
        HttpSink("http://localhost", headers=headers)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "xml"},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"timeout": "5"},
        {"ca": "/nowhere/ca.pem"},
        {"client_cert": "/"},
        {"api_key": "a", "api_key_file": "/etc/hostname"},
        {"api_key_file": "/nowhere/key"},
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    """When they are given."""
    with pytest.raises(AuditConfigurationError):
        HttpSink("http://localhost", **options)


def test_a_key_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    """A secret store renews it; a file that is gone meanwhile fails the call, and says so."""
    file = tmp_path / "key"
    file.write_text("first\n")
    with ScriptedServer([accepted()]) as server:
        sink = SeqSink(server.url, api_key_file=file)
        handler = AuditHandler(sink)
        handler.record({"action": "A"})
        replacement = tmp_path / "new"
        replacement.write_text("second\n")
        os.replace(replacement, file)
        handler.record({"action": "B"})
        file.unlink()
        with pytest.raises(AuditWriteError, match="cannot be read: No such file") as caught:
            handler.record({"action": "C"})

        keys = [request.headers["x-seq-apikey"] for request in server.requests]
        assert keys == ["first", "second"]
        assert caught.value.persisted == "no"


def test_no_error_carries_the_key(certificates: Certificates) -> None:
    """Not in its text, its causes, or the variables of its traceback."""
    context = certificates.wrong_name.server_context()
    steps = [scripted.reset_after_reading(), scripted.error(403)]
    for script, options in (([accepted()], context), (steps, None)):
        with ScriptedServer(script, tls=options) as server:
            sink = SeqSink(server.url, api_key=SECRET, ca=certificates.ca, timeout=1.0)
            with pytest.raises(AuditWriteError) as caught:
                record(sink)
        error = caught.value
        shown = "".join(
            traceback.TracebackException.from_exception(error, capture_locals=True).format()
        )
        assert SECRET not in shown
        cause: BaseException | None = error
        while cause is not None:
            assert SECRET not in repr(vars(cause)) + str(cause)
            assert not hasattr(cause, "request")
            cause = cause.__cause__ or cause.__context__


def test_sinks_travel_to_other_processes_without_their_connection(tls: ScriptedServer) -> None:
    """Configuration travels, state does not."""
    sink = SeqSink("https://logs.example.com/seq", api_key=SECRET)
    AuditHandler(sink)

    copied = pickle.loads(pickle.dumps(sink))

    assert (copied.url, copied.on_sent, copied._client) == (sink.url, None, None)
    assert copied._key.text() == SECRET


def test_the_check_asks_the_health_page(tmp_path: Path) -> None:
    """A server that is starting, one that is no Seq, one that is not there."""
    with SeqServer(tmp_path, base="/logs") as seq:
        AuditHandler(SeqSink(seq.url)).check()
        seq.kill()
        with pytest.raises(AuditConfigurationError, match=r"cannot be reached: .*refused"):
            AuditHandler(SeqSink(seq.url)).check()
    for step, words in (
        (scripted.error(503), "health page .* answers 503"),
        (scripted.redirect("http://127.0.0.1:1"), "health page .* answers 302"),
        (scripted.never_answer(), "no answer in time"),
    ):
        with (
            ScriptedServer([step]) as server,
            pytest.raises(AuditConfigurationError, match=words),
        ):
            AuditHandler(SeqSink(server.url, timeout=1.5)).check()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (scripted.error(401), "answers 401 to a request without entries .*wants a key"),
        (scripted.error(403), "answers 403 to a request without entries .*key is wrong"),
        (scripted.html(), "answers 200 to a request without entries"),
        (scripted.accepted("Warning"), "a minimum level"),
        (scripted.never_answer(), "no answer in time"),
    ],
)
def test_the_check_finds_out_whether_seq_lets_us_in(step: scripted.Step, words: str) -> None:
    """By a request without entries: before the first entry, and not by it."""
    with ScriptedServer([scripted.answer(200), step]) as server:
        sink = SeqSink(server.url, api_key=SECRET, timeout=1.5)
        with pytest.raises(AuditConfigurationError, match=words):
            AuditHandler(sink).check()

    assert [request.body for request in server.requests] == [b"", b""]


@pytest.mark.parametrize("status", [400, 413, 429])
def test_the_check_takes_no_offence_where_a_request_without_entries_is_none(status: int) -> None:
    """What such an answer means for an entry is not known."""
    with ScriptedServer([scripted.answer(200), scripted.error(status)]) as server:
        AuditHandler(SeqSink(server.url)).check()


def test_the_check_turns_to_the_page_of_older_servers() -> None:
    """As a post would."""
    script = [scripted.answer(200), scripted.error(404), scripted.accepted()]
    with ScriptedServer(script) as server:
        AuditHandler(SeqSink(server.url)).check()

    assert server.requests[-1].line.startswith("POST /api/events/raw")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ca": "private"}, "has no certificate that can be read"),
        ({"client_key": "private"}, "the key of a client_cert, and none is given"),
        ({"client_cert": "cert"}, "do not go together"),
        ({"client_cert": "cert", "client_key": "other"}, "do not go together"),
    ],
)
def test_a_mistake_among_our_own_certificates_is_not_blamed_on_the_server(
    options: dict[str, str], words: str, certificates: Certificates
) -> None:
    """It is found when the sink is made."""
    files = {
        "cert": certificates.client.cert,
        "private": certificates.client.private,
        "other": certificates.good.private,
    }
    given: dict[str, Any] = {name: files[file] for name, file in options.items()}

    with pytest.raises(AuditConfigurationError, match=words):
        SeqSink("https://127.0.0.1", **given)


def test_a_check_without_a_health_page_only_asks_whether_somebody_is_there() -> None:
    """Whatever a GET is answered."""
    with ScriptedServer([scripted.error(404)]) as server:
        AuditHandler(HttpSink(server.url)).check()
        with pytest.raises(AuditConfigurationError, match=r"health page .* answers 404"):
            AuditHandler(HttpSink(server.url, health=f"{server.url}/ready")).check()
