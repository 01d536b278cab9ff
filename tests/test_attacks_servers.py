"""What servers, proxies and key files did to entries once: lost, doubled, told wrong, or hung."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doubles import BrokenSink, refusal
from running import HANG, eventually, in_threads
from servers import scripted
from servers.certificates import Certificates, make_certificates
from servers.scripted import ACCEPTED, Exchange, ScriptedServer, Step, accepted, response, storing

from structlog_audit import (
    AuditConfigurationError,
    AuditError,
    AuditHandler,
    AuditWriteError,
    FileSink,
    FirstOf,
    HttpSink,
    LineRefused,
    SeqSink,
    SinkError,
)
from structlog_audit.sinks import _delivery, _exchange, combine
from structlog_audit.sinks import http as http_module
from structlog_audit.testing import MemorySink

MakeHandler = Callable[..., AuditHandler]
SECRET = "hunter2-the-key"
SHORT = 0.8
"""Seconds of the deadline where a server never confirms."""
SINKS = [HttpSink, SeqSink]


@pytest.fixture
def make_handler() -> Iterator[MakeHandler]:
    """Make handlers that do not wait at the end for a server that is gone."""
    made: list[AuditHandler] = []

    def make(sink: Any, **options: Any) -> AuditHandler:
        made.append(AuditHandler(sink, **options))
        return made[-1]

    yield make
    for handler in made:
        for sink in getattr(handler.sink, "sinks", [handler.sink]):
            sink.timeout = 0.05
        with contextlib.suppress(AuditError):
            handler.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a sink that failed be asked again soon."""
    monkeypatch.setattr(combine, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(combine, "LONGEST_PAUSE", 0.02)


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the proxies of whoever runs the tests, and what they are not for."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def lines_of(count: int, text: str = "x") -> list[bytes]:
    """Return the first lines of a session, as a handler writes them."""
    memory = MemorySink()
    handler = AuditHandler(memory)
    for _ in range(max(1, count - 1)):
        handler.record({"action": "A", "data": {"x": text}})
    lines = memory.lines[:count]
    handler.close()
    return lines


def failure(sink: Any, lines: Sequence[bytes] | None = None) -> SinkError:
    """Write lines that the sink must not confirm; return what it raises."""
    (answer,) = in_threads([lambda: sink.write(lines or lines_of(1))])
    sink.close()
    assert isinstance(answer, SinkError), answer
    return answer


def call(handler: AuditHandler, **entry: Any) -> Any:
    """Record an entry; return the receipt or the error."""
    (answer,) = in_threads([lambda: handler.record({"action": "A", **entry})])
    assert not isinstance(answer, AssertionError), answer
    return answer


def together(
    handler: AuditHandler, server: ScriptedServer, go: threading.Event, n: int
) -> list[Any]:
    """Record entries 0 to n-1: the first one in a request of its own, which waits until the others
    are there, to be written in one batch, in order; return receipts and errors."""
    answers: list[Any] = [AssertionError("the thread hangs")] * n

    def record(number: int) -> None:
        try:
            answers[number] = handler.record({"action": f"A{number}."})
        except AuditError as error:
            answers[number] = error

    threads = [threading.Thread(target=record, args=(k,), daemon=True) for k in range(n)]
    for number, thread in enumerate(threads):
        thread.start()
        if number:
            eventually(lambda n=number: len(handler._commits._queue) >= n)  # type: ignore[misc]
        else:
            eventually(lambda: bool(server.requests))
    go.set()
    for thread in threads:
        thread.join(HANG)
    return answers


def gated(go: threading.Event, step: Step) -> Step:
    """Read the request whole, and go on when the test says so."""

    def wait(exchange: Exchange) -> None:
        exchange.read()
        while not go.is_set():
            exchange.wait(0.005)
        step(exchange)

    return wait


def numbered(bodies: Sequence[bytes]) -> list[tuple[tuple[str, int], str, bytes]]:
    """Return identity, action and bytes of each line in the bodies, in either format."""
    found = []
    for line in [line for body in bodies for line in body.splitlines()]:
        entry = json.loads(line)
        session = entry.get("session") or entry["AuditSession"]
        sequence = entry.get("sequence") or entry["SequenceNumber"]
        found.append(((session, sequence), entry.get("action") or entry["Action"], line))
    return found


def check_numbers(bodies: Sequence[bytes]) -> None:
    """No session and sequence stands on two lines that are not the same bytes."""
    seen: dict[tuple[str, int], bytes] = {}
    for identity, _, line in numbered(bodies):
        assert seen.setdefault(identity, line) == line, f"{identity} was given to two lines"


def fates(answers: Sequence[Any]) -> list[str]:
    """Return `ok`, or the fate of the entry as its caller was told it."""
    return [a.persisted if isinstance(a, AuditError) else "ok" for a in answers]


# Answers to a part of a request.


@pytest.mark.parametrize("tls", [False, True])
def test_a_success_that_comes_before_the_request_was_read_confirms_nothing(
    tls: bool, certificates: Certificates
) -> None:
    """The server reads a kilobyte of eight million bytes, says 201, and closes."""

    def early(exchange: Exchange) -> None:
        exchange.read_part(1000)
        exchange.send(response(201))
        socket.socket.shutdown(exchange.socket, socket.SHUT_WR)
        exchange.wait(0.1)
        exchange.close()

    context = certificates.good.server_context() if tls else None
    with ScriptedServer([early], tls=context) as server:
        # nor shall the kernel take all of it for the server
        server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sink = HttpSink(server.url, timeout=SHORT, ca=certificates.ca if tls else None)

        error = failure(sink, lines_of(40, "x" * 200_000))

        eventually(lambda: bool(server.cut))
    assert error.persisted == "unknown"


@pytest.mark.parametrize("tls", [False, True])
def test_a_refusal_that_comes_before_the_request_was_read_is_heard(
    tls: bool, certificates: Certificates
) -> None:
    """A proxy answers 413 to the head, and closes: the request is halved until it fits."""

    def early(exchange: Exchange) -> None:
        while b"\r\n\r\n" not in exchange.came:
            assert exchange.receive()
        if int(exchange.came.lower().partition(b"content-length: ")[2].split()[0]) < 500_000:
            accepted()(exchange)
            return
        exchange.send(response(413))
        socket.socket.shutdown(exchange.socket, socket.SHUT_WR)
        exchange.wait(0.05)
        exchange.close()

    context = certificates.good.server_context() if tls else None
    with ScriptedServer([early], tls=context) as server:
        sink = HttpSink(server.url, timeout=10, ca=certificates.ca if tls else None)
        lines = lines_of(8, "x" * 100_000)

        sink.write(lines)
        sink.close()

        assert b"".join(server.stored) == b"".join(lines)


@pytest.mark.parametrize("tls", [False, True])
def test_what_follows_an_answer_does_not_confirm_the_next_entry(
    tls: bool, make_handler: MakeHandler, certificates: Certificates
) -> None:
    """A second 201 behind an answer that ends where a buffer ends, in the same record of TLS."""
    head = b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n"
    rest = 8192 - len(head % 8000)
    first = head % rest + b" " * rest
    assert len(first) == 8192
    context = certificates.good.server_context() if tls else None
    steps = [storing(scripted.raw(first + response(201), close=False)), scripted.never_answer()]
    with ScriptedServer(steps, tls=context) as server:
        ca = certificates.ca if tls else None
        handler = make_handler(sink := HttpSink(server.url, timeout=10, ca=ca))
        confirmed = call(handler)
        sink.timeout = SHORT

        assert fates([confirmed, call(handler)]) == ["ok", "unknown"]


@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_what_a_server_says_before_its_answer_is_read_over(
    before: bytes, make_handler: MakeHandler
) -> None:
    """It processes, and hints; then it confirms."""
    before += (
        b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>; rel=y\r\n\r\n"
    )
    with ScriptedServer([storing(scripted.raw(before + ACCEPTED, close=False))]) as server:
        handler = make_handler(SeqSink(server.url))

        assert fates([call(handler), call(handler)]) == ["ok", "ok"]
        assert (len(server.stored), server.connections) == (2, 1)


def test_a_server_that_only_ever_says_that_it_is_busy_confirms_nothing(
    make_handler: MakeHandler,
) -> None:
    """It says 102 until the deadline."""

    def busy(exchange: Exchange) -> None:
        exchange.read()
        while True:
            exchange.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 1000)

    with ScriptedServer([busy]) as server:
        assert call(make_handler(SeqSink(server.url, timeout=SHORT))).persisted == "unknown"


# Numbers: none is given to two lines.


def test_other_bytes_have_another_idempotency_key() -> None:
    """A server that drops repetitions must not drop an entry that took a refused one's number."""
    sink = HttpSink("http://127.0.0.1:1")
    lines = lines_of(3)
    other = lines[1].replace(b'"A"', b'"B"')
    batches = [lines[:2], lines[:2], [lines[0], other], lines[:1], lines[1:2], [other], lines]
    keys = [sink.request(batch)[0]["Idempotency-Key"] for batch in batches]

    assert keys[0] == keys[1]
    assert len(set(keys)) == 6


@pytest.mark.parametrize("kind", SINKS)
@pytest.mark.parametrize("status", [400, 413])
def test_a_line_that_was_stored_and_then_refused_keeps_its_number(
    status: int, kind: Any, make_handler: MakeHandler
) -> None:
    """Its fate is unknown, and what comes after it belongs to a new session."""
    lost = storing(scripted.reset_after_reading())
    refuse = scripted.answer(status)
    with ScriptedServer([accepted(), lost, refuse, accepted()]) as server:
        handler = make_handler(kind(server.url, timeout=10))
        first, second, third = (call(handler, action=f"A{n}.") for n in range(3))

        assert fates([first, second, third]) == ["ok", "unknown", "ok"]
        assert third.session != first.session
        check_numbers(server.stored)


@pytest.mark.parametrize("kind", SINKS)
@pytest.mark.parametrize("status", [400, 413])
def test_the_rest_of_a_batch_goes_to_a_new_session_when_a_line_is_in_doubt(
    status: int, kind: Any, make_handler: MakeHandler
) -> None:
    """Of two, the first is found to blame, alone: stored, then reset, then refused."""
    go, refuse = threading.Event(), scripted.answer(status)
    lost = storing(scripted.reset_after_reading())
    with ScriptedServer([gated(go, accepted()), refuse, lost, refuse, accepted()]) as server:
        answers = together(make_handler(kind(server.url, timeout=10)), server, go, 3)

        assert fates(answers) == ["ok", "unknown", "ok"]
        assert answers[2].session != answers[0].session
        check_numbers(server.stored)
        begin = [line for (_, sequence), _, line in numbered(server.stored) if sequence == 1][-1]
        assert answers[0].session in begin.decode()  # it tells which session it follows


@pytest.mark.parametrize("kind", SINKS)
@pytest.mark.parametrize("last", ["no key", "refused"])
def test_the_rest_of_a_batch_that_may_be_stored_is_not_said_to_be_lost(
    last: str, kind: Any, make_handler: MakeHandler
) -> None:
    """All of it was stored in the old session; in the new one, the server does not take it."""
    go, refuse = threading.Event(), scripted.answer(400)
    lost = storing(scripted.reset_after_reading())
    end = scripted.error(401) if last == "no key" else refusing("A2.")
    with ScriptedServer([gated(go, accepted()), lost, refuse, refuse, end]) as server:
        answers = together(make_handler(kind(server.url, timeout=10)), server, go, 3)

        actions = [action for _, action, _ in numbered(server.stored)]
        assert actions[:4] == ["AuditSession", "A0.", "A1.", "A2."]
        assert fates(answers) == ["ok", "unknown", "unknown"]


def test_a_begin_that_is_refused_does_not_say_that_its_entry_is_not_stored(
    make_handler: MakeHandler,
) -> None:
    """A server that takes a part stored the entry, and refused the line before it."""
    with ScriptedServer([taking_a_part("AuditSession")]) as server:
        answer = call(make_handler(HttpSink(server.url, timeout=5)), action="A1.")

        assert [a for _, a, _ in numbered(server.stored)] == ["A1."]
        assert fates([answer]) == ["unknown"]


def taking_a_part(word: str) -> Step:
    """Store the lines without the word; answer 400 if there was another one, as Loki does."""

    def step(exchange: Exchange) -> None:
        lines = exchange.read().body.splitlines(keepends=True)
        good = [line for line in lines if word.encode() not in line]
        exchange.server.stored.append(b"".join(good))
        exchange.send(response(204 if good == lines else 400))

    return step


def test_a_server_that_stores_a_part_of_what_it_refuses_gets_no_number_twice(
    make_handler: MakeHandler,
) -> None:
    """The entries after the refused one are stored already, with the numbers they had."""
    go = threading.Event()
    with ScriptedServer([gated(go, taking_a_part("A2.")), taking_a_part("A2.")]) as server:
        answers = together(make_handler(HttpSink(server.url, timeout=10)), server, go, 5)

        assert fates(answers) == ["ok", "ok", "unknown", "ok", "ok"]
        assert answers[3].session == answers[4].session != answers[1].session
        check_numbers(server.stored)
        assert {"A0.", "A1.", "A3.", "A4."} <= {action for _, action, _ in numbered(server.stored)}


def refusing(word: str, seconds: float = 0.0) -> Step:
    """Refuse a request whole for a word in it, as Seq does; store the others."""

    def step(exchange: Exchange) -> None:
        refused = word.encode() in exchange.read().body
        exchange.wait(seconds)
        (scripted.error(400, "bad") if refused else accepted())(exchange)

    return step


def test_a_server_that_refuses_requests_whole_keeps_the_session(make_handler: MakeHandler) -> None:
    """Nothing of them is stored: the numbers go on without a gap."""
    go = threading.Event()
    with ScriptedServer([gated(go, accepted()), refusing("A2.")]) as server:
        answers = together(make_handler(SeqSink(server.url, timeout=10)), server, go, 5)

        assert fates(answers) == ["ok", "ok", "no", "ok", "ok"]
        numbers = [answer.sequence for answer in answers if not isinstance(answer, AuditError)]
        assert numbers == [2, 3, 4, 5]
        assert len({identity[0] for identity, *_ in numbered(server.stored)}) == 1
        check_numbers(server.stored)


def test_many_refused_lines_do_not_get_a_deadline_each(make_handler: MakeHandler) -> None:
    """A slow server refuses all of them; the rest fails when the handler's time is over."""
    go = threading.Event()
    with ScriptedServer([gated(go, accepted()), refusing("Action", 0.03)]) as server:
        handler = make_handler(SeqSink(server.url, timeout=1.5), timeout=1.5)
        answers = together(handler, server, go, 32)

        eventually(lambda: handler._commits.idle)
        assert fates(answers)[0] == "ok"
        assert all(isinstance(answer, AuditWriteError) for answer in answers[1:])
        assert len(server.requests) < 80  # all 31, each found in halves, take more than 120


def test_one_record_that_is_rejected_with_success_is_refused(make_handler: MakeHandler) -> None:
    """OpenTelemetry's partial success: it alone fails, and its session goes on."""
    fine, rejects = scripted.answer(200), scripted.answer(200, b"\x0a\x02\x08\x01")
    with ScriptedServer([fine, rejects, rejects, fine]) as server:
        sink = HttpSink(server.url, format="otlp", timeout=10)
        sink.write(lines_of(1))
        with pytest.raises(LineRefused, match="rejects the record") as caught:
            sink.write(lines_of(1))
        assert (caught.value.delivered, caught.value.persisted) == (0, "no")
        sink.close()

        handler = make_handler(HttpSink(server.url, format="otlp", timeout=10))
        answers = [call(handler)]
        assert [type(answer) for answer in answers] == [AuditWriteError]
        assert call(handler).sequence == 2


# What callers are told of their entries.


def shot(*steps: Step, lines: int, timeout: float = SHORT, kind: Any = SeqSink) -> SinkError:
    """Write lines to a server with a script; return the failure."""
    with ScriptedServer(steps) as server:
        return failure(kind(server.url, timeout=timeout), lines_of(lines))


@pytest.mark.parametrize("kind", SINKS)
def test_a_first_half_that_was_confirmed_is_not_denied(kind: Any) -> None:
    """The second one gets 429 until the end."""
    error = shot(scripted.answer(413), accepted(), scripted.too_many(), lines=4, kind=kind)

    assert (error.persisted, error.delivered) == ("unknown", 2)


@pytest.mark.parametrize("last", [401, 429])
def test_halves_of_what_may_be_stored_are_not_denied(last: int) -> None:
    """The whole was stored and the answer lost; a proxy refuses its repetition, then the half."""
    lost = storing(scripted.reset_after_reading())

    assert shot(lost, scripted.answer(413), scripted.answer(last), lines=2).persisted == "unknown"


def test_halves_of_what_was_taken_in_part_are_not_denied() -> None:
    """A server that takes a part stored some, said 400, and lets nobody in then."""
    error = shot(storing(scripted.answer(400)), scripted.answer(401), lines=2, kind=HttpSink)

    assert error.persisted == "unknown"


def test_halves_of_what_was_refused_whole_are_known_not_to_be_stored() -> None:
    """Seq stores nothing of a request that it refuses."""
    assert shot(scripted.answer(400), scripted.answer(401), lines=2).persisted == "no"


def removing(file: Path, step: Step) -> Step:
    """Take the key's file away while the request is under way."""

    def remove(exchange: Exchange) -> None:
        exchange.read()
        file.unlink(missing_ok=True)
        step(exchange)

    return remove


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    """A file with a key."""
    (tmp_path / "key").write_text(SECRET)
    return tmp_path / "key"


def test_a_key_file_that_is_removed_between_attempts_ends_no_call(
    key_file: Path, make_handler: MakeHandler
) -> None:
    """The repetition goes with the key that the first attempt had; the next call fails."""
    lost = storing(scripted.reset_after_reading())
    with ScriptedServer([removing(key_file, lost), accepted()]) as server:
        sink = SeqSink(server.url, timeout=10, api_key_file=key_file)
        handler = make_handler(sink)
        answers = [call(handler), call(handler)]

        assert fates(answers) == ["ok", "no"]
        assert {request.headers["x-seq-apikey"] for request in server.requests} == {SECRET}
        text = str(answers[1])
        assert repr(sink) in text
        assert str(key_file) in text
        assert SECRET not in text


def test_a_key_file_that_is_removed_does_not_deny_what_may_be_stored(key_file: Path) -> None:
    """The whole was stored; its repetition is refused, and for the half there is no key."""
    lost = storing(scripted.reset_after_reading())
    with ScriptedServer([lost, removing(key_file, scripted.answer(413))]) as server:
        sink = SeqSink(server.url, timeout=10, api_key_file=key_file)
        error = failure(sink, lines_of(2))

    assert repr(sink) in str(error)
    assert error.persisted == "unknown"


@pytest.mark.parametrize(
    "make", [lambda path: path.unlink(), lambda path: path.unlink() or os.mkfifo(path),
             lambda path: path.unlink() or path.mkdir(), lambda path: path.write_text(" \n")],
    ids=["gone", "fifo", "directory", "empty"],
)  # fmt: skip
def test_a_key_file_that_holds_no_key_is_told_of_at_once(
    make: Callable[[Path], None], key_file: Path, make_handler: MakeHandler
) -> None:
    """A FIFO has no writer, and nobody waits for one: neither at the start nor later."""
    with ScriptedServer([accepted()]) as server:
        handler = make_handler(SeqSink(server.url, timeout=10, api_key_file=key_file))
        before = call(handler)
        make(key_file)
        os.utime(key_file, (1, 1)) if key_file.exists() else None
        after = call(handler)
        (fresh,) = in_threads([lambda: SeqSink(server.url, api_key_file=key_file)])

        assert fates([before, after]) == ["ok", "no"]
        assert str(key_file) in str(after)
        assert isinstance(fresh, AuditConfigurationError), fresh
        assert len(server.requests) == 1


STORED_AND_SILENT = storing(scripted.never_answer())


@pytest.mark.parametrize("step", [scripted.error(401), scripted.error(400), scripted.error(413)])
def test_an_entry_that_the_first_may_have_is_not_denied_by_the_second(
    step: Step, make_handler: MakeHandler
) -> None:
    """One stored it and fell silent; the other one lets nobody in, or refuses the entry."""
    with ScriptedServer([STORED_AND_SILENT]) as one, ScriptedServer([step]) as other:
        sinks = SeqSink(one.url, timeout=SHORT), SeqSink(other.url, timeout=10)
        answer = call(make_handler(FirstOf(*sinks)), action="A1.")

        assert [action for _, action, _ in numbered(one.stored)] == ["AuditSession", "A1."]
        assert fates([answer]) == ["unknown"]


class Unopenable(BrokenSink):
    """Cannot be opened while `why` is set."""

    why: SinkError | None = None

    def open(self, session: str) -> None:
        if self.why is not None:
            raise self.why

    def write(self, lines: Sequence[bytes]) -> None:
        if self.error is not None:
            self.why = refusal()
        super().write(lines)


def test_an_entry_that_the_first_may_have_is_not_denied_when_none_can_be_opened(
    make_handler: MakeHandler,
) -> None:
    """The first wrote and failed; then neither it nor the second one can be opened."""
    one, two = Unopenable(refusal("unknown")), Unopenable()
    two.why = refusal()

    assert fates([call(make_handler(FirstOf(one, two)))]) == ["unknown"]


def test_an_entry_that_the_first_may_have_is_not_denied_by_very_many_others(
    make_handler: MakeHandler,
) -> None:
    """More than a batch is tried at."""
    sinks = [BrokenSink(refusal("no" if number else "unknown")) for number in range(12)]

    assert fates([call(make_handler(FirstOf(*sinks)))]) == ["unknown"]


# The first of several.


def asking(step: Step) -> Step:
    """Answer the questions of `check`, which come without entries; do the step with entries."""

    def answer(exchange: Exchange) -> None:
        request = exchange.read()
        status = 201 if request.line.startswith("POST") else 200
        (step if request.body else scripted.answer(status, scripted.SEQ_BODY))(exchange)

    return answer


@pytest.mark.parametrize("count", [1, 2, 3])
def test_servers_that_only_look_healthy_do_not_keep_entries_from_a_file(
    count: int, soon: None, make_handler: MakeHandler, tmp_path: Path
) -> None:
    """Each says that it is well whenever it is asked, and none takes an entry, until one does."""
    hangs = threading.Event()
    hangs.set()

    def step(exchange: Exchange) -> None:
        (scripted.never_answer() if hangs.is_set() else accepted())(exchange)

    with ScriptedServer([asking(step)]) as server:
        sinks = [SeqSink(server.url, timeout=0.06) for _ in range(count)]
        handler = make_handler(FirstOf(*sinks, FileSink(tmp_path)))
        answers = []
        for _ in range(3):
            answers.append(call(handler))
            time.sleep(0.03)  # so that the servers are asked again

        assert fates(answers) == ["ok"] * 3
        assert list(tmp_path.iterdir())
        assert not server.stored

        hangs.clear()
        for sink in sinks:
            sink.timeout = 10
        assert fates([call(handler) for _ in range(3)]) == ["ok"] * 3
        eventually(lambda: fates([call(handler)]) == ["ok"] and bool(server.stored))


class Interrupted(MemorySink):
    """Interrupts the thread, once, in a call to one of its methods."""

    def __init__(self, verb: str) -> None:
        super().__init__()
        self.verb: str | None = verb

    def _do(self, verb: str) -> None:
        if verb == self.verb:
            self.verb = None
            raise KeyboardInterrupt

    def open(self, session: str) -> None:
        self._do("open")

    def write(self, lines: Sequence[bytes]) -> None:
        self._do("write")
        super().write(lines)

    def close(self) -> None:
        self._do("close")


@pytest.mark.parametrize("verb", ["open", "write"])
@pytest.mark.parametrize("later", ["both", "first", "second"])
def test_an_interrupt_does_not_keep_the_calls_after_it_from_any_sink(
    later: str, verb: str, soon: None, make_handler: MakeHandler
) -> None:
    """The first failed, Ctrl-C strikes in the second; then one of them works, or both do."""
    first, second = BrokenSink(refusal("unknown")), Interrupted(verb)
    handler = make_handler(FirstOf(first, second))
    assert isinstance(call(handler), KeyboardInterrupt)
    if later != "second":
        first.error = None
    if later == "first":
        second.write = BrokenSink(refusal()).write  # type: ignore[method-assign]

    answers = []
    for _ in range(3):
        answers.append(call(handler))
        time.sleep(0.03)

    assert fates(answers) == ["ok"] * 3


def test_a_doubt_from_before_an_interrupt_is_not_the_next_entrys(
    soon: None, make_handler: MakeHandler
) -> None:
    """What the first may have stored was another call's."""
    first, second = BrokenSink(refusal("unknown")), Interrupted("write")
    handler = make_handler(FirstOf(first, second))
    call(handler)
    first.error = refusal()
    second.write = BrokenSink(refusal()).write  # type: ignore[method-assign]

    assert fates([call(handler)]) == ["no"]


# Proxies.


def tunnel(port: int) -> Step:
    """Grant a CONNECT, and pass all on to a port of this machine."""

    def step(exchange: Exchange) -> None:
        exchange.read()
        with socket.create_connection(("127.0.0.1", port)) as behind:
            exchange.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            other = {exchange.socket: behind, behind: exchange.socket}
            while not exchange.server.ended.is_set():
                for sock in select.select(list(other), [], [], 0.02)[0]:
                    try:
                        data = sock.recv(65_536)
                    except OSError:
                        exchange.reset()
                    if not data:
                        exchange.close()
                    other[sock].sendall(data)

    return step


DRIP = storing(scripted.drip_header(0.05))
LOST = storing(scripted.reset_after_reading())
PLAIN: dict[str, tuple[Step, str]] = {
    "success": (accepted(), "ok"),
    "dripped": (DRIP, "unknown"),
    "stored, then reset": (LOST, "unknown"),
    "stored, then 502": (storing(scripted.answer(502)), "unknown"),
    "reset on connect": (scripted.on_connect_reset(), "unknown or no"),
}


@pytest.mark.parametrize("case", PLAIN)
def test_an_entry_by_way_of_a_proxy(
    case: str, no_proxies: None, make_handler: MakeHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline holds, and what it may have passed on may be stored."""
    step, fate = PLAIN[case]
    with ScriptedServer([step]) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        url = "http://logs.example.com/in"
        sink = HttpSink(
            url, timeout=5 if fate == "ok" else SHORT, allow_insecure=True,
            environment_proxies=True,
        )  # fmt: skip
        handler = make_handler(sink)
        answers = [call(handler) for _ in range(2 if fate == "ok" else 1)]

        assert set(fates(answers)) <= set(fate.split(" or "))
        if fate == "ok":
            assert {request.line for request in proxy.requests} == {f"POST {url} HTTP/1.1"}
            assert proxy.connections == 1


GRANTED = b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300 + b"\r\n\r\n"
CONNECTS: dict[str, tuple[Callable[[int], Step], Step, str]] = {
    "success": (tunnel, accepted(), "ok"),
    "dripped grant": (lambda _: scripted.drip(GRANTED, 0.05), accepted(), "no"),
    "refused": (lambda _: scripted.answer(403), accepted(), "no"),
    "reset": (lambda _: scripted.reset_after_reading(), accepted(), "no"),
    "201 to the CONNECT": (lambda _: scripted.raw(ACCEPTED * 2), accepted(), "no"),
    "silent handshake": (tunnel, scripted.on_connect_silence(), "no"),
    "dripped": (tunnel, DRIP, "unknown"),
    "stored, then reset": (tunnel, LOST, "unknown"),
}


@pytest.mark.parametrize("case", CONNECTS)
def test_an_entry_by_way_of_a_tunnel(
    case: str,
    no_proxies: None,
    make_handler: MakeHandler,
    monkeypatch: pytest.MonkeyPatch,
    certificates: Certificates,
) -> None:
    """The deadline holds from the CONNECT on, of which the server gets nothing, nor it the key."""
    make_step, step, fate = CONNECTS[case]
    with (
        ScriptedServer([step], tls=certificates.good.server_context()) as server,
        ScriptedServer([make_step(server.port)]) as proxy,
    ):
        monkeypatch.setenv("https_proxy", proxy.url)
        sink = HttpSink(
            server.url, api_key=SECRET, timeout=5 if fate == "ok" else SHORT,
            ca=certificates.ca, environment_proxies=True,
        )  # fmt: skip
        handler = make_handler(sink)
        answers = [call(handler) for _ in range(2 if fate == "ok" else 1)]

        assert set(fates(answers)) == {fate}, answers
        assert bool(server.stored) == (fate != "no")
        asked = {request.line.rpartition(" ")[0] for request in proxy.requests}
        assert asked == {f"CONNECT 127.0.0.1:{server.port}"}
        assert SECRET not in str([request.headers for request in proxy.requests])
        if fate == "ok":
            assert proxy.connections == 1


# Time.


def test_the_handshake_has_what_connecting_left_of_the_deadline(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connecting took nearly all of it (the clock jumps); a silent handshake ends soon after."""
    jumps = [0.0]

    def clock() -> float:
        return time.monotonic() + sum(jumps)

    class Slow(_exchange._Socket):
        def connect(self, address: Any) -> None:
            super().connect(address)
            jumps.append(19.8)

    monkeypatch.setattr(_exchange, "_Socket", Slow)
    monkeypatch.setattr(_exchange, "monotonic", clock)
    for module in (http_module, _delivery):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, time=time.time))
    context = certificates.good.server_context()
    with ScriptedServer([scripted.on_connect_silence()], tls=context) as server:
        begun = time.monotonic()
        error = failure(HttpSink(server.url, timeout=20, ca=certificates.ca))

        assert time.monotonic() - begun < 15
        assert len(jumps) == 2
        assert error.persisted == "no"


def test_closing_with_outcomes_does_not_wait_for_a_silent_server_for_each(
    make_handler: MakeHandler,
) -> None:
    """It has the time of one call, and says how many could not be written."""
    silent = [True]

    def step(exchange: Exchange) -> None:
        (scripted.never_answer() if silent else accepted())(exchange)

    with ScriptedServer([step]) as server:
        sink = SeqSink(server.url, timeout=0.2)
        handler = make_handler(sink, timeout=0.2)
        for _ in range(12):
            handler.submit({"action": "A"}, "Complete")
        (answer,) = in_threads([handler.close])

        assert isinstance(answer, AuditWriteError)
        assert "12 outcome(s)" in str(answer)
        assert len(server.requests) <= 5

        silent.clear()
        sink.timeout = 10
        handler.close()
        assert [action for _, action, _ in numbered(server.stored)].count("A") == 12


RETRIES = {
    "0": "0",
    "past": "Mon, 01 Jan 2024 00:00:00 GMT",
    "a far year": "Fri, 31 Dec 99999999999 23:59:59 GMT",
    "a far zone": "Fri, 31 Dec 9999 23:59:59 -2359",
    "many digits": "9" * 5000,
    "a digit that is none": "²",
    "not a number": "nan",
    "nothing": "",
}


@pytest.mark.parametrize("case", RETRIES)
def test_a_strange_pause_floods_no_server_and_breaks_no_call(
    case: str, make_handler: MakeHandler
) -> None:
    """The call ends as every one does that the server is too busy for."""
    headers = [("Retry-After", RETRIES[case])]
    with ScriptedServer([scripted.answer(429, b"", headers)]) as server:
        answer = call(make_handler(SeqSink(server.url, timeout=0.2)))

        assert isinstance(answer, AuditWriteError), answer
        assert "no confirmation within 0.2 s" in str(answer)
        assert len(server.requests) < 25


# The older page of Seq.


def page(exchange: Exchange) -> str:
    return exchange.read().line.split()[1]


def test_a_server_that_was_not_ready_once_is_asked_at_the_newer_page_again(
    make_handler: MakeHandler,
) -> None:
    """Both pages are away while it starts; it has the newer one only."""
    starting = [True, True]

    def step(exchange: Exchange) -> None:
        known = page(exchange) == "/ingest/clef"
        (accepted() if known and not starting else scripted.answer(404))(exchange)
        del starting[:1]

    with ScriptedServer([step]) as server:
        handler = make_handler(SeqSink(server.url, timeout=5))

        assert fates([call(handler) for _ in range(3)]) == ["no", "ok", "ok"]
        assert len(server.requests) == 4


def test_a_server_that_was_renewed_is_asked_at_the_newer_page(make_handler: MakeHandler) -> None:
    """It had the older page only, and then the newer one only."""
    known = ["/api/events/raw?clef"]

    def step(exchange: Exchange) -> None:
        (accepted() if page(exchange) in known else scripted.answer(404))(exchange)

    with ScriptedServer([step]) as server:
        handler = make_handler(SeqSink(server.url, timeout=5))
        before = [call(handler), call(handler)]
        known[:] = ["/ingest/clef"]
        after = [call(handler) for _ in range(3)]

        assert fates(before) == ["ok", "ok"]
        assert fates(after)[1:] == ["ok", "ok"]


# What cannot work is told of when it is given.

URLS = ["https://*", "https://..:1", "https://.example.com", "https://☃.example:1",
        "https://example..com", "https://[::1", "https://a:99999",
        "http:/127.0.0.1", "ftp://example.com", "", None, 5, b"https://example.com"]  # fmt: skip


@pytest.mark.parametrize("kind", SINKS)
@pytest.mark.parametrize("url", URLS)
def test_a_url_that_no_request_can_be_sent_to_is_told_of(url: Any, kind: Any) -> None:
    """Before the first entry, and as what it is."""
    with pytest.raises(AuditConfigurationError, match="looks like https://"):
        kind(url)


def test_a_host_that_no_name_can_be_is_an_error_like_another(make_handler: MakeHandler) -> None:
    """Its look-up raises something else than others."""
    sink = SeqSink(f"https://{'a' * 64}.example", timeout=0.05)

    assert fates([call(make_handler(sink))]) == ["no"]


ARGUMENTS: list[dict[str, Any]] = [
    {"confirm": []}, {"confirm": ()}, {"confirm": 200}, {"confirm": ["201"]}, {"confirm": "201"},
    {"confirm": None}, {"confirm": [True]}, {"accept": "x"}, {"max_payload_bytes": 0},
    {"max_event_bytes": 0}, {"max_payload_bytes": "1 MiB"}, {"max_event_bytes": None},
    {"format": ["x"]}, {"format": "x"}, {"format": None}, {"headers": {1: "x"}},
    {"headers": {"X": 1}}, {"headers": {"X": "a\r\nY: b"}}, {"headers": {"X Y": "a"}},
    {"headers": {"": "a"}}, {"headers": ["X: a"]}, {"headers": "X: a"}, {"health": "nonsense"},
    {"health": 5}, {"timeout": 0}, {"timeout": float("nan")}, {"timeout": "5"}, {"ca": "/nowhere"},
    {"ca": 5}, {"api_key": 5}, {"api_key": ""}, {"api_key_file": 5},
]  # fmt: skip


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=repr)
def test_an_argument_that_cannot_work_is_told_of(arguments: dict[str, Any]) -> None:
    """Before the first entry, and as what it is."""
    with pytest.raises(AuditConfigurationError):
        HttpSink("https://logs.example.com", **arguments)


@pytest.mark.parametrize(
    "name",
    ["Content-Length", "host", "Transfer-Encoding", "IDEMPOTENCY-KEY", "Connection", "Expect",
     "Content-Encoding", "Upgrade"],
)  # fmt: skip
def test_a_header_that_is_ours_cannot_be_given(name: str) -> None:
    """Another length or host would have the server read something else."""
    with pytest.raises(AuditConfigurationError, match=f"the header {name} is not yours"):
        HttpSink("https://logs.example.com", headers={name: "5"})


# What is seen of the key.


@pytest.mark.parametrize("way", ["plain", "tls", "proxy", "tunnel"])
def test_somebody_who_debugs_other_connections_does_not_see_the_key(
    way: str,
    no_proxies: None,
    make_handler: MakeHandler,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    certificates: Certificates,
) -> None:
    """`http.client` prints whole requests when it is told to; nothing of ours, in either case."""
    monkeypatch.setattr(http.client.HTTPConnection, "debuglevel", 1)
    tls = certificates.good.server_context() if way in ("tls", "tunnel") else None
    proxies = way in ("proxy", "tunnel")
    with ScriptedServer([accepted()], tls=tls) as server, contextlib.ExitStack() as stack:
        if proxies:
            step = accepted() if way == "proxy" else tunnel(server.port)
            proxy = stack.enter_context(ScriptedServer([step]))
            monkeypatch.setenv("https_proxy" if tls else "http_proxy", proxy.url)
        ca = certificates.ca if tls else None
        sink = SeqSink(server.url, api_key=SECRET, ca=ca, environment_proxies=proxies)

        assert fates([call(make_handler(sink))]) == ["ok"]
        assert tuple(capsys.readouterr()) == ("", "")
