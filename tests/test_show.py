"""The command `show`: one entry or operation, with all that it has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from reading import session_files
from terminal import run

from structlog_audit import AuditHandler, Receipt
from structlog_audit.reader import entries

pytest.importorskip("click", reason="the command line is an extra")

FIELDS = {"action": "InvoiceDelete", "user_id": "2780", "company_id": "2350", "type": "REST",
          "client_ip": "192.0.2.7", "operation_id": "op-1"}  # fmt: skip


@pytest.fixture
def receipts(handler: AuditHandler) -> list[Receipt]:
    """Record an operation among other entries; return the receipts of all."""
    return [
        handler.record({"action": "Before"}),
        handler.record({**FIELDS, "data": {"invoice": {"id": "inv_42"}}}, "Begin"),
        handler.record({"action": "Between", "operation_id": "op-2"}),
        handler.record({**FIELDS, "data": {"error": "no such invoice"}}, "Fail"),
        handler.record({"action": "After"}),
    ]


def test_an_operation_is_shown_with_its_begin_and_its_outcome(
    receipts: list[Receipt], audit_dir: Path
) -> None:
    """Who, from where, how it ended, how long it took, and the data of both."""
    done = run("show", "op-1", audit_dir)
    assert (done.returncode, done.stderr) == (0, "")
    first, *rest = done.stdout.splitlines()
    assert re.fullmatch(r"InvoiceDelete: Fail after \d+ ms", first)
    told = [" ".join(line.split()) for line in rest]
    for line in ("user 2780", "company 2350", "client 192.0.2.7", '"id": "inv_42"',
                 '"error": "no such invoice"', f"Begin at {receipts[1].time}",
                 f"Fail at {receipts[3].time}", f"hash {receipts[1].hash}",
                 f"entry {receipts[3].session}:5",
                 f"file {session_files(audit_dir)[0]}:5"):  # fmt: skip
        assert told.count(line) == 1, line
    assert "Between" not in done.stdout


def test_every_name_of_an_entry_leads_to_its_operation(
    receipts: list[Receipt], audit_dir: Path
) -> None:
    """The operation's id, the place, the hash and the receipt, of the Begin or of the outcome."""
    expected = run("show", "op-1", audit_dir).stdout
    for receipt in (receipts[1], receipts[3]):
        for name in (f"{receipt.session}:{receipt.sequence}", receipt.hash,
                     json.dumps(receipt._asdict())):  # fmt: skip
            assert run("show", name, audit_dir).stdout == expected, name


def test_an_entry_without_an_operation_is_shown_alone(
    receipts: list[Receipt], handler: AuditHandler, audit_dir: Path
) -> None:
    """Also the last line of a file, by its hash, and a session's own."""
    for receipt, action in ((receipts[0], "Before"), (receipts[4], "After")):
        assert run("show", receipt.hash, audit_dir).stdout.startswith(f"{action}: Record\n")
    done = run("show", f"{receipts[0].session}:1", audit_dir)
    assert done.stdout.startswith("AuditSession: Begin\n")


def test_an_operation_that_has_not_ended_says_so(handler: AuditHandler, audit_dir: Path) -> None:
    """It may go on, or have ended without its outcome."""
    handler.record(FIELDS, "Begin")
    assert run("show", "op-1", audit_dir).stdout.startswith("InvoiceDelete: no outcome\n")


def test_an_operation_over_two_sessions_is_shown_as_one(
    handler: AuditHandler, audit_dir: Path
) -> None:
    """The session ended in between."""
    handler.record(FIELDS, "Begin")
    handler.reopen()
    handler.record(FIELDS, "Complete")
    done = run("show", "op-1", audit_dir)
    assert done.stdout.startswith("InvoiceDelete: Complete after")
    assert len(set(re.findall(r"file +(\S+):", done.stdout))) == 2


def test_json_is_the_exact_lines(receipts: list[Receipt], audit_dir: Path) -> None:
    """Begin and outcome, as they stand in the file."""
    done = run("show", "op-1", audit_dir, "--json")
    lines = [entry.line for entry in entries(audit_dir, operation="op-1")]
    assert done.stdout.encode() == b"".join(line + b"\n" for line in lines)


def test_what_is_not_there_is_told(receipts: list[Receipt], audit_dir: Path) -> None:
    """With the status 1, as for a search."""
    for name in ("op-7", "x\x1b[31m", "0" * 64, f"{receipts[0].session}:99", "a" * 20 + ":1"):
        done = run("show", name, audit_dir)
        assert (done.returncode, done.stdout) == (1, "")
        assert "there is no entry or operation" in done.stderr
        assert "\x1b" not in done.stderr


def test_a_receipt_that_the_log_contradicts_is_told(
    receipts: list[Receipt], audit_dir: Path
) -> None:
    """What stands there is not shown as what was recorded."""
    forged = receipts[1]._replace(hash=receipts[3].hash)
    done = run("show", json.dumps(forged._asdict()), audit_dir)
    assert done.returncode == 2
    assert "contradicts the receipt" in done.stderr
    assert done.stdout == ""
    assert run("show", "{}", audit_dir).returncode == 2
