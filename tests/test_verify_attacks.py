"""Every attack of the table in `docs/tamper-evidence.md`, tried on real directories."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forging import (
    Change,
    doubled,
    edited,
    events_of,
    inserted,
    journal_path,
    lines_of,
    put,
    put_events,
    recompute,
    relinked,
    removed,
    rest,
    session_paths,
    signing_key,
    swapped,
    write_log,
)

from structlog_audit.checkpoint import Signer
from structlog_audit.note import SigningKey, VerifierKey
from structlog_audit.report import Report
from structlog_audit.verify import verify

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")


class Log:
    """A signed log of two sessions, of which one follows the other; and its key."""

    def __init__(self, directory: Path, key: SigningKey, notes: list[str]) -> None:
        self.directory = directory
        self.key = key
        self.notes = notes

    def verify(self, *, key: bool = True, anchors: bool = False) -> Report:
        """Verify it, as it is by now."""
        keys = [self.key.verifier] if key else []
        return verify(self.directory, keys=keys, anchors=self.notes if anchors else [])

    def verdicts(self) -> tuple[str, str, str]:
        """Return the verdicts with the chain alone, with the key, and with anchors as well."""
        return (
            self.verify(key=False).verdict,
            self.verify().verdict,
            self.verify(anchors=True).verdict,
        )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SigningKey]:
    home = tmp_path_factory.mktemp("original")
    key = signing_key(home / "key")
    write_log(home / "audit", Signer(home / "key"))
    return home / "audit", key


@pytest.fixture
def log(original: tuple[Path, SigningKey], tmp_path: Path) -> Log:
    directory, key = original
    shutil.copytree(directory, tmp_path / "audit")
    notes = [event["note"] for event in events_of(directory) if event["event"] == "Checkpoint"]
    return Log(tmp_path / "audit", key, notes)


def kinds(report: Report) -> set[str]:
    return {finding.kind for finding in report.findings}


def reasons(report: Report) -> str:
    return "\n".join(finding.reason for finding in report.findings)


TAMPERED = ("tampered",) * 3
VALID = ("valid",) * 3


def test_nothing_is_found_in_what_was_not_touched(log: Log) -> None:
    """Whatever it is verified with."""
    report = log.verify(anchors=True)

    assert log.verdicts() == VALID
    assert report.findings == ()
    assert (report.sessions, report.closed, report.entries) == (2, 2, 10)
    assert report.checkpoints == len(log.notes)
    assert report.signed_until is not None
    assert report.anchored_until is not None
    assert report.signed_until.line == len(events_of(log.directory)) - 1


def test_each_byte_of_each_session_file(log: Log) -> None:
    """None of them can be another one."""
    for path in session_paths(log.directory):
        data = path.read_bytes()
        for at in range(len(data)):
            put(path, [], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            report = log.verify(key=False)
            assert report.verdict == "tampered", (at, data[at - 20 : at + 20])
            assert str(path) in {finding.file for finding in report.findings}, at
        put(path, [], data)


def test_each_byte_of_the_journal_but_those_of_its_last_line(log: Log) -> None:
    """Nothing follows that one, and nothing is signed behind it; all others are vouched for."""
    path = journal_path(log.directory)
    data = path.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for at in range(len(data)):
        put(path, [], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        verdict = log.verify().verdict
        assert verdict == "tampered" or at >= last, (at, data[at - 20 : at + 20])
        assert verdict != "valid" or b'"note"' not in data[at : at + 10], at


SESSION_KINDS: list[tuple[Change, str, str]] = [
    (removed, "deleted", "cut"),
    (doubled, "duplicated", "duplicated"),
    (inserted, "inserted", "inserted"),
    (swapped, "reordered", "reordered"),
]


@pytest.mark.parametrize(("change", "kind", "at_end"), SESSION_KINDS)
def test_each_line_of_a_session(change: Change, kind: str, at_end: str, log: Log) -> None:
    """What was done is said, and where; and it is one finding."""
    for path in session_paths(log.directory):
        lines = lines_of(path)
        for at in range(len(lines) - (change is swapped)):
            put(path, change(lines, at))
            report = log.verify(key=False)
            assert report.verdict == "tampered"
            expected = at_end if at + 1 == len(lines) else kind
            (finding,) = report.findings
            assert finding.kind == expected, (at, finding)
            place = at + (change is doubled) + (change is not removed or kind == finding.kind)
            assert finding.line == place, (at, finding)
            if finding.offset is not None and finding.line is not None:
                before = change(lines, at)[: finding.line - 1]
                assert finding.offset == sum(len(line) + 1 for line in before)
        put(path, lines)


@pytest.mark.parametrize("change", [removed, doubled, inserted, swapped])
def test_each_line_of_the_journal(change: Change, log: Log) -> None:
    """The last line alone can go: then the log is not signed to its end, unless it was anchored."""
    path = journal_path(log.directory)
    lines = lines_of(path)
    for at in range(len(lines) - (change is swapped)):
        put(path, change(lines, at))
        if change is removed and at == len(lines) - 1:
            assert log.verdicts() == ("valid", "incomplete", "incomplete")
            assert kinds(log.verify()) == {"unsigned"}
        else:
            assert log.verdicts() == TAMPERED, at


def test_an_edited_entry_is_shown_with_its_place_and_hashes(log: Log) -> None:
    """Line, byte offset, what had to be there and what is; and nothing of the entry itself."""
    path = session_paths(log.directory)[0]
    lines = lines_of(path)
    lines[2] = edited(lines[2])
    put(path, lines)

    (finding,) = log.verify().findings

    assert (finding.kind, finding.file, finding.line) == ("edited", str(path), 3)
    assert finding.offset == len(lines[0]) + len(lines[1]) + 2
    assert finding.expected is not None
    assert finding.expected.encode() in lines[3]
    assert "Gift" not in str(finding)


def test_a_line_that_was_broken_in_two_is_edited(log: Log) -> None:
    """Its second half ends as a line must; it was not inserted."""
    path = session_paths(log.directory)[0]
    lines = lines_of(path)
    put(path, [*lines[:2], lines[2][:50], lines[2][50:], *lines[3:]])

    assert kinds(log.verify()) == {"edited"}


def test_two_edits_are_two_findings(log: Log) -> None:
    """What follows the first one is still looked at."""
    path = session_paths(log.directory)[0]
    put(path, relinked([line for line in lines_of(path)[:-1] for _ in range(4)]))
    lines = lines_of(path)
    lines[3], lines[9] = lines[3][:1] + b" " + lines[3][1:], lines[9][:1] + b" " + lines[9][1:]
    put(path, lines)

    found = [(f.kind, f.line) for f in verify(path).findings if f.verdict == "tampered"]

    assert found == [("edited", 4), ("edited", 10)]


def test_a_thousand_edits_are_not_a_thousand_findings(log: Log) -> None:
    """Nobody reads them."""
    path = session_paths(log.directory)[0]
    lines = relinked(lines_of(path)[:1] + lines_of(path)[1:2] * 3_000)
    put(path, [b" " + line if number % 3 == 1 else line for number, line in enumerate(lines)])

    assert 1 < len(verify(path).findings) < 30


@pytest.mark.parametrize("tail", [b"", b'{"level":35,"ti'])
def test_a_session_that_is_cut_at_any_line(tail: bytes, log: Log) -> None:
    """The journal knows its end; alone, it is incomplete: a crash looks the same."""
    for path in session_paths(log.directory):
        lines = lines_of(path)
        for count in range(len(lines)):
            put(path, lines[:count], tail)
            report = log.verify()
            assert report.verdict == "tampered"
            assert kinds(report) == {"cut"}
            assert verify(path).verdict == "incomplete"
        put(path, lines)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("rename", ["old", "audit-20200101-{}", "other-{}", "{}.bak"])
def test_a_session_file_that_is_renamed(rename: str, number: int, log: Log) -> None:
    """It is found under its new name."""
    path = session_paths(log.directory)[number]
    name = path.name.split("-", 1)[1] if rename.startswith("other") else path.name
    if rename.startswith("audit"):
        name = path.name.split("-", 2)[2]
    path.rename(log.directory / rename.format(name))

    assert log.verdicts() == TAMPERED
    assert kinds(log.verify()) == {"renamed"}


def test_two_session_files_that_are_swapped(log: Log) -> None:
    """Each holds the session of the other one."""
    one, other = session_paths(log.directory)
    one.rename(log.directory / "third")
    other.rename(one)
    (log.directory / "third").rename(other)

    assert log.verdicts() == TAMPERED
    assert kinds(log.verify()) == {"renamed"}


@pytest.mark.parametrize("number", [0, 1])
def test_a_session_file_that_is_removed(number: int, log: Log) -> None:
    """The journal knows it."""
    session_paths(log.directory)[number].unlink()

    assert log.verdicts() == TAMPERED
    assert kinds(log.verify()) == {"missing"}


@pytest.mark.parametrize("number", [0, 1])
def test_a_session_file_that_is_emptied_or_replaced(number: int, log: Log) -> None:
    """By nothing, by a link, by a directory, by garbage."""
    path = session_paths(log.directory)[number]
    path.rename(log.directory.parent / "away")
    for replace, kind in (
        (lambda: put(path, []), "cut"),
        (lambda: path.mkdir(), "unreadable"),
        (lambda: path.symlink_to(log.directory.parent / "away"), "unreadable"),
        (lambda: put(path, [bytes(range(256)) * 9], b"\0\1\2"), "edited"),
    ):
        replace()
        report = log.verify()
        assert report.verdict == ("unreadable" if kind == "unreadable" else "tampered")
        assert kinds(report) == {kind}
        assert {finding.file for finding in report.findings} == {str(path)}
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def test_the_journal_that_is_removed_or_emptied(log: Log) -> None:
    """There are session files that it must know."""
    path = journal_path(log.directory)
    put(path, [])
    assert log.verdicts() == TAMPERED
    assert "journal-missing" in kinds(log.verify())
    path.unlink()
    assert log.verdicts() == TAMPERED
    assert "journal-missing" in kinds(log.verify())


def test_the_journal_that_is_cut_at_any_line(log: Log) -> None:
    """It does not know sessions then that have an end; or it is not signed to its end."""
    path = journal_path(log.directory)
    lines = lines_of(path)
    names = [event["event"] for event in events_of(log.directory)]
    opened = [number for number, name in enumerate(names, 1) if name == "Open"]
    for count in range(1, len(lines)):
        put(path, lines[:count])
        chain, key, anchored = log.verdicts()
        if count < opened[1]:
            assert (chain, key, anchored) == TAMPERED, count
            assert "planted" in kinds(log.verify())
        else:
            assert key != "valid", count
            assert kinds(log.verify()) <= {"unfinished", "unsigned"}
        covered = max(int(note.split("\n")[1]) for note in log.notes)
        assert (anchored == "tampered") is (count < covered), count


def cut_back(log: Log, sessions: int) -> None:
    """Go back to the time when there were only so many sessions, which had ended."""
    for path in session_paths(log.directory)[sessions:]:
        path.unlink()
    events = events_of(log.directory)
    ends = [at for at, event in enumerate(events) if event["event"] == "Close"]
    put(
        journal_path(log.directory), lines_of(journal_path(log.directory))[: ends[sessions - 1] + 2]
    )
    assert len(session_paths(log.directory)[:sessions]) == sessions


def test_a_directory_that_is_rolled_back_is_noticed_with_an_anchor_alone(log: Log) -> None:
    """Without one it is what it once was, and the report says that it could not see that."""
    cut_back(log, 1)

    assert log.verdicts() == ("valid", "valid", "tampered")
    assert any("No anchor was given" in sentence for sentence in log.verify().not_checked)
    report = log.verify(anchors=True)
    assert kinds(report) == {"anchor"}
    assert "cut or rolled back" in reasons(report)


def test_a_directory_that_is_emptied(log: Log) -> None:
    """An anchor knows that there was a log."""
    for path in log.directory.iterdir():
        path.unlink()

    assert log.verdicts() == ("unreadable", "unreadable", "tampered")


def test_a_tail_that_is_cut_behind_the_last_checkpoint(tmp_path: Path) -> None:
    """It looks like a crash, and the report names the window; before it, it is tampering."""
    key = signing_key(tmp_path / "key")
    directory = tmp_path / "audit"
    write_log(directory, Signer(tmp_path / "key"), 1)
    events = events_of(directory)
    close = next(at for at, event in enumerate(events) if event["event"] == "Close")
    put_events(directory, [*events[:close]])  # as if it had been killed before its end
    put(session_paths(directory)[0], lines := lines_of(session_paths(directory)[0])[:-1])
    log = Log(directory, key, [])
    head = max(event["sequence"] for event in events[:close] if event["event"] in ("Open", "Head"))

    for count in range(head, len(lines) + 1):
        put(session_paths(directory)[0], lines[:count])
        report = log.verify(key=False)
        assert report.verdict == "incomplete"
        (window,) = report.windows
        assert (window.entries, window.open) == (count - head, False)
        assert window.since is not None
        assert f"knows line {head} of it, at {window.since}" in reasons(report)
    put(session_paths(directory)[0], lines[: head - 1])
    assert kinds(log.verify(key=False)) == {"cut"}


def test_a_chain_that_is_recomputed_is_noticed_with_a_key(log: Log) -> None:
    """The old notes give it away, to those without a key as well; without them, a key does."""
    recompute(log.directory)

    assert log.verdicts() == TAMPERED
    assert kinds(log.verify(key=False)) == {"root"}


def test_a_chain_that_is_recomputed_without_its_notes_looks_valid_without_a_key(log: Log) -> None:
    """And the report says that it could not see that."""
    recompute(log.directory, strip=True)

    assert log.verdicts() == ("valid", "tampered", "tampered")
    assert kinds(log.verify()) == {"not-signed"}
    assert any("No key was given" in sentence for sentence in log.verify(key=False).not_checked)


def test_a_log_that_is_signed_again_with_another_key(log: Log, tmp_path: Path) -> None:
    """Its name may be the same; the key is not."""
    recompute(log.directory, signing_key(tmp_path / "other"))

    assert log.verdicts() == ("valid", "tampered", "tampered")
    assert kinds(log.verify()) == {"not-signed"}


def test_a_log_that_is_signed_again_with_its_own_key_is_noticed_with_an_anchor(log: Log) -> None:
    """Who holds the key can forge all; the anchors of before are not in it."""
    recompute(log.directory, log.key)

    assert log.verdicts() == ("valid", "valid", "tampered")
    assert kinds(log.verify(anchors=True)) == {"anchor"}


def test_an_end_that_is_signed_again_with_another_key(log: Log, tmp_path: Path) -> None:
    """Up to the last note that is genuine, all is; behind it, nothing is signed."""
    other = signing_key(tmp_path / "other")
    events = events_of(log.directory)
    first = next(at for at, event in enumerate(events) if event["event"] == "Checkpoint")

    put_events(log.directory, events, other, genuine=first + 1)

    assert log.verdicts() == ("valid", "incomplete", "tampered")
    report = log.verify()
    assert kinds(report) == {"unsigned"}
    assert report.signed_until is not None
    assert report.signed_until.line == first
    assert any("keys that were not given" in sentence for sentence in report.not_checked)


def test_checkpoints_that_are_stripped(log: Log) -> None:
    """Keys were given, and nothing is signed by them."""
    events = [event for event in events_of(log.directory) if event["event"] != "Checkpoint"]
    put_events(log.directory, events)

    assert log.verdicts() == ("valid", "tampered", "tampered")
    assert kinds(log.verify()) == {"not-signed"}


def test_a_log_that_is_computed_anew_and_then_signed_again(log: Log) -> None:
    """The key cannot tell it from a log that it begins to sign: that is said, and anchors tell."""
    recompute(log.directory, strip=True)
    assert kinds(log.verify()) == {"not-signed"}
    write_log(log.directory, Signer.from_text(log.key.reveal()), sessions=1)

    report = log.verify()

    assert report.verdict == "valid"
    assert any(
        sentence.startswith("2 sessions had ended before a given key first signed")
        for sentence in report.not_checked
    )
    assert log.verify(anchors=True).verdict == "tampered"


def test_a_log_that_was_signed_from_the_beginning_says_nothing_of_that(log: Log) -> None:
    """Its first session was signed while it went on, or as it ended."""
    assert not any("had ended before" in sentence for sentence in log.verify().not_checked)


def test_a_session_that_is_transplanted_from_another_log(log: Log, tmp_path: Path) -> None:
    """No journal knows it."""
    write_log(tmp_path / "elsewhere", sessions=1)
    (path,) = session_paths(tmp_path / "elsewhere")
    shutil.copy2(path, log.directory)

    assert log.verdicts() == TAMPERED
    assert kinds(log.verify()) == {"planted"}


def test_a_session_that_is_transplanted_in_the_place_of_another_one(
    log: Log, tmp_path: Path
) -> None:
    """Under the name of the one that it replaces."""
    write_log(tmp_path / "elsewhere", sessions=1)
    (path,) = session_paths(tmp_path / "elsewhere")
    shutil.copy2(path, session_paths(log.directory)[1])

    assert log.verdicts() == TAMPERED
    assert kinds(log.verify()) == {"inserted"}


def test_a_whole_log_that_is_transplanted(log: Log, tmp_path: Path) -> None:
    """It has another key."""
    shutil.rmtree(log.directory)
    signing_key(tmp_path / "other")
    write_log(log.directory, Signer(tmp_path / "other"))

    assert log.verdicts() == ("valid", "tampered", "tampered")


def test_two_histories_for_two_auditors(log: Log, tmp_path: Path) -> None:
    """Each is valid alone; the anchors of one contradict the other one, from where they part."""
    directory = tmp_path / "second"
    shutil.copytree(log.directory, directory)
    signer = _signer(log.key, tmp_path / "again")
    write_log(log.directory, signer, sessions=1)
    write_log(directory, signer, sessions=1)
    first = [event["note"] for event in events_of(log.directory) if "note" in event]
    second = Log(directory, log.key, first)

    assert second.verdicts() == ("valid", "valid", "tampered")
    assert "not those that were anchored" in reasons(second.verify(anchors=True))


def test_a_second_log_of_the_same_key(log: Log, tmp_path: Path) -> None:
    """An honest one has other anchors of its key beside its own; so has one that was replaced."""
    directory = tmp_path / "second"
    write_log(directory, _signer(log.key, tmp_path / "again"))
    own = [event["note"] for event in events_of(directory) if "note" in event]
    second = Log(directory, log.key, [*log.notes, *own])

    assert second.verdicts() == ("valid", "valid", "incomplete")
    assert "other journals were anchored" in reasons(second.verify(anchors=True))
    both = verify([log.directory, directory], keys=[log.key.verifier], anchors=[*log.notes, *own])
    assert both.verdict == "valid"


def _signer(key: SigningKey, path: Path) -> Signer:
    path.write_text(key.reveal() + "\n")
    path.chmod(0o600)
    return Signer(path)


def test_a_key_out_of_its_time(log: Log) -> None:
    """A note by a key that was not valid yet, or not any more, at the time of its line."""
    now = datetime.datetime.now(datetime.timezone.utc)
    hour = datetime.timedelta(hours=1)
    for since, until, verdict in (
        (now - hour, now + hour, "valid"),
        (None, now - hour, "tampered"),
        (now + hour, None, "tampered"),
    ):
        key = VerifierKey(log.key.verifier.name, log.key.verifier.public, since, until)
        report = verify(log.directory, keys=[key])
        assert report.verdict == verdict
        assert kinds(report) <= {"key-expired"}


def test_a_journal_that_a_process_found_cut_is_tampered_for_ever(
    tmp_path: Path, make_handler: Callable[..., object]
) -> None:
    """The process says what is missing, and goes on."""
    handler = make_handler()
    handler.record({"action": "A"})  # type: ignore[attr-defined]
    directory = tmp_path / "audit"
    lines = lines_of(journal_path(directory))
    put(journal_path(directory), lines[:1])
    handler.close()  # type: ignore[attr-defined]

    rest(directory)
    report = verify(directory)
    assert report.verdict == "tampered"
    assert "rewritten" in kinds(report)


def test_a_wrong_prefix_of_a_journal(log: Log) -> None:
    """All files were renamed, as if they were another program's."""
    for path in list(log.directory.iterdir()):
        path.rename(log.directory / path.name.replace("audit-", "other-", 1))

    assert log.verdicts() == TAMPERED
    assert "renamed" in kinds(log.verify())
