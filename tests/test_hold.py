"""Legal holds: set, shown, released, and what retention and verification make of them."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from aging import NOW, command, contents, done, journal_events, record
from forging import lines_of, put
from reading import recorded
from signing import make_key

from structlog_audit import (
    AuditConfigurationError,
    AuditHandler,
    AuditTimeoutError,
    Settings,
    Signer,
)
from structlog_audit.journal import Journal
from structlog_audit.keeping import Keeping
from structlog_audit.note import read_keys
from structlog_audit.verify import verify

pytest.importorskip("click", reason="the command line is an extra")
RETAIN = ("--keep", "90d", "--yes")


def add(directory: Path, *options: object, **environ: str) -> str:
    return done("hold", "add", directory, "--reason", "case 4711", *options, **environ).strip()


def retain(directory: Path) -> str:
    return done("retain", directory, *RETAIN)


def prune_of(directory: Path, number: int) -> dict[str, Any]:
    """Return the tombstone that a session would get."""
    close = [event for event in journal_events(directory) if event["event"] == "Close"][number]
    told = {name: close[name] for name in ("file", "session", "sequence", "hash")}
    return {"event": "Prune", **told, "reason": "--keep 90d", "by": "x", "to": "removed"}


def test_nothing_goes_under_a_hold_until_it_is_released(audit_dir: Path) -> None:
    """The reason is shown; afterwards it goes, and all is valid."""
    old = record(audit_dir, 200)
    record(audit_dir, 80)

    name = add(audit_dir)
    assert f"{old.name}: it is under the hold {name}: case 4711" in retain(audit_dir)
    assert old.exists()

    done("hold", "release", audit_dir, name, "--reason", "case closed")
    assert "1 session gone" in retain(audit_dir)
    assert not old.exists()
    report = verify(audit_dir)
    assert report.verdict == "valid", report.findings
    assert len(report.pruned) == 1


def test_a_hold_with_a_period_covers_the_sessions_in_it(audit_dir: Path) -> None:
    """A day is covered as a whole; the sessions before and behind it go."""
    files = [record(audit_dir, days) for days in (202, 201, 200, 199)]
    record(audit_dir, 80)
    day = files[1].name[6:14]
    day = f"{day[:4]}-{day[4:6]}-{day[6:]}"

    add(audit_dir, "--since", day, "--until", day)
    retain(audit_dir)

    assert [path.exists() for path in files] == [False, True, False, False]
    assert verify(audit_dir).verdict == "valid"


def test_a_hold_names_the_files_that_have_a_tombstone_already(audit_dir: Path) -> None:
    """A run was killed before they went. They stay, but whoever removes them is not noticed."""
    old, other = record(audit_dir, 200), record(audit_dir, 150)
    record(audit_dir, 80)
    Journal(str(audit_dir), "audit").append(prune_of(audit_dir, 0), prune_of(audit_dir, 1))
    until = f"{NOW - timedelta(days=170):%Y-%m-%d}"
    ran = command("hold", "add", audit_dir, "--reason", "x", "--until", until)
    assert (ran.returncode, len(ran.stdout.split())) == (0, 1)
    assert ran.stderr.startswith(f"warning: {old.name} has a tombstone of an earlier run already")
    assert other.name not in ran.stderr
    assert "1 session gone" in retain(audit_dir)
    assert (old.exists(), other.exists()) == (True, False)
    assert command("hold", "add", audit_dir, "--reason", "x", "--since", until).stderr == ""


def test_each_change_of_a_hold_is_an_entry_and_a_line_that_is_signed(
    audit_dir: Path, tmp_path: Path
) -> None:
    """The entry is first, its session ends last; a note stands behind the line; the user is that
    of the system."""
    key, environ = (
        tmp_path / "audit.key",
        {"AUDIT_LOG_SIGNING_KEY_FILE": str(tmp_path / "audit.key")},
    )
    public = make_key(key).verifier
    record(audit_dir, 80, signer=Signer(key))

    name = add(audit_dir, "--until", "2026-03-31", USER="mallory", LOGNAME="mallory", **environ)
    done("hold", "release", audit_dir, name, "--reason", "over", **environ)

    entries = [e for e in recorded(audit_dir) if e["action"].startswith("AuditHold")]
    assert [e["action"] for e in entries] == ["AuditHoldAdd", "AuditHoldRelease"]
    assert {e["data"]["id"] for e in entries} == {name}
    assert {e["data"]["by"] for e in entries}.isdisjoint({"mallory"})
    events = journal_events(audit_dir)
    kinds = [event["event"] for event in events]
    hold = events[kinds.index("Hold")]
    assert hold["until"] == "2026-04-01T00:00:00.000000Z"
    assert "since" not in hold
    for kind in ("Hold", "Release"):
        at = kinds.index(kind)
        assert kinds[at + 1] == "Checkpoint"
        opened, closed = (
            [n for n, event in enumerate(events) if (event["event"], event.get("session")) ==
             (edge, entries[kind == "Release"]["session"])] for edge in ("Open", "Close")
        )  # fmt: skip
        assert opened < [at] < closed
    assert verify(audit_dir, keys=[public]).verdict == "valid"


def test_a_signed_log_takes_no_hold_without_a_key(audit_dir: Path, tmp_path: Path) -> None:
    """It would be anybody's; an error and a hint, and nothing is written."""
    make_key(tmp_path / "audit.key")
    record(audit_dir, 80, signer=Signer(tmp_path / "audit.key"))
    before = contents(audit_dir)
    ran = command("hold", "add", audit_dir, "--reason", "x")
    assert ran.returncode == 1
    assert "is signed, and no key is configured" in ran.stderr
    assert {**contents(audit_dir), ".keeping.lock": b""} == {**before, ".keeping.lock": b""}


def test_the_list_shows_holds_in_force_and_json_all_of_them(audit_dir: Path) -> None:
    """Text from elsewhere does not control the terminal."""
    record(audit_dir, 80)
    assert done("hold", "list", audit_dir) == "no hold is in force\n"
    first = add(audit_dir)
    second = done("hold", "add", audit_dir, "--reason", "a\x1b[31mb", "--since",
                  "2026-01-01T10:00:00+02:00").strip()  # fmt: skip
    done("hold", "release", audit_dir, first, "--reason", "over")

    shown = done("hold", "list", audit_dir)
    assert shown.startswith(f"{second} from 2026-01-01 08:00:00Z: a\\u001b[31mb (by ")
    assert first not in shown
    told = json.loads(done("hold", "list", audit_dir, "--json"))
    assert [(each["id"], each["release_reason"]) for each in told] == [
        (first, "over"), (second, None)
    ]  # fmt: skip
    assert told[1]["since"] == "2026-01-01T08:00:00Z"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["add", "--reason", " "], "a hold needs a reason"),
        (["add", "--reason", "x", "--since", "yesterday"], "is no day and no time"),
        (["add", "--reason", "x", "--until", "2026-01-01T10:00:00"], "is no day and no time"),
        (["add", "--reason", "x", "--until", "9999-12-31"], "is no day and no time"),
        (["add", "--reason", "x", "--since", "0202-01-01"], "out of the range of the journal"),
        (["add", "--reason", "x", "--since", "0999-12-31"], "out of the range of the journal"),
        (
            ["add", "--reason", "x", "--since", "1000-01-01T00:00:00+00:01"],
            "time 1000-01-01T00:00:00+00:01 is out of the range",
        ),
        (["add", "--reason", "x", "--since", "0001-01-01T00:00:00+05:00"], "out of the range"),
        (["add", "--reason", "x", "--until", "9999-12-31T23:59:59-05:00"], "out of the range"),
        (["add", "--reason", "x", "--since", "2026-02-02", "--until", "2026-02-01"], "ends before"),
        (["release", "nobody", "--reason", "x"], "there is no hold 'nobody' in force"),
    ],
)
def test_a_wrong_use_is_refused_and_leaves_nothing(
    audit_dir: Path, words: list[str], told: str
) -> None:
    """An error that says what to write."""
    record(audit_dir, 80)
    before = contents(audit_dir)
    ran = command("hold", words[0], audit_dir, *words[1:])
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: ")
    assert told in ran.stderr
    assert {**contents(audit_dir), ".keeping.lock": b""} == {**before, ".keeping.lock": b""}


def test_the_first_and_the_last_time_of_a_hold_are_read_back(audit_dir: Path) -> None:
    """Years of four digits, in UTC."""
    record(audit_dir, 80)
    add(audit_dir, "--since", "1000-01-01", "--until", "9999-12-31T23:59:59Z")
    shown = done("hold", "list", audit_dir)
    assert " from 1000-01-01 00:00:00Z until 9999-12-31 23:59:59Z:" in shown
    assert verify(audit_dir).verdict == "valid"


@pytest.mark.parametrize(
    "event",
    [
        {"event": "Hold", "id": "x", "reason": "x", "by": "x", "since": "202-01-01T00:00:00Z"},
        {"event": "Release", "id": "x", "reason": "x"},
        {"event": "Prune", "file": "x", "sequence": "x", "hash": "", "reason": "", "by": "",
         "to": "removed"},
    ],
)  # fmt: skip
def test_a_line_that_would_not_be_read_back_is_not_entered(
    audit_dir: Path, event: dict[str, Any]
) -> None:
    """The log would be tampered for ever."""
    record(audit_dir, 80)
    before = contents(audit_dir)
    with pytest.raises(AuditConfigurationError, match="could not be read back"):
        Keeping(str(audit_dir), Settings()).enter([event])
    assert contents(audit_dir) == before


def test_a_hold_is_released_once(audit_dir: Path) -> None:
    """The second time it is not in force."""
    record(audit_dir, 80)
    keeping = Keeping(str(audit_dir), Settings())
    name = keeping.add_hold("x").id
    keeping.release_hold(name, "over")
    with pytest.raises(AuditConfigurationError, match="no hold"):
        keeping.release_hold(name, "over")


def test_a_tombstone_under_a_hold_is_tampered(audit_dir: Path) -> None:
    """Whoever removed the file did not ask retain."""
    old = record(audit_dir, 200)
    record(audit_dir, 80)
    add(audit_dir)
    Journal(str(audit_dir), "audit").append(prune_of(audit_dir, 0))
    old.unlink()
    findings = {f.kind: f for f in verify(audit_dir).findings}
    assert set(findings) == {"prune", "missing"}
    assert "under the hold" in findings["prune"].reason


def test_a_release_behind_the_tombstone_does_not_mend_it(audit_dir: Path) -> None:
    """The order in the journal counts."""
    record(audit_dir, 200)
    record(audit_dir, 80)
    name = add(audit_dir)
    release = {"event": "Release", "id": name, "reason": "over", "by": "x"}
    Journal(str(audit_dir), "audit").append(prune_of(audit_dir, 0), release)
    assert "prune" in {f.kind for f in verify(audit_dir).findings}


def test_a_release_that_nothing_signs_releases_nothing(audit_dir: Path, tmp_path: Path) -> None:
    """Whoever can write the directory must not get rid of a hold by that."""
    key, environ = (
        tmp_path / "audit.key",
        {"AUDIT_LOG_SIGNING_KEY_FILE": str(tmp_path / "audit.key")},
    )
    public = make_key(key).verifier
    old = record(audit_dir, 200, signer=Signer(key))
    record(audit_dir, 80, signer=Signer(key))
    name = add(audit_dir, **environ)
    Journal(str(audit_dir), "audit").append(
        {"event": "Release", "id": name, "reason": "over", "by": "mallory"}
    )
    assert name in done("hold", "list", audit_dir, **environ)
    assert f"under the hold {name}" in done("retain", audit_dir, *RETAIN, **environ)
    record(audit_dir, 70, signer=Signer(key))  # its note covers the line
    assert f"under the hold {name}" in done("retain", audit_dir, *RETAIN, **environ)
    assert old.exists()
    report = verify(audit_dir, keys=[public])
    assert [(f.verdict, f.kind) for f in report.findings] == [("incomplete", "unsigned")]

    done("hold", "release", audit_dir, name, "--reason", "over", **environ)
    done("retain", audit_dir, *RETAIN, **environ)
    assert not old.exists()
    assert verify(audit_dir, keys=[public]).verdict == "valid"


def test_a_release_just_before_a_hold_is_signed_releases_nothing(
    audit_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note of a command vouches for what that command has entered, and for nothing else."""
    key = tmp_path / "audit.key"
    public = make_key(key).verifier
    old = record(audit_dir, 200, signer=Signer(key))
    record(audit_dir, 80, signer=Signer(key))
    keeping = Keeping(str(audit_dir), Settings(signing_key_file=str(key)))
    name, enter = keeping.add_hold("case 4711").id, keeping.enter

    def forged(events: list[Any]) -> None:
        release = {"event": "Release", "id": name, "reason": "over", "by": "mallory"}
        Journal(str(audit_dir), "audit").append(release)
        enter(events)

    monkeypatch.setattr(keeping, "enter", forged)
    keeping.add_hold("another case", since=datetime(2030, 1, 1, tzinfo=timezone.utc))
    kinds = [event["event"] for event in journal_events(audit_dir)]
    at = kinds.index("Release")
    assert kinds[at : at + 3] == ["Release", "Hold", "Checkpoint"]

    plan = keeping.retain(timedelta(days=90), "--keep 90d", None)
    assert f"it is under the hold {name}: case 4711" in [reason for _, reason in plan.stays]
    assert old.exists()
    report = verify(audit_dir, keys=[public])
    assert [(f.verdict, f.kind) for f in report.findings] == [("incomplete", "unsigned")]


def released_and_gone(directory: Path, **environ: str) -> str:
    """Have a session go whose hold was released; return the name of the hold."""
    name = add(directory, **environ)
    done("hold", "release", directory, name, "--reason", "over", **environ)
    assert "1 session gone" in done("retain", directory, *RETAIN, **environ)
    return name


def test_the_first_note_vouches_for_a_release_and_what_went_by_it(
    audit_dir: Path, tmp_path: Path
) -> None:
    """A log that got its key late is as it was recorded; without a note nobody knows."""
    key = tmp_path / "audit.key"
    public = make_key(key).verifier
    for days in (200, 80):
        record(audit_dir, days)
    released_and_gone(audit_dir)
    kinds = {f.kind for f in verify(audit_dir, keys=[public]).findings}
    assert kinds == {"unsigned", "not-signed"}  # as for any log that this key has never signed

    record(audit_dir, 1, signer=Signer(key))
    report = verify(audit_dir, keys=[public])
    assert (report.verdict, report.findings) == ("valid", ())
    assert [each.signed for each in report.pruned] == [True]


@pytest.mark.parametrize("known", ["the new key", "the old key for a time before"])
def test_what_another_key_may_have_released_is_not_known(
    audit_dir: Path, tmp_path: Path, known: str
) -> None:
    """After a change of keys; the earlier public key tells, if it may have signed by then."""
    old, new = tmp_path / "old.key", tmp_path / "new.key"
    keys = [make_key(new, "example.com/new").verifier]
    before = make_key(old, "example.com/old").verifier
    for days in (200, 80):
        record(audit_dir, days, signer=Signer(old))
    released_and_gone(audit_dir, AUDIT_LOG_SIGNING_KEY_FILE=str(old))
    record(audit_dir, 0, signer=Signer(new))
    assert verify(audit_dir, keys=[*keys, before]).verdict == "valid"
    if known != "the new key":
        keys += read_keys(f"{before} until={NOW - timedelta(days=60):%Y-%m-%dT%H:%M:%SZ}")

    report = verify(audit_dir, keys=keys)
    assert {(f.verdict, f.kind) for f in report.findings} == {("incomplete", "unsigned")}
    assert [each.signed for each in report.pruned] == [False]


@pytest.mark.parametrize("note_follows", [True, False])
def test_a_release_and_a_tombstone_that_the_key_has_not_written_are_tampered(
    audit_dir: Path, tmp_path: Path, *, note_follows: bool
) -> None:
    """Whoever holds the key would have signed them at once."""
    key = tmp_path / "audit.key"
    public = make_key(key).verifier
    old = record(audit_dir, 200, signer=Signer(key))
    record(audit_dir, 80, signer=Signer(key))
    name = add(audit_dir, AUDIT_LOG_SIGNING_KEY_FILE=str(key))
    release = {"event": "Release", "id": name, "reason": "over", "by": "mallory"}
    Journal(str(audit_dir), "audit").append(release, prune_of(audit_dir, 0))
    old.unlink()
    if note_follows:
        record(audit_dir, 1, signer=Signer(key))
    findings = {f.kind: f for f in verify(audit_dir, keys=[public]).findings}
    assert set(findings) == {"prune", "missing"}
    assert f"under the hold {name}" in findings["prune"].reason


def test_what_a_signed_journal_says_of_holds_is_not_shown_without_a_key(
    audit_dir: Path, tmp_path: Path
) -> None:
    """A release in it may be anybody's. The public key will do."""
    key, public, other = tmp_path / "audit.key", tmp_path / "audit.pub", tmp_path / "other.key"
    public.write_text(str(make_key(key).verifier))
    make_key(other)
    old = record(audit_dir, 200, signer=Signer(key))
    record(audit_dir, 80, signer=Signer(key))
    name = add(audit_dir, AUDIT_LOG_SIGNING_KEY_FILE=str(key))
    Journal(str(audit_dir), "audit").append(
        {"event": "Release", "id": name, "reason": "over", "by": "mallory"}
    )

    shown = {"list": ["hold", "list", audit_dir], "plan": ["retain", audit_dir, "--keep", "90d"]}
    for words in shown.values():
        ran = command(*words)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert "is signed, and no key that signed it is given" in ran.stderr
        assert "hint: --key FILE names the public key of the log" in ran.stderr
        ran = command(*words, AUDIT_LOG_SIGNING_KEY_FILE=str(other))
        assert "nothing in it is signed by the given keys" in ran.stderr
    assert done(*shown["list"], "--key", public).startswith(f"{name} all sessions")
    told = done(*shown["plan"], "--key", public)
    assert f"{old.name}: it is under the hold {name}" in told


def test_a_release_of_nothing_and_a_hold_set_twice_are_tampered(audit_dir: Path) -> None:
    """The commands write neither."""
    record(audit_dir, 80)
    journal = Journal(str(audit_dir), "audit")
    journal.append({"event": "Release", "id": "none", "reason": "over", "by": "x"})
    assert [f.kind for f in verify(audit_dir).findings] == ["inserted"]


@pytest.mark.parametrize("signed", [True, False])
def test_a_hold_that_is_cut_off_the_end_of_the_journal_is_noticed(
    audit_dir: Path, tmp_path: Path, *, signed: bool
) -> None:
    """The end of the session that records it goes with it."""
    key = tmp_path / "audit.key"
    keys = [make_key(key).verifier] if signed else []
    record(audit_dir, 80, signer=Signer(key) if signed else None)
    add(audit_dir, **({"AUDIT_LOG_SIGNING_KEY_FILE": str(key)} if signed else {}))
    assert verify(audit_dir, keys=keys).verdict == "valid"

    path = audit_dir / "audit-journal.ndjson"
    lines = lines_of(path)
    put(path, lines[: [b'"event":"Hold"' in line for line in lines].index(True)])

    report = verify(audit_dir, keys=keys)
    assert [(f.verdict, f.kind) for f in report.findings] == [("incomplete", "unfinished")]


def test_a_hold_is_set_although_its_session_cannot_be_ended(
    audit_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is told that it failed; what did is logged."""
    record(audit_dir, 80)
    real = AuditHandler.close

    def close(handler: AuditHandler) -> None:
        real(handler)
        raise AuditTimeoutError("it hangs", persisted="unknown", sink="x")

    with monkeypatch.context() as patch:
        patch.setattr(AuditHandler, "close", close)
        hold = Keeping(str(audit_dir), Settings()).add_hold("case 4711")

    assert hold.released is None
    assert "the session of AuditHoldAdd in" in caplog.text
    assert "could not be ended, and what was recorded and done before stays" in caplog.text
    assert hold.id in done("hold", "list", audit_dir)


def test_a_hold_that_is_taken_out_of_the_journal_is_noticed(audit_dir: Path) -> None:
    """The journal is a chain."""
    record(audit_dir, 80)
    add(audit_dir)
    record(audit_dir, 70)
    path = audit_dir / "audit-journal.ndjson"
    put(path, [line for line in lines_of(path) if b'"event":"Hold"' not in line])
    assert verify(audit_dir).verdict == "tampered"
