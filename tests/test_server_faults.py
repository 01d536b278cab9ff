"""Real proxies, killed and stopped servers: confirmed is stored, once, and what is not raises."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.runner import needs
from reading import session_files
from running import HANG, environment, eventually, in_child, in_threads, run_loop, run_well
from servers import processes
from servers.certificates import make_certificates
from servers.processes import SeqServer, haproxy, nginx

from structlog_audit import AuditError, AuditHandler, AuditWriteError, FileSink, FirstOf, SeqSink
from structlog_audit.sinks._exchange import NoAnswer

fault = pytest.mark.fault


@pytest.fixture
def seq(tmp_path: Path) -> Iterator[SeqServer]:
    """A server that keeps Seq's contract."""
    with SeqServer(tmp_path) as server:
        yield server
        assert server.errors() == ""


@contextlib.contextmanager
def recording(url: str, timeout: float = 5.0, **options: Any) -> Iterator[AuditHandler]:
    """A handler that posts there, and does not wait at its end for a server that is gone."""
    sink = SeqSink(url, timeout=timeout, **options)
    handler = AuditHandler(sink, timeout=HANG)
    yield handler
    sink.timeout = 0.05
    with contextlib.suppress(AuditError):
        handler.close()


def attempt(handler: AuditHandler, number: int) -> AuditError | None:
    """Record an entry with a number; return what it raised."""
    try:
        handler.record({"action": "A", "number": number})
    except AuditError as error:
        return error
    return None


def numbers(events: list[dict[str, Any]]) -> list[int]:
    """Return the numbers of the entries, one for each identity."""
    once = {(event["AuditSession"], event["SequenceNumber"]): event for event in events}
    return [event["number"] for event in once.values() if "number" in event]


def check_order(events: list[dict[str, Any]]) -> None:
    """A session's events come in order, and what comes twice is the same to the last byte."""
    last: dict[str, int] = {}
    seen: dict[tuple[str, int], str] = {}
    for event in events:
        session, sequence = event["AuditSession"], event["SequenceNumber"]
        text = seen.setdefault((session, sequence), json.dumps(event))
        assert text == json.dumps(event)
        assert sequence <= last.get(session, 0) + 1
        last[session] = max(sequence, last.get(session, 0))


def check_stored_in_doubt(seq: SeqServer, error: AuditError | None) -> None:
    """The first entry is stored, and its caller was told that it may be."""
    assert isinstance(error, AuditWriteError)
    assert error.persisted == "unknown"
    assert numbers(seq.stored()) == [1]
    check_order(seq.stored())


@fault
def test_an_answer_that_a_proxy_replaces_confirms_nothing(seq: SeqServer, tmp_path: Path) -> None:
    """The server has stored it, and the client cannot know."""
    with haproxy(tmp_path, processes.replacing_answers(seq.port, 502)) as proxy:
        with recording(proxy.url, 2.0) as handler:
            error = attempt(handler, 1)

    check_stored_in_doubt(seq, error)


@fault
@pytest.mark.parametrize("kind", ["dropping_answers", "closing_on_answer"])
def test_an_answer_that_is_lost_leaves_the_fate_unknown(
    kind: str, seq: SeqServer, tmp_path: Path
) -> None:
    """The same identity is sent again, so that it can be told apart."""
    with haproxy(tmp_path, getattr(processes, kind)(seq.port)) as proxy:
        with recording(proxy.url, 2.0) as handler:
            error = attempt(handler, 1)

    check_stored_in_doubt(seq, error)


@fault
def test_an_answer_that_comes_too_late_for_a_proxy(seq: SeqServer, tmp_path: Path) -> None:
    """504, while the server is stopped; then it goes on, and the call is confirmed."""
    with haproxy(tmp_path, processes.impatient(seq.port, 100)) as proxy:
        with recording(proxy.url, 20.0) as handler:
            seq.stop()
            timer = threading.Timer(0.5, seq.cont)
            timer.start()
            assert attempt(handler, 1) is None
            timer.join()

    check_order(seq.stored())
    assert numbers(seq.stored()) == [1]


@fault
@pytest.mark.parametrize("retry_after", [None, 1])
def test_a_limit_on_the_rate_is_waited_for(
    retry_after: int | None, seq: SeqServer, tmp_path: Path, exchanges: list[Any]
) -> None:
    """As long as there is time; then the call fails, and nothing was stored."""
    with haproxy(tmp_path, processes.limiting(seq.port, 2, retry_after)) as proxy:
        with recording(proxy.url, 20.0) as handler:
            assert [attempt(handler, number) for number in (1, 2)] == [None, None]
            sink: Any = handler.sink
            sink.timeout = 1.5
            error = attempt(handler, 3)
            last = exchanges[-1]

    assert isinstance(error, AuditWriteError)
    if isinstance(last, NoAnswer):  # to the last request, begun just before the end
        assert "no answer in time" in str(error)
        assert error.persisted == ("unknown" if last.sent else "no")
    else:
        assert "answers 429" in str(error)
        assert error.persisted == "no"
    assert numbers(seq.stored()) == [1, 2]


@fault
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (processes.redirecting("http://127.0.0.1:1"), "a redirect, which is not followed"),
        (processes.welcoming(), "answers 200"),
        (processes.limiting_bodies(1, 10), "refuses the entry with 413"),
    ],
)
def test_a_proxy_that_answers_by_itself(
    config: str, words: str, seq: SeqServer, tmp_path: Path
) -> None:
    """Nothing has reached the server, and nothing is confirmed."""
    with nginx(tmp_path, config) as proxy, recording(proxy.url, 5.0) as handler:
        error = attempt(handler, 1)

    assert isinstance(error, AuditWriteError)
    assert words in str(error)
    assert seq.stored() == []


@fault
def test_a_proxy_that_terminates_tls_and_drips(seq: SeqServer, tmp_path: Path) -> None:
    """The ordinary case, and a slow one."""
    certificates = make_certificates(tmp_path)
    config = processes.terminating_tls(seq.port, certificates.good)
    with nginx(tmp_path, config) as proxy, recording(proxy.url, ca=certificates.ca) as handler:
        assert [attempt(handler, number) for number in range(5)] == [None] * 5
    with nginx(tmp_path, processes.dripping(seq.port, 50)) as proxy:
        with recording(proxy.url, 2.0) as handler:
            attempt(handler, 5)

    check_order(seq.stored())
    assert numbers(seq.stored()) == [0, 1, 2, 3, 4, 5]


@fault
def test_a_refused_line_among_many_is_found_by_the_server_s_contract(seq: SeqServer) -> None:
    """It grows beyond the server's limit as an event, although it did not as a line."""
    with recording(seq.url) as handler:
        sink: Any = handler.sink
        sink._max_event_bytes = 10**7  # so that the server has to say it
        big = {f"Action{'_' * 200}{number}": "x" * 900 for number in range(220)}

        def call(number: int) -> AuditError | None:
            data = big if number == 7 else {}
            try:
                handler.record({"action": "A", "number": number, "data": data})
            except AuditError as error:
                return error
            return None

        handler._renderer.max_entry_bytes = 10**6
        answers = in_threads([lambda number=number: call(number) for number in range(12)])  # type: ignore[misc]

    failed = [number for number, answer in enumerate(answers) if answer is not None]
    stored = seq.stored()
    if failed:  # its event was too long
        assert failed == [7]
        assert "refuses the entry with 400" in str(answers[7])
    assert sorted(numbers(stored)) == [n for n in range(12) if n not in failed]
    check_order(stored)


@fault
def test_a_server_that_is_killed_and_restarted_under_load(seq: SeqServer) -> None:
    """What was confirmed is stored, what was not raised, and nothing else is in between."""
    with recording(seq.url, 1.0) as handler:
        acknowledged: list[int] = []
        failed: list[int] = []
        stop = threading.Event()

        def work(worker: int) -> None:
            for number in range(worker * 10_000, (worker + 1) * 10_000):
                if stop.is_set():
                    return
                (failed if attempt(handler, number) else acknowledged).append(number)

        def some_more() -> None:
            enough = len(acknowledged) + 20
            eventually(lambda: len(acknowledged) >= enough)

        def disturb() -> None:
            try:
                for _ in range(4):
                    some_more()
                    seq.kill()
                    time.sleep(0.2)
                    seq.restart()
                some_more()
            finally:
                stop.set()

        in_threads([lambda n=n: work(n) for n in range(8)] + [disturb])  # type: ignore[misc]

    stored = seq.stored()
    assert len(acknowledged) >= 100
    assert set(acknowledged) <= set(numbers(stored))
    assert set(numbers(stored)) <= {*acknowledged, *failed}
    check_order(stored)


@fault
def test_a_server_that_hangs_fails_its_callers_in_time(seq: SeqServer) -> None:
    """Stopped: connections are accepted and never served. Afterwards the next call works."""
    with recording(seq.url) as handler:
        assert attempt(handler, 1) is None
        seq.stop()
        sink: Any = handler.sink
        sink.timeout = 0.4
        answers = in_threads([lambda number=number: attempt(handler, number) for number in (2, 3)])  # type: ignore[misc]
        seq.cont()
        sink.timeout = 10.0
        assert attempt(handler, 4) is None

    assert all(isinstance(answer, AuditWriteError) for answer in answers)
    assert {1, 4} <= set(numbers(seq.stored()))


@fault
def test_a_black_hole_fails_its_callers_in_time() -> None:
    """Packets vanish: neither a refusal nor an answer, not even to the connection."""
    needs("nft")
    needs("ip")
    script = """
        import sys
        from structlog_audit import AuditHandler, AuditWriteError, SeqSink
        handler = AuditHandler(SeqSink("http://127.0.0.1:5341", timeout=0.5))
        try:
            handler.record({"action": "A"})
        except AuditWriteError as error:
            assert error.persisted == "no", error
            assert "no answer in time" in str(error), error
        else:
            raise SystemExit("it was confirmed")
    """
    run_in_black_hole(script)


BLACK_HOLE = """
ip link set lo up &&
nft add table t &&
nft add chain t c '{ type filter hook output priority 0; }' &&
nft add rule t c tcp dport 5341 drop &&
exec "$@"
"""


def run_in_black_hole(script: str) -> None:
    """Run Python in a network of its own, where packets to port 5341 are dropped."""
    command = ["unshare", "--net", "sh", "-c", BLACK_HOLE, "sh", sys.executable, "-c"]
    done = subprocess.run(
        [*command, textwrap.dedent(script)], capture_output=True, text=True, timeout=HANG,
        env=environment(),
    )  # fmt: skip
    if "Operation not permitted" in done.stderr:
        pytest.skip("no network of its own can be made here")
    assert done.returncode == 0, done.stderr


def test_a_server_that_is_away_is_covered_by_a_directory(seq: SeqServer, tmp_path: Path) -> None:
    """Every call is confirmed by one of them, and each session is in one place."""
    server = SeqSink(seq.url, timeout=10.0)
    handler = AuditHandler(FirstOf(server, FileSink(tmp_path / "audit")), timeout=HANG)
    for number in range(3):
        handler.record({"action": "A", "number": number})
    seq.kill()
    server.timeout = 1.0
    for number in range(3, 6):
        handler.record({"action": "A", "number": number})
    seq.restart()
    handler.close()

    (file,) = session_files(tmp_path / "audit")
    kept = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert [entry["data"]["number"] for entry in kept if entry["event"] == "Record"] == [3, 4, 5]
    assert numbers(seq.stored()) == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_connection_of_its_own(seq: SeqServer) -> None:
    """Two processes that write into one stream would garble each other's requests."""
    with recording(seq.url) as handler:
        attempt(handler, 0)

        def child() -> list[AuditError | None]:
            return [attempt(handler, number) for number in range(100, 120)]

        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(in_child(child)))
        thread.start()
        ours = [attempt(handler, number) for number in range(1, 20)]
        thread.join(HANG)

    assert ours == [None] * 19
    assert results == [[None] * 20]
    assert sorted(numbers(seq.stored())) == [*range(20), *range(100, 120)]
    check_order(seq.stored())
    assert {request["status"] for request in seq.requests()} == {201}


def test_threads_and_tasks_share_posts(seq: SeqServer) -> None:
    """64 threads and 1,000 tasks: in order, each once, with far fewer requests than entries."""
    with recording(seq.url, 20.0) as handler:

        async def task(number: int) -> None:
            await handler.arecord({"action": "A", "number": number})

        async def tasks() -> None:
            await asyncio.gather(*(task(number) for number in range(1_000)))

        def thread(number: int) -> None:
            for turn in range(10):
                assert attempt(handler, 10_000 + number * 100 + turn) is None

        works: list[Callable[[], Any]] = [lambda n=n: thread(n) for n in range(64)]  # type: ignore[misc]
        in_threads([*works, lambda: run_loop(tasks())])

    stored = seq.stored()
    assert Counter(numbers(stored)).most_common(1)[0][1] == 1
    assert len(numbers(stored)) == 1_640
    check_order(stored)
    assert len(seq.requests()) < 800


def test_our_own_traffic_is_not_logged_into_the_chain(seq: SeqServer) -> None:
    """An application that audits all that is logged would wait for itself."""

    class Auditing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            handler.record({"action": "Logged", "number": 99, "text": record.getMessage()})

    root = logging.getLogger()
    root.addHandler(Auditing())
    root.setLevel(logging.DEBUG)
    with recording(seq.url) as handler:
        assert attempt(handler, 1) is None
        logging.getLogger("urllib3.connectionpool").debug("of somebody else's request")

    assert numbers(seq.stored()) == [1, 99]


def test_importing_the_package_touches_no_network_and_no_http_client() -> None:
    """Not even when a sink is made; only the first request, or the check, does."""
    run_well(
        """
        import sys
        import structlog_audit
        structlog_audit.SeqSink("https://logs.example.com")
        loaded = {name.split(".")[0] for name in sys.modules}
        assert not loaded & {"requests", "urllib3", "tenacity", "opentelemetry"}, loaded
        """
    )
