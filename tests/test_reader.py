"""Reading entries from Python: every filter, every kind of file, whatever else is there."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from reading import session_files, written_when_it_says
from running import environment

from structlog_audit import (
    AuditConfigurationError,
    AuditHandler,
    copies,
    listing,
    reader,
    selection,
    source,
)
from structlog_audit.reader import Problem, entries
from structlog_audit.spool import Directory

zstandard = pytest.importorskip("zstandard")

Fields = dict[str, Any]


def lines_of(directory: Path) -> list[bytes]:
    """Return all lines of a directory's session files, in the order of their names."""
    return [line for path in session_files(directory) for line in path.read_bytes().splitlines()]


def brute(directory: Path, holds: Callable[[Fields], bool]) -> list[bytes]:
    """Find lines the slow way, sharing no code with the reader."""
    found = []
    for line in lines_of(directory):
        fields = json.loads(line)
        if fields["action"] != "AuditSession" and holds(fields):
            found.append(line)
    return found


def lines(found: Any) -> list[bytes]:
    return [entry.line for entry in found]


def record(handler: AuditHandler, **fields: Any) -> None:
    handler.record({"action": "A", **fields})


QUERIES: list[tuple[dict[str, Any], Callable[[Fields], bool]]] = [
    ({}, lambda f: True),
    ({"user": "acme-user-3"}, lambda f: f["userId"] == "acme-user-3"),
    ({"company": "globex"}, lambda f: f["companyId"] == "globex"),
    ({"action": "PodCreate"}, lambda f: f["action"] == "PodCreate"),
    ({"action": "Pod*"}, lambda f: f["action"].startswith("Pod")),
    ({"action": "*Delete"}, lambda f: f["action"].endswith("Delete")),
    ({"action": "?od*Cr?ate"}, lambda f: f["action"][:3] == "Pod" and "Create" in f["action"]),
    ({"type": "REST"}, lambda f: f["type"] == "REST"),
    ({"type": "RES"}, lambda f: False),
    ({"event": "fail"}, lambda f: f["event"] == "Fail"),
    ({"ip": "10.1.0.0/16"}, lambda f: f["clientIpAddress"].startswith("10.1.")),
    ({"ip": "10.0.0.0/15"}, lambda f: f["clientIpAddress"].split(".")[1] in "01"),
    ({"ip": "0.0.0.0/0"}, lambda f: True),
    ({"ip": "::/0"}, lambda f: False),
    ({"data": {"status": 500}}, lambda f: f["data"].get("status") == 500),
    ({"data": {"status": "500"}}, lambda f: f["data"].get("status") == 500),
    ({"data": {"objectRef.resource": "pods"}},
     lambda f: f["data"].get("objectRef", {}).get("resource") == "pods"),
    ({"data": {"annotations.authorization.k8s.io/decision": "allow"}},
     lambda f: f["data"].get("annotations", {}).get("authorization.k8s.io/decision") == "allow"),
    ({"data": {"user.groups.0": "system:masters"}},
     lambda f: (f["data"].get("user", {}).get("groups") or [""])[0] == "system:masters"),
    ({"text": "nginx"}, lambda f: "nginx" in " ".join(texts(f))),
    ({"text": '"system:controller'}, lambda f: '"system:controller' in " ".join(texts(f))),
    ({"since": "2025-01-10", "until": "2025-01-10"}, lambda f: f["time"][:10] == "2025-01-10"),
    ({"since": date(2025, 1, 28)}, lambda f: f["time"][:10] >= "2025-01-28"),
    ({"since": "2025-01-10T08:00", "until": "2025-01-10T10:30"},
     lambda f: "2025-01-10T08:00" <= f["time"] < "2025-01-10T10:30"),
    ({"until": datetime(2025, 1, 3, 9, tzinfo=timezone(timedelta(hours=1)))},
     lambda f: f["time"] < "2025-01-03T08:00"),
    ({"company": "acme", "event": "Begin", "action": "*Create", "since": "2025-01-05"},
     lambda f: f["companyId"] == "acme" and f["event"] == "Begin"
     and f["action"].endswith("Create") and f["time"] >= "2025-01-05"),
]  # fmt: skip


def texts(value: Any) -> list[str]:
    """Return all texts that stand in a value."""
    if isinstance(value, dict):
        return [text for each in value.values() for text in texts(each)]
    if isinstance(value, list):
        return [text for each in value for text in texts(each)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize(("query", "holds"), QUERIES, ids=[str(query) for query, _ in QUERIES])
def test_a_filter_finds_what_a_slow_look_at_every_line_finds(
    month: Path, query: dict[str, Any], holds: Callable[[Fields], bool]
) -> None:
    """The bytes that are looked for first hide nothing, and the parsed line decides."""
    assert lines(entries(month, **query)) == brute(month, holds)
    assert sorted(lines(entries(month, in_time_order=True, **query))) == sorted(brute(month, holds))


def test_one_session_and_one_operation_are_found(month: Path) -> None:
    """By their ids; a session's own entries only when they are asked for."""
    begin = next(entries(month, event="Begin"))
    assert begin.operation_id is not None
    assert next(entries(month, operation=begin.operation_id)) == begin
    own = list(entries(month, session=begin.session, own=True))
    assert lines(own) == Path(begin.file).read_bytes().splitlines()
    assert [e.is_own for e in own] == [True, *[False] * (len(own) - 2), True]
    assert len(list(entries(month, session=begin.session))) == len(own) - 2
    assert len(list(entries(month, session=begin.session, action="AuditSession"))) == 2


def test_entries_are_typed(handler: AuditHandler, audit_dir: Path) -> None:
    """Each field has a property; what is not there is None; nothing of it is in the repr."""
    record(handler, user_id="u", company_id="c", service_id="s", client_ip="192.0.2.7", type="CLI",
           operation_id="o", request_id="r", data={"secret": "x1y2"})  # fmt: skip
    record(handler, action="Second")
    first, second = entries(audit_dir)
    assert (first.user_id, first.company_id, first.service_id) == ("u", "c", "s")
    assert (first.client_ip, first.type, first.event) == ("192.0.2.7", "CLI", "Record")
    assert (first.operation_id, first.request_id, first.app) == ("o", "r", None)
    assert (first.sequence, first.number, first.data) == (2, 2, {"secret": "x1y2"})
    assert abs(datetime.now(timezone.utc) - first.time) < timedelta(minutes=1)
    assert (second.action, second.user_id, second.operation_id) == ("Second", None, None)
    assert first.session == second.session
    assert "x1y2" not in repr(first)


@pytest.mark.parametrize("size", [1, 7, 100, 1_000, 5_000])
@pytest.mark.parametrize("query", [{}, {"company": "acme"}, {"text": "nginx"}])
def test_lines_and_needles_may_be_cut_anywhere(
    month: Path, size: int, query: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the pieces are in which a file is read, the answer and its places stay."""
    path = max(session_files(month), key=lambda path: path.stat().st_size)
    whole = list(entries(path, **query))
    monkeypatch.setattr(source, "CHUNK", size)
    assert list(entries(path, **query)) == whole
    assert whole
    numbered = path.read_bytes().splitlines()
    assert [numbered[entry.number - 1] for entry in whole] == lines(whole)


def test_in_time_order_files_are_merged(month: Path) -> None:
    """Ten thousand files or three: the times rise, and each session keeps its order."""
    found = list(entries(month, in_time_order=True, own=True))
    times = [entry.time for entry in found]
    assert times == sorted(times)
    assert len(found) == len(lines_of(month))
    places: dict[str, int] = {}
    for entry in found:
        assert entry.sequence == places.get(entry.session, 0) + 1
        places[entry.session] = entry.sequence


def test_merging_more_files_than_may_be_open_is_the_same(
    month: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are closed and opened again where they were; no descriptor is left over."""
    expected = lines(entries(month, in_time_order=True, own=True))
    monkeypatch.setattr(reader, "OPEN_FILES", 1)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for number, entry in enumerate(entries(month, in_time_order=True, own=True)):
        assert entry.line == expected[number]
        if before:
            assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert number == len(expected) - 1


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that fills with the files that are opened."""
    paths: list[str] = []

    class Spy(source.Source):
        def __init__(self, path: str, **options: Any) -> None:
            paths.append(os.path.basename(path))
            super().__init__(path, **options)

    for module in (reader, listing):
        monkeypatch.setattr(module, "Source", Spy)
    return paths


def test_a_day_is_read_by_names_and_journal_alone(
    month: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of thirty days' files, only those of one day are opened, and the journal."""
    paths = opened(monkeypatch)
    assert list(entries(month, since="2025-01-10", until="2025-01-10"))
    assert {path[:14] for path in paths} == {"audit-20250110", "audit-journal."}


def test_without_a_journal_the_name_bounds_the_day_on_one_side(
    month: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that began earlier may go on on that day; one that began later may not."""
    for path in session_files(month):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    paths = opened(monkeypatch)
    found = lines(entries(tmp_path, since="2025-01-10", until="2025-01-10"))
    assert found == brute(month, lambda f: f["time"][:10] == "2025-01-10")
    days = {path.split("-")[1] for path in paths if "journal" not in path}
    assert (min(days), max(days)) == ("20250101", "20250111")  # begun within an hour of it


def of_the_tenth(month: Path, to: Path, day: str, *events: tuple[str, str]) -> Path:
    """Copy the file of the tenth as if it had begun on another day; its journal says the rest."""
    path = next(p for p in session_files(month) if "-20250110-" in p.name)
    copy = to / path.name.replace("-20250110-", f"-{day}-")
    copy.write_bytes(path.read_bytes())
    written_when_it_says(copy)
    for event, time in events:
        append_to_journal(to, event=event, session=copy.stem[-20:], time=f"{time}:00:00.000000Z",
                          **({} if event == "Head" else {"file": copy.name}))  # fmt: skip
    return copy


def test_a_session_that_goes_on_past_midnight_is_found_on_the_next_day(
    month: Path, tmp_path: Path
) -> None:
    """What counts is when the journal says that it ended, not the day in its name."""
    of_the_tenth(month, tmp_path, "20250108", ("Open", "2025-01-08T23"), ("Close", "2025-01-10T23"))
    assert list(entries(tmp_path, since="2025-01-10"))
    assert not list(entries(tmp_path, since="2025-01-11"))
    assert not list(entries(tmp_path, until="2025-01-09"))


@pytest.mark.parametrize(
    "events",
    [
        [("Open", "2025-01-08T23"), ("Head", "2025-01-10T23"), ("Close", "2025-01-08T23")],
        [("Open", "2025-01-08T23"), ("Close", "2025-01-08T23")],
        [("Open", "2025-01-12T23"), ("Close", "2025-01-10T23")],
        [("Open", "2025-01-12T23")],
    ],
    ids=["ahead within it", "back in the journal", "ahead at first", "ahead at first, killed"],
)
def test_entries_are_found_although_the_clock_was_set(
    month: Path, tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    """All times that are known of a file are taken together, and the time when it was written."""
    day = events[0][1][:10].replace("-", "")
    path = of_the_tenth(month, tmp_path, day, *events)
    if "Head" in dict(events):  # or the time of the file would tell as much
        then = datetime(2025, 1, 8, 23, tzinfo=timezone.utc).timestamp()
        os.utime(path, (then, then))
    found = lines(entries(tmp_path, since="2025-01-10", until="2025-01-10"))
    assert found == path.read_bytes().splitlines()[1:-1]


def test_a_compressed_copy_is_left_out_like_its_original(
    month: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says when the original was written, not when it was compressed."""
    path = of_the_tenth(
        month, tmp_path, "20250110", ("Open", "2025-01-10T00"), ("Close", "2025-01-10T23")
    )
    place = Directory(str(tmp_path))
    copies.compress(place, path.name)
    place.close()
    path.unlink()
    read = opened(monkeypatch)
    assert list(entries(tmp_path, since="2025-01-10"))
    assert f"{path.name}.zst" in read
    read.clear()
    assert not list(entries(tmp_path, since="2025-01-12"))
    assert read == ["audit-journal.ndjson"]


def append_to_journal(directory: Path, **event: Any) -> None:
    with (directory / "audit-journal.ndjson").open("ab") as journal:
        journal.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")


@pytest.mark.parametrize(
    "forged",
    [
        {"session": "z" * 20, "time": "2000-01-01T00:00:00.000000Z"},
        {"time": "2000-01-01T00:00:00.000000Z"},
        {"time": "2000-01-01T00:00:00"},
        {"time": "0001-01-01T00:00:00Z"},
        {"time": 5},
        {"time": "soon"},
    ],
    ids=str,
)
@pytest.mark.parametrize("event", ["Open", "Close"])
def test_a_line_of_the_journal_that_may_be_anybodys_hides_no_file(
    handler: AuditHandler, audit_dir: Path, event: str, forged: Fields
) -> None:
    """A session that is not the file's says nothing of it; a time may be false, or none."""
    handler.record({"action": "Bribe"})
    (path,) = session_files(audit_dir)
    told = {"event": event, "file": path.name, "session": path.stem[-20:], **forged}
    append_to_journal(audit_dir, **told)
    for query in ({"since": "1h"}, {"until": "2100-01-01"}, {"since": "1h", "in_time_order": True}):
        assert len(lines(entries(audit_dir, action="Bribe", **query))) == 1


def test_what_is_no_entry_is_reported_and_reading_goes_on(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """Foreign lines, zeros and a torn end; the entries around them are all there."""
    for number in range(3):
        record(handler, action=f"A{number}")
    handler.close()
    (path,) = session_files(audit_dir)
    first, second, *rest = path.read_bytes().splitlines(keepends=True)
    bad = [b"no JSON\n", b"\0" * 4096 + b"\n", b"[]\n", b'{"action":"A"}\n', b"\xff\xfe\n", b"\n",
           second.replace(b'"time":"2', b'"time":"x')]  # fmt: skip
    path.write_bytes(b"".join([first, second, *bad, *rest, b'{"level":35,"time":"20']))
    problems: list[Problem] = []
    found = list(entries(audit_dir, on_problem=problems.append))
    assert [entry.action for entry in found] == ["A0", "A1", "A2"]
    assert [problem.number for problem in problems] == [3, 4, 5, 6, 7, 8, 9, 13]
    assert str(problems[0]) == f"{path}:3: it is no JSON"
    assert "torn" in problems[-1].reason


def test_without_a_listener_problems_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are not lost."""
    (tmp_path / "x.ndjson").write_bytes(b"no JSON\n")
    with caplog.at_level(logging.WARNING, "structlog_audit"):
        assert not list(entries(tmp_path / "x.ndjson"))
    assert "x.ndjson:1: it is no JSON" in caplog.text


def test_the_torn_end_of_a_living_session_is_no_problem(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """Its writer may be writing it at this moment."""
    record(handler)
    (path,) = session_files(audit_dir)
    with path.open("ab") as file:
        file.write(b'{"level":35')
    problems: list[Problem] = []
    assert len(list(entries(audit_dir, on_problem=problems.append))) == 1
    assert not problems


def compress(path: Path, suffix: str) -> Path:
    """Put a compressed copy beside a file."""
    data = path.read_bytes()
    made = gzip.compress(data) if suffix == ".gz" else zstandard.ZstdCompressor().compress(data)
    copy = path.with_name(path.name + suffix)
    copy.write_bytes(made)
    return copy


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_read_as_the_plain_ones(
    month: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With numbers and in order, also by day with the journal that names the plain file."""
    for path in month.glob("audit-*.ndjson"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        if path in session_files(month):
            compress(tmp_path / path.name, suffix)
            shutil.copystat(path, tmp_path / f"{path.name}{suffix}")  # as gzip and zstd do
            (tmp_path / path.name).unlink()
    monkeypatch.setattr(source, "CHUNK", 3_000)  # several chunks a file
    for query in ({}, {"company": "acme"}, {"since": "2025-01-10", "until": "2025-01-10"}):
        expected = [(e.line, e.number) for e in entries(month, **query)]
        assert [(e.line, e.number) for e in entries(tmp_path, **query)] == expected
    paths = opened(monkeypatch)
    list(entries(tmp_path, since="2025-01-10", until="2025-01-10"))
    assert {path[:14] for path in paths} == {"audit-20250110", "audit-journal."}


def test_a_session_that_is_there_twice_is_read_once(handler: AuditHandler, audit_dir: Path) -> None:
    """While it is being compressed, both copies stand there."""
    record(handler)
    handler.close()
    compress(session_files(audit_dir)[0], ".zst")
    compress(session_files(audit_dir)[0], ".gz")
    assert len(list(entries(audit_dir))) == 1


def test_a_file_that_is_compressed_after_it_was_listed_is_read_in_its_copy(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """Between looking into the directory and opening the file."""
    record(handler)
    handler.close()
    (path,) = session_files(audit_dir)
    found = entries(audit_dir)
    compress(path, ".zst")
    path.unlink()
    assert len(list(found)) == 1


def test_a_file_that_is_gone_after_it_was_listed_is_reported(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """It is not passed over in silence."""
    record(handler)
    handler.close()
    problems: list[Problem] = []
    found = entries(audit_dir, on_problem=problems.append)
    session_files(audit_dir)[0].unlink()
    assert not list(found)
    assert "gone" in problems[0].reason


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_standard_input_is_read(month: Path, tmp_path: Path, suffix: str) -> None:
    """Plain or compressed, with the numbers of its lines."""
    path = tmp_path / "log"
    path.write_bytes(b"".join(line + b"\n" for line in lines_of(month)))
    given = compress(path, suffix) if suffix else path
    script = (
        "from structlog_audit.reader import entries\n"
        "for e in entries('-', company='acme'): print(e.number, e.operation_id)"
    )
    with given.open("rb") as stdin:
        done = subprocess.run([sys.executable, "-c", script], stdin=stdin, capture_output=True,
                              text=True, env=environment(), timeout=60)  # fmt: skip
    assert done.stderr == ""
    expected = [f"{e.number} {e.operation_id}" for e in entries(path, company="acme")]
    assert done.stdout.splitlines() == expected
    assert expected


ODD = ['say "hi"', "back\\slash", "new\nline", "tab\t", "päng", "日本語", "a/b", "\u2028", "😀",
       "\x7f", "\x01", "u0022", "*", "[x]"]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_odd_text_is_found_in_every_field(handler: AuditHandler, audit_dir: Path, odd: str) -> None:
    """It is looked for as it is spelled on the line, and compared as it was meant."""
    fields = {"user_id": odd, "company_id": odd, "type": odd, "operation_id": odd}
    record(handler, action=f"A{odd}B", **fields, data={odd: {"deep": [odd, 1]}})
    record(handler, data={"other": "x"})
    record(handler, user_id=f"{odd} ", data={"deep": f"{odd} "})
    found = [
        list(entries(audit_dir, **query))
        for query in (
            {"user": odd}, {"company": odd}, {"type": odd}, {"operation": odd},
            {"data": {f"{odd}.deep.0": odd}},
            {"action": "A" + odd.replace("*", "?") + "?"},
        )
    ]  # fmt: skip
    assert [[entry.sequence for entry in each] for each in found] == [[2]] * 6
    assert [entry.sequence for entry in entries(audit_dir, text=odd)] == [2, 4]


def test_text_is_compared_with_values_not_with_their_spelling(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """An n is not in a newline, and a name is no value; a number is."""
    record(handler, app="", data={"name": "\n\n", "count": 1234.5})
    assert not list(entries(audit_dir, text="\\n"))
    assert not list(entries(audit_dir, text="count"))
    assert list(entries(audit_dir, text="234.5"))


VALUES: list[tuple[Any, list[Any], list[Any]]] = [
    (500, [500, 500.0, "500"], [5000, 50, 500.5, "5000", True, None, "x500"]),
    (0, [0, 0.0, -0.0], [False, None, "", 1]),
    (1.5, [1.5, "1.5"], [15, "1.50", 1]),
    (10**17, [10**17, 1e17], [10**17 + 1]),
    (True, [True], [1, "yes", False, None]),
    (None, [None], [False, 0, ""]),
    ("x", ["x"], ["X", "xx", ["x"], {"x": "x"}]),
]


@pytest.mark.parametrize(("wanted", "same", "others"), VALUES, ids=[str(v[0]) for v in VALUES])
def test_values_are_compared_by_what_they_are(
    handler: AuditHandler, audit_dir: Path, wanted: Any, same: list[Any], others: list[Any]
) -> None:
    """A value finds equal ones of its kind; its text also finds the text."""
    for value in [*same, *others]:
        record(handler, data={"a": {"b": value}})
    count = len([value for value in same if isinstance(value, str) <= isinstance(wanted, str)])
    assert len(list(entries(audit_dir, data={"a.b": wanted}))) == count
    if not isinstance(wanted, str):
        typed = list(entries(audit_dir, data={"a.b": json.dumps(wanted)}))
        assert len(typed) == len(same)


def test_a_path_may_have_dots_in_its_names_and_places_in_lists(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """All readings of a path are tried."""
    for data in ({"a.b": {"c": 1}}, {"a": {"b.c": 1}}, {"a": {"b": {"c": 1}}}, {"a.b.c": 1},
                 {"a": [{"c": 1}]}, {"a": {"0": {"c": 1}}}):  # fmt: skip
        record(handler, data=data)
    assert [e.sequence for e in entries(audit_dir, data={"a.b.c": 1})] == [2, 3, 4, 5]
    assert [e.sequence for e in entries(audit_dir, data={"a.0.c": 1})] == [6, 7]


@pytest.mark.parametrize(
    ("network", "places"),
    [
        ("192.0.2.7", [2, 3, 4, 5]),
        ("192.0.2.0/24", [2, 3, 4, 5, 6]),
        ("192.0.2.0/25", [2, 3, 4, 5]),
        ("::ffff:192.0.2.7", [2, 3, 4, 5]),
        ("::ffff:0:0/96", [2, 3, 4, 5, 6, 10]),
        ("2001:db8::1", [7, 8]),
        ("2001:DB8::/32", [7, 8]),
        ("fe80::/10", [9]),
        ("192.0.2.77", []),
    ],
)
def test_addresses_are_found_in_every_spelling(
    handler: AuditHandler, audit_dir: Path, network: str, places: list[int]
) -> None:
    """IPv4 within IPv6 is the same client; a zone does not count."""
    for address in ("192.0.2.7", "::ffff:192.0.2.7", "::ffff:c000:207", "0:0:0:0:0:FFFF:192.0.2.7",
                    "192.0.2.200", "2001:db8::1", "2001:0DB8:0::0001", "fe80::1%eth0", "10.0.0.1",
                    "unknown", ""):  # fmt: skip
        record(handler, client_ip=address, data={"clientIpAddress": "192.0.2.77"})
    assert [entry.sequence for entry in entries(audit_dir, ip=network)] == places


NOW = datetime(2026, 11, 25, 15, 30, tzinfo=timezone.utc)  # a Wednesday


@pytest.mark.parametrize(
    ("given", "begin", "end"),
    [
        ("2026-11-24", "2026-11-24T00:00", "2026-11-25T00:00"),
        (date(2026, 11, 24), "2026-11-24T00:00", "2026-11-25T00:00"),
        ("2026-11-24T10:00", "2026-11-24T10:00", "2026-11-24T10:00"),
        ("2026-11-24 10:00:30", "2026-11-24T10:00:30", "2026-11-24T10:00:30"),
        ("2026-11-24T10:00Z", "2026-11-24T10:00", "2026-11-24T10:00"),
        ("2026-11-24T10:00+02:00", "2026-11-24T08:00", "2026-11-24T08:00"),
        (datetime(2026, 11, 24, 10), "2026-11-24T10:00", "2026-11-24T10:00"),
        ("2h", "2026-11-25T13:30", "2026-11-25T13:30"),
        ("30m", "2026-11-25T15:00", "2026-11-25T15:00"),
        ("7d", "2026-11-18T15:30", "2026-11-18T15:30"),
        ("today", "2026-11-25T00:00", "2026-11-26T00:00"),
        ("Yesterday", "2026-11-24T00:00", "2026-11-25T00:00"),
        ("tuesday", "2026-11-24T00:00", "2026-11-25T00:00"),
        ("last Tuesday", "2026-11-24T00:00", "2026-11-25T00:00"),
        ("wednesday", "2026-11-18T00:00", "2026-11-19T00:00"),
        ("thursday", "2026-11-19T00:00", "2026-11-20T00:00"),
    ],
)
def test_times_are_understood(
    given: Any, begin: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days have an end; without a zone it is UTC; a weekday is the last one before today."""
    monkeypatch.setattr(selection, "now", lambda: NOW)
    since = selection.select(since=given).since
    until = selection.select(until=given).until
    assert since is not None
    assert until is not None
    assert since.isoformat().startswith(begin)
    assert until.isoformat().startswith(end)


@pytest.mark.parametrize(
    "query",
    [
        {"since": "soon"}, {"since": "2026-13-01"}, {"until": "999999999w"}, {"since": ""},
        {"since": "2026-11-24", "until": "2026-11-23"}, {"ip": "10.0.0.0/99"}, {"ip": "there"},
        {"event": "Began"}, {"data": {"": "x"}}, {"data": {"a": [1]}}, {"text": ""},
        {"user": 7}, {"user": "\udcff"},
    ],
)  # fmt: skip
def test_wrong_use_is_told_at_once(month: Path, query: dict[str, Any]) -> None:
    """When the function is called, not when the first entry is asked for."""
    with pytest.raises(AuditConfigurationError):
        entries(month, **query)


def test_a_path_that_does_not_exist_is_wrong_use(tmp_path: Path) -> None:
    """A mistyped directory must not look like one without entries."""
    with pytest.raises(AuditConfigurationError, match="there is no"):
        entries(tmp_path / "audti")
    with pytest.raises(AuditConfigurationError):
        entries([])
    with pytest.raises(AuditConfigurationError, match="there is no audit log in"):
        entries(tmp_path)


def test_a_link_or_a_directory_in_place_of_a_session_file_is_reported(
    month: Path, tmp_path: Path
) -> None:
    """A log's directory is not a way to have other files read."""
    first, second, third = session_files(month)[:3]
    (tmp_path / first.name).symlink_to(first)
    (tmp_path / second.name).mkdir()
    os.mkfifo(tmp_path / third.name)
    problems: list[Problem] = []
    assert not list(entries(tmp_path, on_problem=problems.append))
    assert len(problems) == 3


def test_several_paths_are_one_log(month: Path, tmp_path: Path) -> None:
    """Directories and files, by day and name."""
    paths = session_files(month)
    for path in paths[::2]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert lines(entries([*paths[1::2], tmp_path])) == lines(entries(month))


def test_an_entry_as_long_as_many_chunks_is_read(handler: AuditHandler, audit_dir: Path) -> None:
    """200 KB in one value, between ordinary entries."""
    record(handler, action="Before")
    record(handler, action="Big", data={"text": "x" * 200_000})
    record(handler, action="After")
    assert [entry.action for entry in entries(audit_dir)] == ["Before", "Big", "After"]
    assert [entry.number for entry in entries(audit_dir, action="After")] == [4]
    assert [entry.number for entry in entries(audit_dir, text="x" * 1000)] == [3]
