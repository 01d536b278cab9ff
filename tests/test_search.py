"""The command `search`, as an investigator, a script and an attacker use it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reading import session_files
from running import HANG
from terminal import COLOUR, HIDDEN, big, run, run_on_terminal, start

from structlog_audit import AuditHandler, outcome
from structlog_audit.outcome import Row, rows
from structlog_audit.reader import entries, find_files
from structlog_audit.selection import select

pytest.importorskip("click", reason="the command line is an extra")

Place = tuple[str, int]

QUERIES: list[tuple[list[str], str, str]] = [
    (["--user", "acme-user-3"], '.userId == "acme-user-3"', "userId = 'acme-user-3'"),
    (["--company", "globex"], '.companyId == "globex"', "companyId = 'globex'"),
    (["--company", "globex", "--event", "Fail"], '.companyId == "globex" and .event == "Fail"',
     "companyId = 'globex' AND event = 'Fail'"),
    (["--action", "Pod*"], '.action | startswith("Pod")', "action LIKE 'Pod%'"),
    (["--action", "*Create"], '.action | endswith("Create")', "action LIKE '%Create'"),
    (["--action", "Pod?reate"], '.action | test("^Pod.reate$")', "action LIKE 'Pod_reate'"),
    (["--type", "REST", "--event", "begin"], '.type == "REST" and .event == "Begin"',
     "type = 'REST' AND event = 'Begin'"),
    (["--ip", "10.2.1.0/24"], '.clientIpAddress // "" | startswith("10.2.1.")',
     "clientIpAddress LIKE '10.2.1.%'"),
    (["--since", "2025-01-20"], '.time >= "2025-01-20"', "time >= '2025-01-20'"),
    (["--until", "2025-01-02"], '.time < "2025-01-03"', "time < '2025-01-03'"),
    (["--since", "2025-01-07T08:00", "--until", "2025-01-07T09:00"],
     '.time >= "2025-01-07T08:00" and .time < "2025-01-07T09:00"',
     "time >= '2025-01-07T08:00' AND time < '2025-01-07T09:00'"),
    (["--data", "status=500"], ".data.status == 500", "CAST(data->>'$.status' AS INT) = 500"),
    (["--data", "objectRef.resource=secrets", "--company", "acme"],
     '.data.objectRef.resource? == "secrets" and .companyId == "acme"',
     "data->>'$.objectRef.resource' = 'secrets' AND companyId = 'acme'"),
    (["--data", "responseStatus.code=201"], ".data.responseStatus.code? == 201",
     "CAST(data->>'$.responseStatus.code' AS INT) = 201"),
    (["--text", "nginx-deployment"], '[.. | strings] | any(contains("nginx-deployment"))',
     "CAST(data AS VARCHAR) LIKE '%nginx-deployment%'"),
    (["--own", "--action", "AuditSession", "--event", "Complete"],
     '.action == "AuditSession" and .event == "Complete"',
     "action = 'AuditSession' AND event = 'Complete'"),
    (["--user", "nobody"], '.userId == "nobody"', "userId = 'nobody'"),
]  # fmt: skip


def found_by_search(month: Path, arguments: list[str]) -> list[Place]:
    done = run("search", month, "--json", *arguments)
    assert done.stderr == ""
    places = [(e["session"], e["sequence"]) for e in map(json.loads, done.stdout.splitlines())]
    assert done.returncode == (0 if places else 1)
    return sorted(places)


@pytest.mark.parametrize(("arguments", "jq", "sql"), QUERIES, ids=[q[1] for q in QUERIES])
def test_jq_gives_the_same_answer(month: Path, arguments: list[str], jq: str, sql: str) -> None:
    """Entry by entry, over the same files."""
    if shutil.which("jq") is None:
        pytest.skip("needs jq")
    own = "" if "--own" in arguments else 'select(.action != "AuditSession") | '
    program = f"{own}select({jq}) | [.session, .sequence]"
    done = subprocess.run(["jq", "-c", program, *session_files(month)], capture_output=True,
                          text=True, timeout=HANG, check=True)  # fmt: skip
    answer = sorted(tuple(json.loads(line)) for line in done.stdout.splitlines())
    assert found_by_search(month, arguments) == answer


def test_duckdb_gives_the_same_answers(month: Path) -> None:
    """Entry by entry, over the same files, to every query."""
    duckdb = pytest.importorskip("duckdb", reason="needs DuckDB")
    names = ("time", "userId", "companyId", "clientIpAddress", "type", "action", "event", "session")
    columns = {**dict.fromkeys(names, "VARCHAR"), "sequence": "BIGINT", "data": "JSON"}
    files = str(month / "audit-2*.ndjson")
    log = duckdb.read_json(files, format="newline_delimited", columns=columns)
    for arguments, _, sql in QUERIES:
        own = "true" if "--own" in arguments else "action <> 'AuditSession'"
        answer = log.filter(f"({sql}) AND {own}").project("session, sequence").fetchall()
        assert found_by_search(month, arguments) == sorted(answer), sql


def test_json_is_the_exact_lines(month: Path) -> None:
    """Byte by byte, file by file."""
    done = run("search", month, "--json", "--own")
    whole = b"".join(path.read_bytes() for path in session_files(month))
    assert done.stdout.encode() == whole


def test_one_command_answers_who_did_what_from_where_and_whether_it_succeeded(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """What did this user do to that company, from where, and did it succeed?"""
    one = {"user_id": "2780", "company_id": "2350", "client_ip": "192.0.2.7"}
    for number, (action, event) in enumerate(
        [("InvoiceDelete", "Complete"), ("InvoicePay", "Fail"), ("InvoiceSend", "Abandon")]
    ):
        entry = {**one, "action": action, "operation_id": f"op-{number}"}
        handler.record({**entry, "data": {"invoiceId": f"inv_{number}"}}, "Begin")
        handler.record({**entry, "data": {"why": f"because {number}"}}, event)  # type: ignore[arg-type]
    handler.record({**one, "action": "InvoiceRead", "operation_id": "op-9"}, "Begin")
    handler.record({**one, "action": "Login"})
    handler.record({"user_id": "2780", "company_id": "1", "action": "Other"})
    done = run("search", audit_dir, "--user", "2780", "--company", "2350", "--since", "today")
    assert (done.returncode, done.stderr) == (0, "")
    told = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines()]
    assert [row[1:4] for row in told] == [["2780", "2350", "192.0.2.7"]] * 5
    assert [re.sub(r" -?[\d.]+ \w+$", "", row[4]) for row in told] == [
        "Complete", "Fail", "Abandon", "Record", "no outcome"
    ]  # fmt: skip
    assert [row[5] for row in told] == [
        "InvoiceDelete", "InvoicePay", "InvoiceSend", "Login", "InvoiceRead"
    ]  # fmt: skip
    assert told[0][6:] == ["invoiceId=inv_0 → why=because 0", "op-0"]
    assert told[1][6:] == ["why=because 1 ← invoiceId=inv_1", "op-1"]


def read_rows(directory: Path, **query: Any) -> list[Row]:
    return list(rows(find_files(directory), select(**query)))


def test_an_outcome_need_not_match_what_was_asked_for(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """Only the Begin has the data; the outcome says how it ended all the same."""
    for number in range(20):
        handler.record(
            {"action": "A", "operation_id": f"o{number}", "data": {"n": number}}, "Begin"
        )
    for number in range(20):
        handler.record({"action": "A", "operation_id": f"o{number}"}, "Fail")
    (row,) = read_rows(audit_dir, data={"n": 7})
    assert (row.status, row.entry.operation_id) == ("Fail", "o7")
    assert [row.status for row in read_rows(audit_dir, event="Begin")] == ["Fail"] * 20
    assert [row.status for row in read_rows(audit_dir, event="Fail")] == ["Fail"] * 20


def test_who_asks_for_an_outcome_gets_its_begin_as_well(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """What failed, and for how long it ran, also where only the outcome has what was asked for."""
    for number in range(20):
        name = f"o{number}"
        handler.record({"action": "A", "operation_id": name, "data": {"n": number}}, "Begin")
        handler.record({"action": "Within", "operation_id": name, "data": {"status": 500}})
        if number == 5:
            handler.reopen()
        event = "Fail" if number % 2 else "Complete"
        handler.record({"action": "A", "operation_id": name, "data": {"status": 500}}, event)  # type: ignore[arg-type]
    handler.record({"action": "A", "operation_id": "none"}, "Fail")

    found = read_rows(audit_dir, event="Fail", data={"status": 500})

    assert [row.entry.data for row in found] == [{"n": number} for number in range(1, 20, 2)]
    assert {(row.entry.event, row.status) for row in found} == {("Begin", "Fail")}
    assert all(row.duration is not None for row in found)
    (alone,) = read_rows(audit_dir, event="Fail", operation="none")
    assert (alone.entry.event, alone.status, alone.duration) == ("Fail", "Fail", None)


def test_the_begins_that_are_kept_are_bounded(
    handler: AuditHandler, audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest goes first, and those that ended in another way make room."""
    monkeypatch.setattr(outcome, "MAX_WAITING", 1_000)
    for number in range(10):
        handler.record({"action": "A", "operation_id": f"o{number}"}, "Begin")
    handler.record({"action": "A", "operation_id": "o9"}, "Complete")
    handler.record({"action": "A", "operation_id": "o8"}, "Fail")
    handler.record({"action": "A", "operation_id": "o0"}, "Fail")
    assert [row.entry.event for row in read_rows(audit_dir, event="Fail")] == ["Begin", "Fail"]


def test_an_outcome_in_the_next_session_is_found(handler: AuditHandler, audit_dir: Path) -> None:
    """The session may end within an operation, and names tell nothing of their order."""
    for number in range(10):
        handler.record({"action": "A", "operation_id": f"o{number}", "user_id": "u"}, "Begin")
        handler.reopen()
        handler.record({"action": "A", "operation_id": f"o{number}"}, "Complete")
    assert len(session_files(audit_dir)) == 11
    assert [row.status for row in read_rows(audit_dir, user="u")] == ["Complete"] * 10


def test_an_outcome_that_comes_too_late_for_what_was_asked_is_found_in_the_same_file(
    month: Path,
) -> None:
    """The moment that ends the selection may lie between a Begin and its outcome."""
    begin = next(entries(month, event="Begin"))
    until = begin.time.replace(microsecond=begin.time.microsecond + 1)
    found = read_rows(month, until=until, operation=begin.operation_id)
    assert [row.outcome is not None for row in found] == [True]


def test_what_waits_for_outcomes_is_bounded(
    handler: AuditHandler, audit_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest is then told without, and says so; its outcome comes by itself."""
    monkeypatch.setattr(outcome, "MAX_WAITING", 1_000)
    for number in range(10):
        handler.record({"action": "A", "operation_id": f"o{number}"}, "Begin")
    handler.record({"action": "A", "operation_id": "o0"}, "Complete")
    handler.record({"action": "A", "operation_id": "o9"}, "Complete")
    found = [(row.entry.operation_id, row.status) for row in read_rows(audit_dir)]
    assert found[0] == ("o0", "not known")
    assert ("o0", "Complete") in found
    assert ("o9", "Complete") in found
    assert len(found) == 11


def test_exit_statuses_are_those_of_grep(month: Path, tmp_path: Path) -> None:
    """0: found. 1: nothing. 2: wrong use, or something could not be read."""
    assert run("search", month, "--company", "acme").returncode == 0
    assert run("search", month, "--company", "none").returncode == 1
    (tmp_path / "x.ndjson").write_bytes(b"\x1b[31mno JSON\n" * 30)
    done = run("search", tmp_path / "x.ndjson", month, "--company", "acme")
    assert (done.returncode, done.stderr) == (0, "")  # such a line cannot match
    done = run("search", tmp_path / "x.ndjson", "--since", "2020-01-01")
    assert done.returncode == 2
    assert f"cannot read {tmp_path}/x.ndjson:1: it is no JSON\n" in done.stderr
    assert "cannot read 20 more" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--since", "soon"], ["--ip", "x"], ["--event", "x"], ["--data", "x"], ["--data", "=x"],
        ["--since", "2025-01-02", "--until", "2025-01-01"], ["--text", ""], ["--nothing"],
        ["--user", ""], ["--company", ""], ["--action", ""], ["--session", ""],
        ["--operation", ""], ["--type", ""],
    ],
)  # fmt: skip
def test_wrong_use_is_told_without_a_traceback(month: Path, arguments: list[str]) -> None:
    """An error, and what to do."""
    done = run("search", month, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "rror" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [["search"], ["tail"], ["show", "x"], ["report"]])
def test_a_directory_without_a_log_is_no_answer(command: list[str], tmp_path: Path) -> None:
    """A mistyped path is told as what it is: 1 would say that nobody did it."""
    (tmp_path / "audit").mkdir()
    (tmp_path / "notes.txt").touch()
    done = run(*command, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"there is no audit log in {tmp_path}" in done.stderr


def test_a_log_whose_sessions_have_all_gone_is_a_log(month: Path, tmp_path: Path) -> None:
    """What is left of it is its journal."""
    (tmp_path / "audit-journal.ndjson").write_bytes((month / "audit-journal.ndjson").read_bytes())
    assert run("search", tmp_path).returncode == 1


def test_a_path_that_does_not_exist_is_told(tmp_path: Path) -> None:
    """Whatever its name has in it."""
    done = run("search", tmp_path / "a\x1b[31m\u202eb")
    assert done.returncode == 2
    assert not HIDDEN.search(done.stderr)
    assert "hint: name a directory" in done.stderr


def test_help_has_an_example() -> None:
    """And says what times mean, and how it ends."""
    for name in ("search", "tail", "show"):
        told = " ".join(run(name, "--help").stdout.split())
        assert "Example: structlog-audit" in told
        assert "xit status" in told, name


HOSTILE = (
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \r\n\t\x00\x7f\x9b31m \u202egpj.exe\u202c \u2066x\u2069 "
    "\u200e\u200f\u2028\u2029 <script>alert(1)</script> [bold]x[/] :smile: e\u0301 日本語 😀"
)


@pytest.fixture
def hostile(handler: AuditHandler, audit_dir: Path) -> Path:
    """A log with an operation that is hostile in every field."""
    names = ("action", "user_id", "company_id", "service_id", "client_ip", "remote_address",
             "forwarded_for", "type", "request_id", "trace_id", "span_id")  # fmt: skip
    fields: dict[str, Any] = dict.fromkeys(names, HOSTILE)
    data = {HOSTILE: HOSTILE, "big": HOSTILE + "x" * 200_000, "deep": [[{"a": [HOSTILE]}]]}
    fields["operation_id"] = f"op{HOSTILE}"
    handler.record({**fields, "data": data}, "Begin")
    handler.record({**fields, "data": data}, "Fail")
    return audit_dir


COMMANDS: list[Callable[[Path], list[object]]] = [
    lambda log: ["search", log],
    lambda log: ["tail", log],
    lambda log: ["show", f"{next(entries(log)).session}:2", log],
]


@pytest.mark.parametrize("make", COMMANDS, ids=["search", "tail", "show"])
def test_nothing_hostile_reaches_a_pipe_or_a_terminal(
    hostile: Path, make: Callable[[Path], list[object]]
) -> None:
    """It is spelled out, and cut with a mark where it is long; colours are ours alone."""
    arguments = make(hostile)
    piped = run(*arguments).stdout
    shown = run_on_terminal(*arguments)
    plain = run_on_terminal(*arguments, NO_COLOR="1")
    assert COLOUR.search(shown)
    assert "\x1b[3" not in plain
    for text in (piped, COLOUR.sub("", shown), COLOUR.sub("", plain)):
        assert not HIDDEN.search(text)
        assert "\\u001b[31mred" in text
        assert "…" in text
        assert max(map(len, text.splitlines())) < 6_000
    if arguments[0] == "show":
        assert "<script>alert(1)</script> [bold]x[/] :smile: e\u0301 日本語 😀" in piped


@pytest.mark.parametrize("make", COMMANDS, ids=["search", "tail", "show"])
def test_json_on_a_terminal_shows_what_is_hidden_and_stays_the_same_json(
    hostile: Path, make: Callable[[Path], list[object]]
) -> None:
    """In a pipe it is the exact line; on a terminal, an equal one."""
    exact = b"".join(entry.line + b"\n" for entry in entries(hostile)).decode()
    assert run(*make(hostile), "--json").stdout == exact
    shown = run_on_terminal(*make(hostile), "--json")
    assert not HIDDEN.search(shown)
    assert list(map(json.loads, shown.split("\n")[:-1])) == list(
        map(json.loads, exact.split("\n")[:-1])
    )


def test_rows_fit_the_terminal(month: Path) -> None:
    """One line each, if it is wide enough for who, what and when."""
    shown = COLOUR.sub("", run_on_terminal("search", month, "--company", "acme", columns=150))
    assert shown
    assert max(map(len, shown.splitlines())) <= 150


def test_each_match_is_printed_at_once(month: Path) -> None:
    """While the rest has not been written yet."""
    (line, *_) = (entry.line for entry in entries(month))
    with start("search", "-", "--json", "--company", json.loads(line)["companyId"]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(3):
            process.stdin.write(line + b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == line + b"\n"
        process.stdin.close()
        assert process.wait(HANG) == 0


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_closed_pipe_ends_it_without_a_word(month: Path, tmp_path: Path, more: list[str]) -> None:
    """As `| head -1` does."""
    path = big(tmp_path, session_files(month)[0], 2_000_000)
    with start("search", path, *more) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(HANG) == 141
        assert process.stderr.read() == b""


def test_ctrl_c_ends_it_without_a_word(month: Path) -> None:
    """With the status that shells give it."""
    line = next(entries(month)).line
    with start("search", "-", "--json") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(line + b"\n")
        process.stdin.flush()
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG) == 130
        assert process.stderr.read() == b""
        process.stdin.close()


@pytest.mark.parametrize("query", [{"user": "nobody"}, {"event": "Begin"}, {}])
def test_memory_does_not_grow_with_the_log(
    month: Path, tmp_path: Path, query: dict[str, Any]
) -> None:
    """Thirty megabytes are read with less than five, whatever matches."""
    path = big(tmp_path, session_files(month)[0], 30_000_000)
    tracemalloc.start()
    try:
        for _ in entries(path, **query):
            pass
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
