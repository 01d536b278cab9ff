"""Real audit events through a real application with eight threads, then read by somebody else."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import replay
from reading import Entry, is_own, read_sessions, session_files
from running import HANG, environment

HERE = Path(__file__).parent
EVENTS = HERE / "data" / "k8s-audit-events.ndjson"
SECRETS = ("secret", "token", "password", "authorization", "credential", "cookie")


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    """The directory, and the receipts: number of the event, session, sequence, hash."""
    where = tmp_path_factory.mktemp("replay")
    done = subprocess.run(
        [sys.executable, HERE / "replay.py", EVENTS, where / "audit", where / "receipts.json"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return where / "audit", json.loads((where / "receipts.json").read_text(encoding="utf-8"))


def events() -> list[Entry]:
    """The events, as often as the application served them."""
    lines = EVENTS.read_text(encoding="utf-8").strip().split("\n")
    return [json.loads(line) for line in lines] * replay.ROUNDS


def entries(directory: Path) -> list[Entry]:
    return [e for session in read_sessions(directory) for e in session if not is_own(e)]


def test_every_event_is_recorded_once(replayed: tuple[Path, list[list[Any]]]) -> None:
    """No gap, no duplicate; the chain of every session holds, and there are several."""
    directory, receipts = replayed
    numbers = sorted(int(entry["requestId"]) for entry in entries(directory))
    assert numbers == list(range(len(events())))
    assert len(receipts) == len(numbers)
    assert len(read_sessions(directory)) > 2


def test_every_receipt_leads_to_its_line(replayed: tuple[Path, list[list[Any]]]) -> None:
    """The hash is that of the very bytes in the file."""
    directory, receipts = replayed
    lines = {
        hashlib.sha256(line).hexdigest(): line
        for file in session_files(directory)
        for line in file.read_bytes().splitlines()
    }
    for number, session, sequence, digest in receipts:
        entry = json.loads(lines[digest])
        assert (entry["requestId"], entry["session"], entry["sequence"]) == (
            str(number),
            session,
            sequence,
        )


def test_every_entry_says_what_its_event_said(replayed: tuple[Path, list[list[Any]]]) -> None:
    """Who, from where, what, and the rest untouched, but for what is redacted."""
    directory, _ = replayed
    served = events()
    for entry in entries(directory):
        event = served[int(entry["requestId"])]
        assert entry["userId"] == event["user"].get("username")
        assert entry["clientIpAddress"] == (event.get("sourceIPs") or [None])[-1]
        assert (entry["type"], entry["app"], entry["level"]) == ("REST", "apiserver", 35)
        assert entry["action"] == replay.action(event)
        assert_same(entry["data"], replay.rest(event))


def assert_same(ours: Any, given: Any) -> None:
    """Compare, and allow for redacted values under names that say why."""
    if isinstance(given, list):
        assert len(ours) == len(given)
        for pair in zip(ours, given, strict=True):
            assert_same(*pair)
    elif isinstance(given, dict):
        assert list(ours) == list(given)
        for name, value in given.items():
            if ours[name] == {"$audit": "redacted"}:
                assert any(secret in name.lower() for secret in SECRETS), name
            else:
                assert_same(ours[name], value)
    else:
        assert ours == given


def test_actions_are_named_after_what_happens() -> None:
    """Verb and resource, in CamelCase."""
    actions = {replay.action(event) for event in events()}
    assert "NamespaceCreate" in actions
    assert "ClusterrolebindingCreate" in actions
    assert not [action for action in actions if not action.isalnum()]


def test_the_sessions_end_as_they_should(replayed: tuple[Path, list[list[Any]]]) -> None:
    """By size, and the last one by the end of the program."""
    directory, _ = replayed
    last = [session[-1] for session in read_sessions(directory)]
    assert all(is_own(entry) and entry["event"] == "Complete" for entry in last)
    reasons = [entry["data"]["reason"] for entry in last]
    assert set(reasons[:-1]) == {"max_bytes"}
    assert reasons[-1] != "max_bytes"
