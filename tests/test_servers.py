"""The servers of the tests are tried by hand, so that what they prove of the sinks is known."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from running import HANG, in_threads
from servers import processes, scripted
from servers.certificates import Certificates, make_certificates
from servers.processes import NOBODY, SeqServer, haproxy, nginx
from servers.scripted import SEQ_BODY, ScriptedServer
from servers.seq import CLEF, EVENT_LIMIT, PAYLOAD_LIMIT, Options, Server

if os.name != "posix":
    pytest.skip("the servers are stopped and killed by signals", allow_module_level=True)

EVENT = b'{"@t":"2026-11-22T03:38:32.251771Z","@l":"audit","n":1}'
OTHER = b'{"@t":"2026-11-22T03:38:33+01:00","n":2}'
GOOD = {"MinimumLevelAccepted": None}


class Got(NamedTuple):
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> object:
        return json.loads(self.body)


def connect(
    url: str, tls: ssl.SSLContext | None = None, timeout: float = HANG
) -> http.client.HTTPConnection:
    """Return a connection to a server."""
    parts = urlsplit(url)
    assert parts.hostname
    if parts.scheme == "https":
        return http.client.HTTPSConnection(parts.hostname, parts.port, context=tls, timeout=timeout)
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)


def ask(
    connection: http.client.HTTPConnection,
    body: bytes | None = EVENT,
    path: str = "/ingest/clef",
    headers: dict[str, str] | None = None,
) -> Got:
    """POST a body, or GET when there is none."""
    connection.request("GET" if body is None else "POST", path, body, headers or {})
    answer = connection.getresponse()
    fields = {name.lower(): value for name, value in answer.getheaders()}
    return Got(answer.status, fields, answer.read())


BRIEF = 1.0
"""Seconds to wait for what never comes; a machine that is busy stands still for less."""


def post(
    url: str,
    body: bytes | None = EVENT,
    path: str = "/ingest/clef",
    *,
    tls: ssl.SSLContext | None = None,
    timeout: float = HANG,
    headers: dict[str, str] | None = None,
) -> Got:
    """POST a body on a connection of its own, or GET when there is none."""
    with closing(connect(url, tls, timeout)) as connection:
        return ask(connection, body, path, headers)


@pytest.fixture(scope="module")
def lasting_seq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeqServer]:
    """Seq without a key, for all tests."""
    with SeqServer(tmp_path_factory.mktemp("seq")) as server:
        yield server


@pytest.fixture
def seq(lasting_seq: SeqServer) -> Iterator[SeqServer]:
    """Seq without a key, and empty; it must not have anything to complain about."""
    lasting_seq.clear()
    yield lasting_seq
    assert lasting_seq.errors() == ""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates, good and bad."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


# Seq: what is accepted.


@pytest.mark.parametrize(
    ("path", "content_type", "status"),
    [
        ("/ingest/clef", CLEF, 201),
        ("/ingest/clef", "application/json", 201),
        ("/ingest/clef?x=1", "text/plain", 201),
        ("/api/events/raw", CLEF, 201),
        ("/api/events/raw", f"{CLEF};charset=utf-8", 201),
        ("/api/events/raw?clef", "text/plain", 201),
        ("/api/events/raw?clef=true", "text/plain", 201),
        ("/api/events/raw?clef=clef", "text/plain", 201),
        ("/api/events/raw?clef=", "text/plain", 400),
        ("/api/events/raw?clef=no", "text/plain", 400),
        ("/api/events/raw?clef&clef", "text/plain", 400),
        ("/api/events/raw", "application/json", 400),
        ("/", CLEF, 404),
    ],
)
def test_endpoints(seq: SeqServer, path: str, content_type: str, status: int) -> None:
    """Two endpoints take CLEF; the older one must be told so, by parameter or by type."""
    got = post(seq.url, path=path, headers={"Content-Type": content_type})
    assert got.status == status
    assert seq.stored_lines() == ([EVENT] if status == 201 else [])


def test_base_is_part_of_the_path(tmp_path: Path) -> None:
    """Behind a base, nothing is served before it."""
    with SeqServer(tmp_path, base="/logs") as seq:
        assert seq.url.endswith("/logs")
        assert post(seq.url, path="/logs/ingest/clef").status == 201
        assert post(seq.url, path="/ingest/clef").status == 404
        assert post(seq.url, None, "/logs/health").status == 200
        assert post(seq.url, None, "/health").status == 404


@pytest.mark.parametrize(
    ("body", "stored"),
    [
        (EVENT, [EVENT]),
        (EVENT + b"\n", [EVENT]),
        (EVENT + b"\n" + OTHER, [EVENT, OTHER]),
        (EVENT + b"\r\n" + OTHER + b"\r\n", [EVENT, OTHER]),
        (b"", []),
    ],
    ids=["no-newline", "newline", "two", "crlf", "empty"],
)
def test_lines_are_stored_in_the_bytes_that_came(
    seq: SeqServer, body: bytes, stored: list[bytes]
) -> None:
    """Either newline may stand between, the last is optional, and an empty body succeeds."""
    got = post(seq.url, body)
    assert (got.status, got.json) == (201, GOOD)
    assert got.headers["content-type"] == "application/json; charset=utf-8"
    assert seq.stored_lines() == stored
    assert [(r["events"], r["stored"]) for r in seq.requests()] == [(len(stored), len(stored))]


def _event(time: object) -> bytes:
    return json.dumps({"@t": time}).encode()


@pytest.mark.parametrize(
    "time",
    [
        "2026-11-22T03:38Z",
        "2026-11-22T03:38:32",
        "2026-11-22T03:38:32.2517712Z",
        "2026-11-22T03:38:32.25-0830",
    ],
)
def test_times_in_iso_8601_are_accepted(seq: SeqServer, time: str) -> None:
    """Fractions have any number of digits, and there may be no offset."""
    assert post(seq.url, _event(time)).status == 201


def _nested(depth: int) -> bytes:
    inside = depth - 1
    return b'{"@t":"2026-11-22T03:38:32Z","a":' + b"[" * inside + b"]" * inside + b"}"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b'"text"',
        b"true",
        b"null",
        b"{}",
        b"{hello!}",
        EVENT[:-1],
        EVENT + EVENT,
        b'{"@t":"2026-11-22T03:38:32Z","n":NaN}',
        b'{"@t":"2026-11-22T03:38:32Z","n":"\xff"}',
        b"\xef\xbb\xbf" + EVENT,
        b'{"@t":"2026-11-22T03:38:32Z","@l":35}',
        b'{"@t":"2026-11-22T03:38:32Z","@x":{}}',
        _event("2026-13-22T03:38:32Z"),
        _event("2026-11-22 03:38:32Z"),
        _event("2026-11-22T03:38:32 Z"),
        _event("2026-11-22T03:38:60Z"),
        _event("ceci n'est pas un timestamp"),
        _event(1795318712),
        _event(None),
        _nested(65),
        _nested(100_000),
    ],
    ids=lambda line: line[:40].decode("latin-1"),
)
def test_one_bad_line_in_the_middle_stores_nothing(seq: SeqServer, line: bytes) -> None:
    """A request is accepted or refused as a whole, and the error has nothing of what came."""
    got = post(seq.url, b"\n".join([EVENT, line, OTHER]))
    assert got.status == 400
    assert b'{"Error":"Payload validation failed: ' in got.body
    assert b"timestamp pas" not in got.body
    assert seq.stored_lines() == []
    assert [(r["events"], r["status"]) for r in seq.requests()] == [(0, 400)]


def test_errors_have_nothing_of_what_came(seq: SeqServer) -> None:
    """What a client sent wrongly is not sent back."""
    for body in (b"{hunter2", b'"hunter2"', _event("hunter2"), b'{"hunter2":1}'):
        assert b"hunter2" not in post(seq.url, body).body


def test_depth_at_its_limit(seq: SeqServer) -> None:
    """Levels are counted, not brackets."""
    assert post(seq.url, _nested(64)).status == 201
    wide = b'{"@t":"2026-11-22T03:38:32Z","a":[' + b"[]," * 100 + b"{}]}"
    assert post(seq.url, wide).status == 201


# Seq: limits.


def _sized(size: int) -> bytes:
    start = b'{"@t":"2026-11-22T03:38:32Z","a":"'
    return start + b"x" * (size - len(start) - 2) + b'"}'


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_event_at_its_limit(seq: SeqServer, end: bytes) -> None:
    """An event with its newline has 262,144 bytes at most, whether the newline came or not."""
    assert post(seq.url, _sized(EVENT_LIMIT - 1) + end).status == 201
    got = post(seq.url, EVENT + b"\n" + _sized(EVENT_LIMIT) + end)
    assert (got.status, b"size limit" in got.body) == (400, True)
    assert [len(line) for line in seq.stored_lines()] == [262_143]


def test_payload_at_its_limit(seq: SeqServer) -> None:
    """A body of exactly 10 MiB is too large; the connection goes on, since it was read whole."""
    line = _sized(131_072 - 1) + b"\n"
    most = line * 79 + _sized(131_071)
    with closing(connect(seq.url)) as connection:
        assert ask(connection, most).status == 201
        for longer in (most + b"\n", most * 2):
            got = ask(connection, longer)
            assert got.status == 413
            assert got.json == {"Error": "the request is too large to process"}
        assert ask(connection).status == 201
    assert len(most) == PAYLOAD_LIMIT - 1 == 10_485_759
    assert len(seq.stored_lines()) == 81


# Seq: keys, health, levels.


@pytest.mark.parametrize(
    ("path", "header", "status", "noted"),
    [
        ("/ingest/clef", "s3cret", 201, "right"),
        ("/ingest/clef", "S3CRET", 403, "wrong"),
        ("/ingest/clef", None, 401, "absent"),
        ("/ingest/clef", "", 401, "absent"),
        ("/ingest/clef?apiKey=s3cret", None, 201, "right"),
        ("/ingest/clef?apiKey=s3cret", "wrong", 403, "wrong"),
    ],
)
def test_keys(tmp_path: Path, path: str, header: str | None, status: int, noted: str) -> None:
    """A key is wanted and compared, and never written down."""
    with SeqServer(tmp_path, key="s3cret") as seq:
        headers = {} if header is None else {"X-Seq-ApiKey": header}
        got = post(seq.url, path=path, headers=headers)
        requests = seq.requests()
    assert got.status == status
    assert status == 201 or isinstance(json.loads(got.body)["Error"], str)
    assert seq.stored_lines() == ([EVENT] if status == 201 else [])
    assert [(r["key"], r["status"]) for r in requests] == [(noted, status)]
    assert "s3cret" not in str(requests)
    assert ("apiKey" in requests[0]["target"]) is ("apiKey" in path)


def test_errors_of_keys_may_be_null(tmp_path: Path) -> None:
    """Seq refuses keys without a word at times; other errors have their text."""
    with SeqServer(tmp_path, "--null-errors", key="s3cret") as seq:
        for headers in ({}, {"X-Seq-ApiKey": "wrong"}):
            assert post(seq.url, headers=headers).json == {"Error": None}
        assert post(seq.url, b"[]", headers={"X-Seq-ApiKey": "s3cret"}).json != {"Error": None}


def test_health_needs_no_key(tmp_path: Path) -> None:
    """Health is for anyone to ask."""
    with SeqServer(tmp_path, key="s3cret") as seq:
        got = post(seq.url, None, "/health")
    assert (got.status, got.json) == (200, {"status": "The Seq node is in service."})


def test_minimum_level_is_told_and_what_is_below_is_dropped(tmp_path: Path) -> None:
    """With a 201: no level is information, and a level that Seq doesn't know is below all."""
    levels = ["Warning", "fatal", "Information", "audit", None]
    lines = [{"@t": "2026-11-22T03:38:32Z", "n": n} for n in range(len(levels))]
    for line, level in zip(lines, levels, strict=True):
        line.update({"@l": level} if level else {})
    with SeqServer(tmp_path, "--minimum-level", "Warning") as seq:
        got = post(seq.url, "\n".join(map(json.dumps, lines)).encode())
        assert (got.status, got.json) == (201, {"MinimumLevelAccepted": "Warning"})
        assert [event["n"] for event in seq.stored()] == [0, 1]
        assert [(r["events"], r["stored"]) for r in seq.requests()] == [(5, 2)]


# Seq: durability.


@contextmanager
def seq_in_thread(store: Path) -> Iterator[int]:
    """Run Seq in this process, where its system calls can be replaced; give its port."""
    with Server(0, Options(store)) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server.port
        finally:
            server.shutdown()
            thread.join()


def test_created_is_answered_only_after_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the disk is busy there is no answer, and what it then writes is there already."""
    store = tmp_path / "store"
    written: list[bytes] = []
    idle = threading.Event()

    def fsync(_: int) -> None:
        written.append(store.read_bytes())
        idle.wait(HANG)

    with seq_in_thread(store) as port:
        monkeypatch.setattr(os, "fsync", fsync)
        with closing(socket.create_connection(("127.0.0.1", port), 0.2)) as client:
            client.sendall(b"POST /ingest/clef HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(EVENT))
            client.sendall(EVENT)
            with pytest.raises(TimeoutError):
                client.recv(1)
            idle.set()
            client.settimeout(HANG)
            assert client.recv(4096).startswith(b"HTTP/1.1 201 Created\r\n")
    assert written == [EVENT + b"\n"]


def test_failed_fsync_is_500(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not known to be on disk is not acknowledged."""

    def fsync(_: int) -> None:
        raise OSError(5, "Input/output error")

    with seq_in_thread(tmp_path / "store") as port:
        monkeypatch.setattr(os, "fsync", fsync)
        got = post(f"http://127.0.0.1:{port}")
    assert (got.status, got.json) == (500, {"Error": "Ingestion failed."})


def test_event_survives_kill_9(seq: SeqServer) -> None:
    """What got 201 is there after the kill, and after a start at the same port."""
    assert post(seq.url).status == 201
    seq.kill()
    with pytest.raises(ConnectionRefusedError):
        post(seq.url)
    port = seq.port
    seq.restart()
    assert seq.port == port
    assert post(seq.url, OTHER).status == 201
    assert seq.stored_lines() == [EVENT, OTHER]
    assert len(seq.requests()) == 2


def test_what_a_kill_tore_off_is_cut(seq: SeqServer) -> None:
    """A half line was never acknowledged, and the next event does not go behind it."""
    assert post(seq.url).status == 201
    seq.kill()
    with seq.store.open("ab") as store:
        store.write(OTHER[:10])
    seq.restart()
    assert post(seq.url, OTHER).status == 201
    assert seq.stored() == [json.loads(EVENT), json.loads(OTHER)]


def test_stopped_server_accepts_and_does_not_answer(seq: SeqServer) -> None:
    """The kernel takes the request; when the server goes on, it stores what nobody waits for."""
    seq.stop()
    with pytest.raises(TimeoutError):
        post(seq.url, timeout=BRIEF)
    assert seq.stored_lines() == []
    seq.cont()
    assert post(seq.url, OTHER).status == 201
    _eventually(lambda: sorted(seq.stored_lines()) == sorted([EVENT, OTHER]))


def test_stopped_server_can_be_ended(tmp_path: Path) -> None:
    """No server is left behind, whatever state the test left it in."""
    with SeqServer(tmp_path) as seq:
        seq.stop()
    assert seq.process.returncode is not None
    with pytest.raises(ConnectionRefusedError):
        post(seq.url)


def test_late_answer_comes_after_the_event_is_stored(tmp_path: Path) -> None:
    """A client that doesn't wait can't know that its event was stored."""
    with SeqServer(tmp_path, "--answer-after", "3") as seq:
        with pytest.raises(TimeoutError):
            post(seq.url, timeout=BRIEF)
        _eventually(lambda: seq.stored_lines() == [EVENT])
        start = time.monotonic()
        assert post(seq.url).status == 201
        assert time.monotonic() - start > 2.9


def _eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# Seq: HTTP.


def test_64_kept_connections_store_each_event_once(seq: SeqServer) -> None:
    """Connections are kept, served side by side, and don't cut into one another's lines."""
    all_connected = threading.Barrier(64)

    def client(number: int) -> None:
        with closing(connect(seq.url)) as connection:
            ask(connection, None, "/health")
            kept = connection.sock
            all_connected.wait(HANG)
            for turn in range(5):
                assert ask(connection, _numbered(number, turn)).status == 201
            assert connection.sock is kept

    assert in_threads([partial(client, number) for number in range(64)]) == [None] * 64
    wanted = [_numbered(number, turn) for number in range(64) for turn in range(5)]
    assert sorted(seq.stored_lines()) == sorted(wanted)
    assert sum(r["stored"] for r in seq.requests()) == len(wanted)


def _numbered(number: int, turn: int) -> bytes:
    return b'{"@t":"2026-11-22T03:38:32Z","n":%d,"turn":%d}' % (number, turn)


def test_connection_is_closed_when_the_client_says_so(seq: SeqServer) -> None:
    """Connection: close is obeyed, though more requests have come already."""
    request = b"POST /ingest/clef HTTP/1.1\r\nContent-Length: %d\r\n" % len(EVENT)
    kept, last = request + b"\r\n" + EVENT, request + b"Connection: close\r\n\r\n" + EVENT
    assert _talk(seq.port, kept + last + kept).count(SEQ_BODY) == 2
    assert seq.stored_lines() == [EVENT] * 2


def test_cut_request_stores_nothing(seq: SeqServer) -> None:
    """A body that is shorter than it was to be is not an event, even if it looks like one."""
    head = b"POST /ingest/clef HTTP/1.1\r\nContent-Length: %d\r\n\r\n"
    assert _talk(seq.port, head % (len(EVENT) + 1) + EVENT) == b""
    assert (seq.stored_lines(), seq.requests()) == ([], [])


def test_chunks_and_continue(seq: SeqServer) -> None:
    """Bodies may come in chunks, and the client may wait to be told to go on."""
    head = b"POST /ingest/clef HTTP/1.1\r\nConnection: close\r\nExpect: 100-continue\r\n"
    chunks = b"7;x=y\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (EVENT[:7], len(EVENT) - 7, EVENT[7:])
    got = _talk(seq.port, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    assert got.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\n")
    assert seq.stored_lines() == [EVENT]


def _talk(port: int, data: bytes) -> bytes:
    """Send bytes, then an end; return all that comes."""
    with closing(socket.create_connection(("127.0.0.1", port), HANG)) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65_536), b""))


def test_requests_are_noted(tmp_path: Path) -> None:
    """One line a request tells what came, but for secrets, and what was answered."""
    with SeqServer(tmp_path, key="s3cret") as seq:
        secrets = {"X-Seq-ApiKey": "s3cret", "Authorization": "Bearer hunter2", "X-A": "b"}
        post(seq.url, EVENT + b"\n" + OTHER, "/api/events/raw?clef", headers=secrets)
        post(seq.url, None, "/health")
    first, second = seq.requests()
    headers = first.pop("headers")
    assert first == {
        "method": "POST", "target": "/api/events/raw?clef", "key": "right",
        "events": 2, "stored": 2, "status": 201,
    }  # fmt: skip
    assert (headers["x-seq-apikey"], headers["authorization"], headers["x-a"]) == ("…", "…", "b")
    assert (second["target"], second["key"], second["status"]) == ("/health", "absent", 200)


@pytest.mark.parametrize(
    ("words", "status", "body"),
    [
        (["--ndjson"], 200, b"{}"),
        (["--ndjson", "201"], 201, b"{}"),
        (["--ndjson", "204"], 204, b""),
    ],
)
def test_native_lines(tmp_path: Path, words: list[str], status: int, body: bytes) -> None:
    """Any object is taken at any path, with a key in any header; Seq's own paths stay Seq's."""
    key = {"Authorization": "Bearer hunter2"}
    wanted = ["--key-header", "Authorization", "--key", "Bearer hunter2"]
    with SeqServer(tmp_path, *words, *wanted, base="/in") as seq:
        with closing(connect(seq.url)) as connection:
            for path in ("/in/", "/in/a/b"):
                got = ask(connection, b'{"n":1}\n{"n":2}\n', path, key)
                assert (got.status, got.body) == (status, body)
                assert ("content-length" in got.headers) is (status != 204)
            assert ask(connection, b"{}\n[]\n", "/in/", key).status == 400
            assert ask(connection, b"{}", "/in/").status == 401
            assert ask(connection, b"{}", "/in/ingest/clef", key).status == 400
            assert ask(connection, b"{}", "/elsewhere", key).status == 404
    assert [event["n"] for event in seq.stored()] == [1, 2, 1, 2]
    assert "hunter2" not in str(seq.requests())


# Certificates.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("good", None),
        ("wrong_name", "IP address mismatch"),
        ("expired", "certificate has expired"),
        ("foreign", "unable to get local issuer certificate"),
    ],
)
def test_certificates(
    tmp_path: Path, certificates: Certificates, name: str, reason: str | None
) -> None:
    """A client that trusts the CA refuses each bad certificate for its own reason."""
    tls = ssl.create_default_context(cafile=certificates.ca)
    with SeqServer(tmp_path, tls=getattr(certificates, name)) as seq:
        if reason is None:
            assert post(seq.url, tls=tls).status == 201
            assert post(seq.url.replace("127.0.0.1", "localhost"), tls=tls).status == 201
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match=reason):
                post(seq.url, tls=tls)
            assert seq.stored_lines() == []
    assert seq.errors() == ""


def test_client_certificates(tmp_path: Path, certificates: Certificates) -> None:
    """A server that wants a certificate takes the CA's own, and neither none nor a foreign one."""
    with SeqServer(tmp_path, tls=certificates.good, client_ca=certificates.ca) as seq:
        for pair in (None, certificates.foreign_client, certificates.client):
            tls = ssl.create_default_context(cafile=certificates.ca)
            if pair:
                tls.load_cert_chain(pair.cert, pair.private)
            if pair is certificates.client:
                assert post(seq.url, tls=tls).status == 201
            else:
                with pytest.raises(OSError, match=r"ALERT|EOF|reset|pipe"):
                    post(seq.url, tls=tls)
    assert seq.stored_lines() == [EVENT]


# The scripted server.

ANSWERS: dict[str, tuple[scripted.Step, int, dict[str, str | None], bytes]] = {
    "accepted": (scripted.accepted(), 201, {}, SEQ_BODY),
    "level": (scripted.accepted("Warning"), 201, {}, b'{"MinimumLevelAccepted":"Warning"}'),
    "null error": (scripted.error(403), 403, {}, b'{"Error":null}'),
    "error": (scripted.error(413, "too large"), 413, {}, b'{"Error":"too large"}'),
    "429": (scripted.too_many(), 429, {"retry-after": None}, b'{"Error":"too many"}'),
    "429, seconds": (scripted.too_many(7), 429, {"retry-after": "7"}, b'{"Error":"too many"}'),
    "503, date": (
        scripted.too_many(datetime(2026, 11, 22, 3, 38, 32, tzinfo=timezone.utc), 503),
        503,
        {"retry-after": "Sun, 22 Nov 2026 03:38:32 GMT"},
        b'{"Error":"too many"}',
    ),
    "redirect": (
        scripted.redirect("http://a.example/"),
        302,
        {"location": "http://a.example/"},
        b"",
    ),
    "page": (
        scripted.html(),
        200,
        {"content-type": "text/html; charset=utf-8"},
        b"<!doctype html><title>Welcome</title><p>Please sign in.",
    ),
    "truncated JSON": (scripted.truncated_json(), 201, {}, b'{"MinimumLevelAccepted":nu'),
    "status line only": (scripted.status_line_only(), 201, {"content-type": None}, b""),
    "late": (scripted.after(0.01, scripted.answer(204)), 204, {}, b""),
}
"""What is answered, and how it arrives: status, some of the headers, body."""


@pytest.mark.parametrize("name", ANSWERS)
def test_scripted_answers(name: str) -> None:
    """Whatever is answered, the request was read whole and is recorded."""
    step, status, headers, body = ANSWERS[name]
    with ScriptedServer([step]) as server:
        got = post(server.url, headers={"X-A": "b"})
    assert (got.status, got.body) == (status, body)
    assert {name: got.headers.get(name) for name in headers} == headers
    (request,) = server.requests
    assert (request.line, request.body) == ("POST /ingest/clef HTTP/1.1", EVENT)
    assert request.headers["x-a"] == "b"


FAULTS: dict[str, tuple[scripted.Step, type[Exception], bool | None]] = {
    "reset before reading": (scripted.reset_before_reading(), ConnectionResetError, None),
    "reset mid body": (scripted.reset_mid_body(), ConnectionResetError, False),
    "reset after reading": (scripted.reset_after_reading(), ConnectionResetError, True),
    "reset on connect": (scripted.on_connect_reset(), ConnectionResetError, None),
    "close": (scripted.close_after_reading(), http.client.RemoteDisconnected, True),
    "never answer": (scripted.never_answer(), TimeoutError, True),
    "never read": (scripted.never_read(), TimeoutError, None),
    "silence on connect": (scripted.on_connect_silence(), TimeoutError, None),
    "garbage": (scripted.garbage(), http.client.BadStatusLine, True),
    "truncated body": (scripted.truncated_body(), http.client.IncompleteRead, True),
    "two lengths": (scripted.contradictory_length(), http.client.IncompleteRead, True),
    "broken chunk": (scripted.broken_chunk(), http.client.IncompleteRead, True),
}
"""What is done to the client, what it gets, and whether its request is read whole, cut, or not."""


@pytest.mark.parametrize("name", FAULTS)
def test_scripted_faults(name: str) -> None:
    """The client gets the error that belongs to each fault; what was read of it is recorded."""
    step, error, read_whole = FAULTS[name]
    with ScriptedServer([step]) as server:
        with pytest.raises(error) as raised:
            post(server.url, timeout=BRIEF)
        assert raised.type is error
        _eventually(lambda: read_whole is None or bool(server.requests + server.cut))
    assert [request.body for request in server.requests] == ([EVENT] if read_whole else [])
    assert [request.body for request in server.cut] == ([EVENT[:1]] if read_whole is False else [])
    assert server.stored == []


def test_script_goes_on_over_connections_and_repeats_its_end() -> None:
    """Each request takes a step, kept connection or new; the last step is for all that follow."""
    script = [scripted.error(503), scripted.storing(scripted.error(500)), scripted.accepted()]
    with ScriptedServer(script) as server:
        with closing(connect(server.url)) as connection:
            statuses = [ask(connection, b"%d" % n).status for n in range(2)]
        statuses += [post(server.url, b"%d" % n).status for n in range(2, 5)]
    assert statuses == [503, 500, 201, 201, 201]
    assert server.stored == [b"1", b"2", b"3", b"4"]
    assert [request.body for request in server.requests] == [b"0", *server.stored]
    assert [request.connection for request in server.requests] == [1, 1, 2, 3, 4]
    assert server.connections == 4


def test_stored_and_not_answered() -> None:
    """The worst that can happen: it is stored, and the client can't know."""
    steps = [
        scripted.reset_after_reading(),
        scripted.never_answer(),
        scripted.close_after_reading(),
    ]
    with ScriptedServer([scripted.storing(step) for step in steps]) as server:
        for error in (ConnectionResetError, TimeoutError, http.client.RemoteDisconnected):
            with pytest.raises(error):
                post(server.url, timeout=BRIEF)
    assert server.stored == [EVENT] * 3


def test_on_connect_steps_are_for_the_next_connection() -> None:
    """They don't wait for a request."""
    script = [scripted.accepted(), scripted.on_connect_reset(), scripted.accepted()]
    with ScriptedServer(script) as server:
        assert post(server.url).status == 201
        with pytest.raises(ConnectionResetError):  # while it connects, or then
            with closing(socket.create_connection(("127.0.0.1", server.port), HANG)) as silent:
                silent.recv(1)
        assert post(server.url).status == 201
    assert (len(server.requests), server.cut, server.connections) == (2, [], 3)


def test_kept_connection_is_closed_while_idle() -> None:
    """The client was told nothing; its next request on that connection fails."""
    with ScriptedServer([scripted.then_close(scripted.accepted(), 0.05)]) as server:
        with closing(connect(server.url)) as connection:
            got = ask(connection)
            assert (got.status, got.headers.get("connection")) == (201, None)
            assert connection.sock
            assert connection.sock.recv(1) == b""
            with pytest.raises(ConnectionError):
                ask(connection)
    assert server.stored == [EVENT]


def test_client_that_goes_is_recorded() -> None:
    """Half a body, half a header, and nothing at all, which is no request."""
    with ScriptedServer([scripted.accepted()]) as server:
        assert _talk(server.port, b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nabc") == b""
        assert _talk(server.port, b"POST / HT") == b""
        assert _talk(server.port, b"") == b""
    assert [(cut.line, cut.body) for cut in server.cut] == [
        ("POST / HTTP/1.1", b"abc"),
        ("", b"POST / HT"),
    ]
    assert (server.requests, server.stored) == ([], [])


@pytest.mark.parametrize(
    ("step", "dripped"),
    [
        (scripted.drip_header(0.002), scripted.ACCEPTED),
        (scripted.drip_body(0.01), SEQ_BODY),
    ],
    ids=["header", "body"],
)
def test_answers_can_drip(step: scripted.Step, dripped: bytes) -> None:
    """Bytes come so often that no time-out of a single read strikes, and take long together."""
    with ScriptedServer([step]) as server:
        with closing(socket.create_connection(("127.0.0.1", server.port), HANG)) as client:
            client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
            start = time.monotonic()
            pieces = [client.recv(65_536)]
            while not pieces[-1].endswith(b"}"):
                pieces.append(client.recv(65_536))
            took = time.monotonic() - start
    assert b"".join(pieces) == scripted.ACCEPTED
    assert pieces[0] == (scripted.ACCEPTED.removesuffix(dripped) or b"H")
    assert len(pieces) > len(dripped) / 2
    assert took > 0.2


def test_answer_can_be_huge() -> None:
    """100 MB of body come as they were promised, and are right in the end."""
    with ScriptedServer([scripted.stream()]) as server:
        got = post(server.url)
    assert (got.status, len(got.body), got.json) == (201, 104_857_600, GOOD)


def test_client_need_not_read_a_huge_answer() -> None:
    """The server gives up when the client does."""
    with ScriptedServer([scripted.stream()]) as server:
        with closing(connect(server.url)) as connection:
            connection.request("POST", "/", EVENT)
            assert connection.getresponse().read(10) == b" " * 10
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (scripted.accepted(), None),
        (scripted.reset_after_reading(), ConnectionResetError),
        (scripted.on_connect_reset(), ConnectionResetError),
        (scripted.on_connect_silence(), TimeoutError),
        (scripted.never_answer(), TimeoutError),
    ],
    ids=["accepted", "reset", "reset on connect", "silence on connect", "never answer"],
)
def test_script_over_tls(
    certificates: Certificates, step: scripted.Step, error: type[Exception] | None
) -> None:
    """Faults are the same over TLS; those on connecting come before the handshake."""
    tls = ssl.create_default_context(cafile=certificates.ca)
    with ScriptedServer([step], tls=certificates.good.server_context()) as server:
        assert server.url.startswith("https:")
        with closing(connect(server.url, tls, 0.3 if error else HANG)) as connection:
            if isinstance(step, scripted.OnConnect):
                assert error
                with pytest.raises(error):
                    connection.connect()
            elif error:
                connection.connect()
                with pytest.raises(error):
                    ask(connection)
            else:
                assert ask(connection).json == GOOD
    assert len(server.requests) == (not isinstance(step, scripted.OnConnect))


@pytest.mark.parametrize("speaks_tls", [False, True])
def test_scripted_server_ends_though_clients_hang(
    certificates: Certificates, speaks_tls: bool
) -> None:
    """Neither a client that waits nor one that says nothing keeps a test from ending."""
    tls = certificates.good.server_context() if speaks_tls else None
    script = [scripted.never_answer(), scripted.on_connect_silence(), scripted.accepted()]
    with ScriptedServer(script, tls=tls) as server:
        clients = [socket.create_connection(("127.0.0.1", server.port), HANG) for _ in range(3)]
        clients[0].sendall(b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
        _eventually(lambda: server.connections == 3)
    for client in clients:
        client.close()


# Proxies.


def test_missing_tool_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a proxy is not installed, its tests say so."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for name, run in (("haproxy", haproxy), ("nginx", nginx)):
        with pytest.raises(pytest.skip.Exception, match=f"missing: {name}|{name} injects"):
            with run(tmp_path, ""):
                pass


def test_wrong_configuration_is_told(tmp_path: Path) -> None:
    """A proxy that doesn't start fails the test at once, with what it said."""
    with pytest.raises(AssertionError, match="unknown keyword 'nonsense'"):
        with haproxy(tmp_path, "nonsense"):
            pass
    with pytest.raises(AssertionError, match='unknown directive "nonsense"'):
        with nginx(tmp_path, "nonsense;"):
            pass


def test_proxies_end_with_their_block(seq: SeqServer, tmp_path: Path) -> None:
    """Nothing listens any more."""
    for run, config, status in (
        (haproxy, processes.passing(NOBODY), 503),
        (nginx, processes.welcoming(), 200),
    ):
        with run(tmp_path, config) as proxy:
            assert post(proxy.url).status == status
        assert proxy.process.returncode is not None
        with pytest.raises(ConnectionRefusedError):
            post(proxy.url)


@pytest.mark.parametrize(
    ("config", "status", "stored"),
    [
        (processes.passing, 201, True),
        (lambda _: processes.passing(NOBODY), 503, False),
        (processes.replacing_answers, 502, True),
        (lambda port: processes.replacing_answers(port, 500), 500, True),
        (processes.dropping_answers, TimeoutError, True),
        (processes.closing_on_answer, http.client.RemoteDisconnected, True),
        (processes.resetting_on_connect, ConnectionResetError, False),
    ],
    ids=["passes", "down", "502", "500", "drops", "closes", "resets"],
)
def test_haproxy(
    seq: SeqServer,
    tmp_path: Path,
    config: Callable[[int], str],
    status: int | type[Exception],
    stored: bool,
) -> None:
    """What the client gets, and whether the event was stored, are two things."""
    with haproxy(tmp_path, config(seq.port)) as proxy:
        if isinstance(status, int):
            assert post(proxy.url).status == status
        else:
            with pytest.raises(status):
                post(proxy.url, timeout=BRIEF)
    _eventually(lambda: seq.stored_lines() == ([EVENT] if stored else []))


def test_haproxy_answers_504_though_it_was_stored(tmp_path: Path) -> None:
    """The backend stores at once and answers too late."""
    with SeqServer(tmp_path, "--answer-after", "1") as seq:
        with haproxy(tmp_path, processes.impatient(seq.port, 200)) as proxy:
            assert post(proxy.url).status == 504
            _eventually(lambda: seq.stored_lines() == [EVENT])


@pytest.mark.parametrize("retry_after", [None, 3])
def test_haproxy_limits(seq: SeqServer, tmp_path: Path, retry_after: int | None) -> None:
    """The third request is one too many."""
    with haproxy(tmp_path, processes.limiting(seq.port, 2, retry_after)) as proxy:
        got = [post(proxy.url) for _ in range(3)]
    assert [answer.status for answer in got] == [201, 201, 429]
    assert got[2].headers.get("retry-after") == (retry_after and str(retry_after))
    assert len(seq.stored_lines()) == 2


def test_nginx_terminates_tls(seq: SeqServer, tmp_path: Path, certificates: Certificates) -> None:
    """The client speaks TLS and the server does not."""
    with nginx(tmp_path, processes.terminating_tls(seq.port, certificates.good)) as proxy:
        tls = ssl.create_default_context(cafile=certificates.ca)
        assert post(proxy.url, tls=tls).json == GOOD
        with pytest.raises(ssl.SSLCertVerificationError):
            post(proxy.url, tls=ssl.create_default_context(cafile=certificates.foreign_ca))
    assert seq.stored_lines() == [EVENT]


def test_nginx_limits_bodies(seq: SeqServer, tmp_path: Path) -> None:
    """One byte too many is 413, with a page instead of Seq's error."""
    with nginx(tmp_path, processes.limiting_bodies(seq.port, len(EVENT))) as proxy:
        assert post(proxy.url).status == 201
        got = post(proxy.url, EVENT + b"\n")
    assert (got.status, got.headers["content-type"]) == (413, "text/html")
    assert seq.stored_lines() == [EVENT]


def test_nginx_redirects(tmp_path: Path) -> None:
    """The path is kept, so that a client that follows would send the event there."""
    with nginx(tmp_path, processes.redirecting("http://other.example")) as proxy:
        got = post(proxy.url)
    assert (got.status, got.headers["location"]) == (302, "http://other.example/ingest/clef")


def test_nginx_welcomes(tmp_path: Path) -> None:
    """A page with 200, whatever was posted."""
    with nginx(tmp_path, processes.welcoming()) as proxy:
        got = post(proxy.url)
    assert (got.status, got.headers["content-type"]) == (200, "text/html")
    assert b"sign in" in got.body


def test_nginx_drips(seq: SeqServer, tmp_path: Path) -> None:
    """The answer is right and takes its time."""
    with nginx(tmp_path, processes.dripping(seq.port, 200)) as proxy:
        start = time.monotonic()
        got = post(proxy.url)
        took = time.monotonic() - start
    assert (got.status, got.json) == (201, GOOD)
    assert took > 0.5
    assert seq.stored_lines() == [EVENT]
