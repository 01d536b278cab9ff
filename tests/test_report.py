"""The report: numbers that json alone confirms, and what it makes of a hostile log."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import year
from hostile_log import SESSION, VALUES, hostile_log, line, write
from reading import session_files
from running import HANG, environment

from structlog_audit import summary
from structlog_audit.activity import ActivityReport
from structlog_audit.reader import entries
from structlog_audit.summary import Summary
from structlog_audit.visible import visible

pytest.importorskip("click", reason="the command line is an extra")
pty = pytest.importorskip("pty", reason="needs terminals and file names as POSIX has them")

Entry = dict[str, Any]


def report(*arguments: object, status: int = 0, **kwargs: Any) -> bytes:
    """Run the command; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "structlog_audit", "report", *map(str, arguments)],
        env=environment(), capture_output=True, timeout=HANG, **kwargs,
    )  # fmt: skip
    assert done.returncode == status, done.stderr.decode()
    assert done.stderr == b""
    return done.stdout


def as_json(*arguments: object, status: int = 0) -> Any:
    """Run the command for a program."""
    return json.loads(report(*arguments, "--format", "json", status=status))


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a week of an audited service."""
    directory = tmp_path_factory.mktemp("year")
    year.make_year(directory / "audit", directory / "keys.pub", days=8, processes=2)
    return directory / "audit"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a log of hostile values, in a directory of a hostile name."""
    return hostile_log(tmp_path_factory.mktemp("hostile") / "\x1b[31m<script>\u202e")


def lines_of(directory: Path) -> list[Entry]:
    """Read all entries but the sessions' own, with json alone."""
    lines = [
        json.loads(each)
        for path in session_files(directory)
        for each in path.read_bytes().splitlines()
    ]
    return [entry for entry in lines if entry["action"] != "AuditSession"]


def counted(lines: Sequence[Entry], *fields: str) -> dict[Any, tuple[int, int]]:
    """Count what was done and what failed, by fields."""

    def key(entry: Entry) -> Any:
        return tuple(entry.get(field) for field in fields)

    done = Counter(key(e) for e in lines if e["event"] in ("Record", "Begin"))
    failed = Counter(key(e) for e in lines if e["event"] == "Fail")
    return {each: (done[each], failed[each]) for each in done.keys() | failed.keys()}


def told(rows: list[Entry], *fields: str) -> dict[Any, tuple[int, int]]:
    """Return what rows of the report tell, as `counted` does."""
    return {tuple(row[f] for f in fields): (row["done"], row["failed"]) for row in rows}


def test_the_numbers_are_those_of_an_independent_count(audit: Path) -> None:
    """By user, action, company, type, and who did what to which company."""
    lines, made = lines_of(audit), as_json(audit)

    assert made["totals"]["entries"] == len(lines) > 100
    kinds = Counter(entry["event"] for entry in lines)
    assert made["totals"]["begun"] == kinds["Begin"]
    assert made["totals"]["completed"] == kinds["Complete"]
    assert made["totals"]["failed"] == kinds["Fail"]
    assert made["totals"]["without_outcome"] == 0
    for table, *fields in (
        ("users", ("user", "userId")),
        ("companies", ("company", "companyId")),
        ("actions", ("action", "action")),
        ("types", ("type", "type")),
        ("who", ("user", "userId"), ("company", "companyId"), ("action", "action")),
    ):
        names, wire = zip(*fields, strict=True)
        assert told(made[table]["rows"], *names) == counted(lines, *wire), table


def test_the_days_are_those_of_the_entries(audit: Path) -> None:
    """Each day has the entries that its lines say, and the days stand in order."""
    days = Counter(entry["time"][:10] for entry in lines_of(audit))

    rows = as_json(audit)["days"]["rows"]

    assert {row["day"]: row["entries"] for row in rows} == days
    assert [row["day"] for row in rows] == sorted(days)


def test_the_sessions_are_those_of_the_files(audit: Path) -> None:
    """With their first and last time, their entries, and how they ended."""
    made = {session["session"]: session for session in as_json(audit)["sessions"]}

    assert len(made) == len(session_files(audit))
    for path in session_files(audit):
        lines = [json.loads(each) for each in path.read_bytes().splitlines()]
        session = made[lines[0]["session"]]
        assert session["file"] == str(path)
        assert session["first"] == lines[0]["time"]
        assert session["last"] == lines[-1]["time"]
        assert session["entries"] == len(lines) - 2
        assert session["process"] == f"{lines[0]['hostname']}:{lines[0]['pid']}"
        assert session["end"] == f"ended: {lines[-1]['data']['reason']}"


def test_the_failures_are_the_latest_first(audit: Path) -> None:
    """With who, what, from where, in which operation, and what its data says of why."""
    failed = sorted(
        (entry for entry in lines_of(audit) if entry["event"] == "Fail"),
        key=lambda entry: entry["time"], reverse=True,
    )  # fmt: skip

    made = as_json(audit)["failures"]

    assert [f["operation"] for f in made] == [e["operationId"] for e in failed]
    assert [(f["time"], f["user"], f["company"], f["action"], f["client_ip"]) for f in made] == [
        (e["time"], e["userId"], e["companyId"], e["action"], e["clientIpAddress"]) for e in failed
    ]
    assert {f["reason"] for f in made} == {"status 500"}


def test_a_selection_is_reported_alone(audit: Path) -> None:
    """The numbers are those of one user in two days; the sessions are known to their ends."""
    lines = lines_of(audit)
    user = Counter(entry["userId"] for entry in lines).most_common(1)[0][0]
    chosen = [e for e in lines if e["userId"] == user and "2025-01-03" <= e["time"] < "2025-01-06"]

    made = as_json(audit, "--user", user, "--since", "2025-01-03", "--until", "2025-01-05")

    assert made["totals"]["entries"] == len(chosen) > 0
    assert told(made["actions"]["rows"], "action") == counted(chosen, "action")
    assert {s["session"] for s in made["sessions"]} == {e["session"] for e in chosen}
    assert {s["end"][:6] for s in made["sessions"]} == {"ended:"}
    assert made["missing_sessions"] == []
    assert made["report"]["selection"] == {
        "user": user,
        "since": "2025-01-03T00:00:00.000000Z",
        "until": "2025-01-06T00:00:00.000000Z",
    }


def test_an_outcome_outside_of_the_selection_counts_as_one(audit: Path) -> None:
    """Begins alone are selected, and none of them is reported as without an outcome."""
    begun = sum(entry["event"] == "Begin" for entry in lines_of(audit))

    made = as_json(audit, "--event", "Begin")

    assert made["totals"]["begun"] == begun
    assert made["totals"]["ended_outside"] == begun
    assert made["totals"]["without_outcome"] == 0


def test_outcomes_are_not_taken_for_operations(audit: Path) -> None:
    """Where only outcomes are selected, nothing was done, and no Begin was read."""
    made = as_json(audit, "--event", "Fail")

    assert made["totals"]["done"] == 0
    assert made["totals"]["without_begin"] == made["totals"]["failed"] > 0


def test_an_operation_without_an_outcome_is_named(tmp_path: Path) -> None:
    """Its outcome may stand in a file that comes earlier; where there is none, it is listed."""
    other = {"session": "0" * 20}
    write(tmp_path / f"audit-20261102-{'0' * 20}.ndjson", [
        line(1, action="Late", event="Complete", operationId="joined", **other),
    ])  # fmt: skip
    write(tmp_path / f"audit-20261102-{SESSION}.ndjson", [
        line(1, action="Late", event="Begin", operationId="joined"),
        line(2, action="Lost", event="Begin", operationId="lost", userId="ann"),
        line(3, action="Lost", event="Begin"),
        line(4, action="Odd", event="Odd"),
    ])  # fmt: skip

    made = as_json(tmp_path)

    totals = made["totals"]
    assert totals["without_outcome"] == 1
    assert totals["without_begin"] == 0
    assert totals["without_id"] == 1
    assert totals["of_unknown_kind"] == 1
    assert [(b["operation"], b["user"]) for b in made["without_outcome"]] == [("lost", "ann")]


def test_gaps_and_broken_sessions_are_told(tmp_path: Path) -> None:
    """What the next session tells: why the one before ended, and how many calls failed."""
    later = {"session": "1" * 20, "action": "AuditSession"}
    gap = {"since": "2026-11-02T11:00:00.000000Z", "failedCalls": 3, "reason": "disk full"}
    follows = {"session": SESSION, "sequence": 2, "hash": "", "ended": "disk full"}
    write(tmp_path / f"audit-20261102-{SESSION}.ndjson", [
        line(1, action="AuditSession", event="Begin", data={
            "follows": {"session": "2" * 20, "sequence": 1, "hash": "", "ended": "reopen"}}),
        line(2, action="Pay"),
    ])  # fmt: skip
    write(tmp_path / f"audit-20261103-{'1' * 20}.ndjson", [
        line(1, event="Begin", data={"gap": gap, "follows": follows}, **later),
    ])  # fmt: skip

    made = as_json(tmp_path)

    assert made["totals"]["gaps"] == 1
    assert made["totals"]["failed_calls"] == 3
    assert made["gaps"] == [{
        "time": line(1)["time"], "session": "1" * 20, "since": gap["since"], "calls": 3,
        "reason": "disk full"}]  # fmt: skip
    ends = {session["session"]: session["end"] for session in made["sessions"]}
    assert ends == {SESSION: "broke off: disk full", "1" * 20: "no end: open, crashed or cut"}
    assert made["missing_sessions"] == ["2" * 20]


def test_a_fork_ends_no_session(tmp_path: Path) -> None:
    """The child's session follows the parent's, which goes on."""
    follows = {"session": SESSION, "sequence": 1, "hash": "", "ended": "fork"}
    write(tmp_path / f"audit-20261102-{SESSION}.ndjson", [line(1, action="Pay")])
    write(tmp_path / f"audit-20261102-{'1' * 20}.ndjson", [
        line(1, action="AuditSession", event="Begin", session="1" * 20, data={"follows": follows}),
    ])  # fmt: skip

    ends = {session["session"]: session["end"] for session in as_json(tmp_path)["sessions"]}

    assert ends[SESSION] == "no end: open, crashed or cut"


def test_a_gap_is_told_whatever_user_is_asked_for(tmp_path: Path) -> None:
    """Entries of that very user may be among the calls that failed."""
    data = {"gap": {"since": "2026-11-02T11:00:00.000000Z", "failedCalls": 3, "reason": "full"}}
    write(tmp_path / f"audit-20261102-{SESSION}.ndjson", [
        line(1, action="AuditSession", event="Begin", data=data),
        line(2, action="Pay", userId="ann"),
    ])  # fmt: skip

    assert as_json(tmp_path, "--user", "nobody")["totals"]["failed_calls"] == 3


def test_what_cannot_be_read_is_counted_and_named(tmp_path: Path) -> None:
    """The status says so, too; the rest is reported all the same."""
    path = tmp_path / f"audit-20261102-{SESSION}.ndjson"
    write(path, [line(1, action="Pay")])
    path.write_bytes(path.read_bytes() + b"no entry\n" + path.read_bytes() + b'{"torn')

    made = as_json(tmp_path, status=2)

    assert made["totals"]["entries"] == 2
    assert made["totals"]["unreadable"] == 2
    assert [text.startswith(f"{path}:{n}: ") for n, text in zip((2, 4), made["unreadable"])] == [
        True, True]  # fmt: skip


def test_more_users_than_are_kept_are_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is missing in the sums, and every format says that there are others."""
    for name in ("KEPT", "LATEST"):
        monkeypatch.setattr(summary, name, 3)
    path = tmp_path / f"audit-20261102-{SESSION}.ndjson"
    write(path, [
        line(n, action="Pay", event="Fail", userId=f"user-{n}", session=f"{n:020d}")
        for n in range(1, 8)
    ])  # fmt: skip
    made = Summary()
    for entry in entries(path):
        made.add(entry)
    told = ActivityReport(made, [str(path)], datetime.now(timezone.utc), {})

    result = told.as_dict()

    assert len(result["users"]["rows"]) == 3
    assert result["users"]["others"]["failed"] == 4
    assert result["totals"]["failed"] == 7
    assert result["totals"]["entries_of_other_sessions"] == 4
    assert [failure["user"] for failure in result["failures"]] == ["user-7", "user-6", "user-5"]
    notes = {section.name: section.notes for section in told.sections()}
    assert "4 entries of others" in notes["users"][0]
    assert notes["failures"] == ("The latest 3 of 7.",)


def test_pending_operations_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit they are not joined, and it is said how many."""
    monkeypatch.setattr(summary, "PENDING", 2)
    path = tmp_path / f"audit-20261102-{SESSION}.ndjson"
    write(path, [line(n, action="Pay", event="Begin", operationId=str(n)) for n in range(1, 6)])
    made = Summary()
    for entry in entries(path):
        made.add(entry)

    assert (made.without_outcome, made.unjoined) == (2, 3)


def test_a_report_is_never_written_over_a_file(audit: Path, tmp_path: Path) -> None:
    """What is there stays as it is, and the error says what to do."""
    target = tmp_path / "report.html"
    target.write_text("kept")

    done = subprocess.run(
        [sys.executable, "-m", "structlog_audit", "report", str(audit), "--output", str(target)],
        env=environment(), capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip

    assert done.returncode == 2
    assert done.stderr == (
        f"error: {target} exists already\nhint: nothing is overwritten: give another name\n"
    )
    assert target.read_text() == "kept"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_report_in_a_file_is_whole_and_for_its_owner_alone(audit: Path, tmp_path: Path) -> None:
    """Nothing else is left behind in the directory."""
    target = tmp_path / "report.json"

    assert report(audit, "--format", "json", "--output", target) == b""

    assert json.loads(target.read_bytes())["totals"]["entries"] > 0
    assert target.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["report.json"]


def test_no_directory_for_the_report_is_an_error_with_a_hint(audit: Path, tmp_path: Path) -> None:
    """It is no traceback."""
    target = tmp_path / "none" / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "structlog_audit", "report", str(audit), "--output", str(target)],
        env=environment(), capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {target} cannot be written: No such file")


def test_every_filter_is_taken(audit: Path) -> None:
    """Those of `search`; one that nothing passes leaves a report of nothing."""
    entry = next(entry for entry in lines_of(audit) if entry["event"] == "Fail")
    filters = {"user": "userId", "company": "companyId", "action": "action", "type": "type",
               "ip": "clientIpAddress", "event": "event", "operation": "operationId",
               "session": "session"}  # fmt: skip
    chosen = [part for name, field in filters.items() for part in (f"--{name}", entry[field])]

    made = as_json(audit, *chosen, "--data", "status=500", "--text", entry["userId"])

    assert made["totals"]["entries"] == made["totals"]["failed"] == 1
    assert made["report"]["selection"] == {
        **{name: entry[field] for name, field in filters.items()},
        "data.status": "500", "text": entry["userId"],
    }  # fmt: skip
    assert as_json(audit, "--user", "nobody")["totals"]["entries"] == 0


def test_wrong_use_is_told_in_two_lines(audit: Path) -> None:
    """What is wrong, and what to write."""
    command = [sys.executable, "-m", "structlog_audit", "report", str(audit), "--data", "status"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 2
    assert done.stderr.splitlines()[1] == "hint: such as --data invoice.id=inv_42"


def test_it_reads_stdin(audit: Path) -> None:
    """A pipe of lines has the same entries, also where only some are asked for."""
    data = b"".join(path.read_bytes() for path in session_files(audit))

    made = json.loads(report("-", "--format", "json", input=data))
    some = json.loads(report("-", "--format", "json", "--event", "Fail", input=data))

    assert made["totals"] == as_json(audit)["totals"]
    assert some["totals"]["entries"] == made["totals"]["failed"]


def test_a_closed_pipe_is_silent(audit: Path) -> None:
    """`report | head -1` prints one line and no complaint."""
    command = f"{sys.executable} -m structlog_audit report {audit} | head -1"
    done = subprocess.run(
        ["sh", "-c", command], env=environment(), capture_output=True, text=True, timeout=HANG
    )
    assert done.stdout == "Audit report\n"
    assert done.stderr == ""


def shows_nothing_hidden(text: str) -> bool:
    """Tell whether all characters of a text can be seen."""
    return all(visible(each) == each for each in text.split("\n"))


@pytest.mark.parametrize("form", ["table", "json", "csv", "html"])
def test_no_hostile_character_comes_through(hostile: Path, form: str) -> None:
    """No escape, no control character, nothing invisible; in whatever field it stood."""
    text = report(hostile, "--format", form, status=2).decode()

    assert shows_nothing_hidden(text.replace("\r\n", "\n") if form == "csv" else text)
    assert "\\u001b" in text


def test_json_says_what_stood_there(hostile: Path) -> None:
    """Everything is escaped in a way that a parser undoes; what was too long is cut with a mark."""
    users = {row["user"] for row in as_json(hostile, status=2)["users"]["rows"]}

    assert users - set(VALUES.values()) == {each for each in users if each.startswith("xxx")}
    assert set(VALUES.values()) - users == {VALUES["big"]}
    [big] = users - set(VALUES.values())
    assert re.fullmatch(r"x{200}…\[cut: 200005 characters, sha256 [0-9a-f]{64}\]", big)


def test_a_name_that_is_no_text_can_be_reported(tmp_path: Path) -> None:
    """A file name of any bytes is spelled out, in JSON that every parser takes."""
    path = tmp_path / os.fsdecode(b"audit-\xff\xf0.ndjson")
    write(path, [line(1, action="Pay")])
    spelled = f"{tmp_path}/audit-\\udcff\\udcf0.ndjson"

    assert as_json(path)["report"]["paths"] == [spelled]
    for form in ("table", "csv", "html"):
        assert report(path, "--format", form).decode()
    assert spelled in report(path).decode()


def test_csv_is_whole_and_calculates_nothing(hostile: Path) -> None:
    """Each row has all cells, in one line; a cell that begins a formula has an apostrophe."""
    text = report(hostile, "--format", "csv", status=2).decode()

    rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    assert text.count("\n") == text.count("\r\n") == len(rows)
    assert {len(row) for row in rows} == {len(rows[0])}
    cells = {cell for row in rows for cell in row}
    for sign in "=+-@＝":
        assert not [cell for cell in cells if cell.lstrip().startswith(sign)]
        assert not [cell for cell in cells if f";{sign}" in cell]
    for name in ("formula", "plus", "minus", "at", "wide"):
        assert f"'{VALUES[name]}" in cells
    assert "a;'=1+1" in cells
    assert "\\t=1" in cells
    assert 'a\\nb\\r\\nc,"d"' in cells


def on_a_terminal(*arguments: object, **variables: str) -> str:
    """Run the command on a terminal of 120 columns; return what came there."""
    reading, writing = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "structlog_audit", "report", *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=writing, stderr=writing,
        env=environment(TERM="xterm-256color", COLUMNS="120", **variables),
    )  # fmt: skip
    os.close(writing)
    parts = []
    try:
        while part := os.read(reading, 65536):
            parts.append(part)
    except OSError:  # Linux says so at the end
        pass
    os.close(reading)
    process.wait(HANG)
    return b"".join(parts).decode()


STYLE = re.compile(r"\x1b\[[0-9;]*m")


def test_a_terminal_gets_styles_of_ours_alone(hostile: Path) -> None:
    """The only escapes are those for bold, faint and colours; markup of rich means nothing."""
    text = on_a_terminal(hostile)

    assert "\x1b[1m" in text
    plain = STYLE.sub("", text).replace("\r\n", "\n")
    assert shows_nothing_hidden(plain)
    assert "[bold red]x[/]" in plain
    assert "owned\\u0007" in "".join(plain.split())


def test_no_color_is_honoured(audit: Path) -> None:
    """NO_COLOR leaves no colour."""
    for style in STYLE.findall(on_a_terminal(audit, NO_COLOR="1")):
        assert not re.search(r"\b(3[0-9]|4[0-9]|9[0-7]|10[0-7])\b", style)


def test_a_pipe_gets_aligned_lines(audit: Path) -> None:
    """No escapes, no boxes, one row a line."""
    text = report(audit).decode()

    assert "\x1b" not in text
    rows = text[text.index("By company") :].splitlines()[1:6]
    assert rows[0].split() == ["company", "done", "failed", "abandoned", "entries", "last"]
    assert len({row.index("20") for row in rows[1:] if row}) <= 2
    assert len({len(row) for row in rows[1:]}) == 1


def test_every_hidden_character_is_spelled_out() -> None:
    """Also those that Python calls printable although nothing is to be seen."""
    assert visible("a\tb\0c\x9bd\u202ee\u3164f\U000e0041g\u2028") == (
        "a\\tb\\u0000c\\u009bd\\u202ee\\u3164f\\U000e0041g\\u2028"
    )
    assert visible("Jürgen 田中 📦 e\u0301") == "Jürgen 田中 📦 e\u0301"
    assert visible("o" + "\u0301" * 5) == "o\u0301\u0301\u0301\\u0301\\u0301"
