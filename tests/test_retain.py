"""Retention of real directories: what goes, what stays, and what verification says afterwards."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aging import command, contents, days_ago, done, journal_events, record
from forging import edited, lines_of, put
from reading import recorded, session_files
from running import HANG, environment, in_child
from signing import make_key

from structlog_audit import AuditHandler, FileSink, Settings, Signer, SinkError, copies
from structlog_audit.forward import Forwarder
from structlog_audit.journal import Journal
from structlog_audit.keeping import Keeping, cutoff_of
from structlog_audit.note import VerifierKey
from structlog_audit.survey import Survey
from structlog_audit.testing import MemorySink
from structlog_audit.verify import verify

pytest.importorskip("click", reason="the command line is an extra")
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
KEEP = ("--keep", "90d")


class Log:
    """A directory that is signed."""

    def __init__(self, place: Path) -> None:
        self.directory = place / "audit"
        self.key_file = place / "audit.key"
        self.keys: list[VerifierKey] = [make_key(self.key_file).verifier]
        self.signer = Signer(self.key_file)
        self.environ = {"AUDIT_LOG_SIGNING_KEY_FILE": str(self.key_file)}

    def record(self, days: float) -> Path:
        return record(self.directory, days, signer=self.signer)

    def retain(self, *options: object) -> str:
        return done("retain", self.directory, *KEEP, *options, **self.environ)

    def keeping(self) -> Keeping:
        return Keeping(str(self.directory), Settings(signing_key_file=str(self.key_file)))

    def verify(self) -> Any:
        return verify(self.directory, keys=self.keys)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def test_without_yes_nothing_is_changed(log: Log) -> None:
    """What would go is shown, and what stays, with the reason; not a byte is written."""
    old, newest = log.record(200), log.record(100)
    before = contents(log.directory)

    shown = log.retain()

    assert contents(log.directory) == before
    assert "1 session would go" in shown
    assert old.name in shown
    assert f"{newest.name}: it is the newest session" in shown
    assert "--yes" in shown


def test_old_sessions_go_and_verification_says_under_which_policy(log: Log) -> None:
    """Not "missing": pruned, when, why, by whom; the log is valid, and the rest is there."""
    old, young = log.record(100), log.record(80)

    assert "1 session gone" in log.retain("--yes")

    assert not old.exists()
    assert young.exists()
    report = log.verify()
    assert report.verdict == "valid"
    (pruned,) = report.pruned
    assert (pruned.file, pruned.policy, pruned.to) == (str(old), "--keep 90d", "removed")
    assert pruned.signed
    assert not pruned.there
    key = log.key_file.with_suffix(".pub")
    key.write_text(str(log.keys[0]))
    shown = done("verify", log.directory, "--key", key)
    assert "1 session pruned on" in shown
    assert "under --keep 90d" in shown


def test_a_run_is_an_entry_before_anything_goes_and_signs_its_tombstones(log: Log) -> None:
    """Its session ends behind the last tombstone, which a note follows."""
    log.record(200)
    log.record(80)

    log.retain("--yes")

    (entry,) = [e for e in recorded(log.directory) if e["action"] == "AuditRetain"]
    assert entry["data"]["policy"] == "--keep 90d"
    assert entry["data"]["sessions"] == 1
    assert entry["data"]["by"]
    names = [event["event"] for event in journal_events(log.directory)]
    opened = [at for at, name in enumerate(names) if name == "Open"]
    assert opened[-1] < names.index("Prune")
    assert names[names.index("Prune") + 1] == "Checkpoint"
    assert names[-2:] == ["Close", "Checkpoint"]


def test_nothing_to_do_leaves_no_trace(log: Log) -> None:
    """A daily run on a quiet day writes no entry."""
    log.record(80)
    before = contents(log.directory)

    log.retain("--yes")

    assert {**contents(log.directory), ".keeping.lock": b""} == {**before, ".keeping.lock": b""}


def test_an_archive_gets_the_files_as_they_are(log: Log, tmp_path: Path) -> None:
    """Byte by byte, for their owner alone; what is there already and equal is not written again."""
    old = [log.record(200), log.record(150)]
    log.record(80)
    before, archive = contents(log.directory), tmp_path / "far" / "archive"
    archive.mkdir(parents=True, mode=0o700)
    (archive / old[0].name).write_bytes(old[0].read_bytes())

    log.retain("--archive", archive, "--yes")

    assert contents(archive) == {path.name: before[path.name] for path in old}
    assert (archive / old[1].name).stat().st_mode & 0o777 == 0o600
    assert {each.to for each in log.verify().pruned} == {"archive"}


def test_something_else_in_the_archive_is_never_overwritten(log: Log, tmp_path: Path) -> None:
    """The file stays, without a tombstone; the status says so; the others go."""
    first, second = log.record(200), log.record(150)
    log.record(80)
    archive = tmp_path / "archive"
    archive.mkdir(mode=0o700)
    (archive / first.name).write_text("mine")

    ran = command("retain", log.directory, *KEEP, "--archive", archive, "--yes", **log.environ)

    assert ran.returncode == 1
    assert f"{first.name} stays: " in ran.stderr
    assert (archive / first.name).read_text() == "mine"
    assert first.exists()
    assert not second.exists()
    assert [os.path.basename(each.file) for each in log.verify().pruned] == [second.name]


@pytest.mark.parametrize("which", ["the same", "open to all"])
def test_an_archive_that_is_none_is_refused(log: Log, tmp_path: Path, which: str) -> None:
    """Before anything is recorded."""
    log.record(200)
    log.record(80)
    archive = log.directory if which == "the same" else tmp_path / "open"
    if which != "the same":
        archive.mkdir()
        archive.chmod(0o777)

    ran = command("retain", log.directory, *KEEP, "--archive", archive, "--yes", **log.environ)

    assert ran.returncode == 1
    assert ran.stderr.startswith("error: the archive")
    assert len(session_files(log.directory)) == 2


def test_the_directory_of_an_archive_is_not_made(log: Log, tmp_path: Path) -> None:
    """A mount point with a slip in its name would fill the disk that it is not on."""
    log.record(200)
    log.record(80)
    before = contents(log.directory)

    ran = command("retain", log.directory, *KEEP, "--archive", tmp_path / "mnt" / "old", "--yes",
                  **log.environ)  # fmt: skip

    assert ran.returncode == 1
    assert ran.stderr.startswith(f"error: there is no directory {tmp_path / 'mnt'}, in which")
    assert "\nhint: mount it, or make it" in ran.stderr
    assert not (tmp_path / "mnt").exists()
    assert {**contents(log.directory), ".keeping.lock": b""} == {**before, ".keeping.lock": b""}


@pytest.mark.skipif(os.name != "posix", reason="needs FIFOs")
@pytest.mark.parametrize("what", ["fifo", "directory", "link"])
def test_a_lock_that_is_no_file_is_named(log: Log, what: str) -> None:
    """Nothing is waited for, and nothing is followed."""
    log.record(200)
    path = log.directory / ".keeping.lock"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")

    ran = command("retain", log.directory, *KEEP, "--yes", **log.environ)

    assert ran.returncode == 1
    assert ran.stderr == (
        f"error: {path} is no regular file\nhint: find out who put it there, and move it away\n"
    )
    assert not (log.directory / "elsewhere").exists()


@pytest.mark.parametrize("where", ["audit", "archive"])
def test_a_directory_where_a_copy_is_to_be_made_is_named(
    log: Log, tmp_path: Path, where: str
) -> None:
    """With what to do."""
    old = log.record(200)
    log.record(80)
    part = tmp_path / where / (f".{old.name}.zst.part" if where == "audit" else f".{old.name}.part")
    part.parent.mkdir(exist_ok=True, mode=0o700)
    part.mkdir()

    ran = command("retain", log.directory, *KEEP, "--archive", tmp_path / "archive", "--yes",
                  **log.environ)  # fmt: skip

    assert ran.returncode == 1
    assert ran.stderr == (
        f"error: {part} is a directory, where a copy is to be made\n"
        "hint: find out who put it there, and move it away\n"
    )
    assert old.exists()


@pytest.mark.parametrize("work", ["archive", "compress"])
def test_a_full_disk_is_told_in_words_that_fit_a_copy(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """No session begins by itself there."""
    log.record(200)
    log.record(80)

    def write_all(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(copies._durable, "write_all", write_all)
    keeping, age = log.keeping(), timedelta(days=90)
    works: dict[str, Callable[[], object]] = {
        "archive": lambda: keeping.retain(age, "--keep 90d", str(tmp_path / "archive")),
        "compress": lambda: keeping.compress(age),
    }
    with pytest.raises(SinkError, match="No space left") as raised:
        works[work]()
    assert raised.value.hint == (
        "free some space there and run it again: it goes on with what is left to do"
    )


def forged_open(log: Log) -> str:
    """Enter a session in the journal, without a key, that was never there; return its file."""
    name = f"audit-20991231-{'z' * 20}.ndjson"
    Journal(str(log.directory), "audit").append(
        {"event": "Open", "file": name, "session": "z" * 20, "sequence": 2, "hash": "0" * 64}
    )
    return name


@pytest.mark.parametrize("how", ["never there", "removed", "removed with a forged tombstone"])
def test_nothing_goes_where_a_session_has_gone_without_a_tombstone(log: Log, how: str) -> None:
    """It is said which one, and what to do."""
    files = [log.record(days) for days in (200, 190, 180)]
    gone = files[1]
    if how == "never there":
        gone = log.directory / forged_open(log)
    elif how == "removed":
        gone.unlink()
    else:
        told = next(e for e in journal_events(log.directory)
                    if e["event"] == "Close" and e["file"] == gone.name)  # fmt: skip
        prune = {name: told[name] for name in ("file", "session", "sequence", "hash")}
        _enter(log, {"event": "Prune", "reason": "x", "by": "x", "to": "removed", **prune},
               sign=False)  # fmt: skip
        gone.unlink()
    before = contents(log.directory)

    for words in ([], ["--yes"]):
        ran = command("retain", log.directory, *KEEP, *words, **log.environ)
        assert ran.returncode == 1
        assert ran.stderr.startswith(f"error: {gone} is gone, and the journal has no tombstone")
        assert "\nhint: run structlog-audit verify on the directory; put the file" in ran.stderr
    assert {**contents(log.directory), ".keeping.lock": b""} == {**before, ".keeping.lock": b""}


def test_an_invented_session_does_not_have_the_file_of_a_real_one_go(log: Log) -> None:
    """Its tombstone would be that of the invented one, and the real file missing ever after."""
    log.record(200)
    log.record(80)
    close = next(e for e in journal_events(log.directory) if e["event"] == "Close")
    told = {**close, "session": "z" * 20, "sequence": 1, "hash": "0" * 64}
    forged = {n: told[n] for n in ("event", "file", "session", "sequence", "hash", "reason")}
    with days_ago(200):
        Journal(str(log.directory), "audit").append(forged)
    before = contents(log.directory)
    ran = command("retain", log.directory, *KEEP, "--yes", **log.environ)
    assert ran.returncode == 1
    assert "is not to be relied on: it gives session zzzz" in ran.stderr
    assert {**contents(log.directory), ".keeping.lock": b""} == {**before, ".keeping.lock": b""}


def test_a_session_that_is_in_the_journal_alone_is_not_the_newest(log: Log) -> None:
    """That one is among those that are there."""
    log.record(200)
    newest = log.record(190)
    forged_open(log)

    plan = log.keeping().plan_compression(timedelta(days=90))

    assert [(s.file, why) for s, why in plan.stays] == [(newest.name, "it is the newest session")]


def test_after_a_clock_was_set_back_both_that_may_be_the_newest_stay(log: Log) -> None:
    """The journal says it, or the name."""
    log.record(200)
    files = [log.record(190), log.record(195)]

    shown = log.retain("--yes")

    assert "1 session gone" in shown
    for path in files:
        assert f"{path.name}: it is the newest session" in shown


@pytest.mark.parametrize("how", ["pruned", "compressed"])
def test_a_file_that_goes_while_a_plan_is_made_is_not_missed(
    log: Log, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The journal was read before, and another process was at work."""
    log.record(200)
    log.record(80)
    real = Survey._forms

    def forms(survey: Survey) -> Any:
        monkeypatch.setattr(Survey, "_forms", real)
        if how == "pruned":
            log.keeping().retain(timedelta(days=90), "--keep 90d", None)
            return real(survey)
        listed = real(survey)  # a listing may miss the new name, and the old one as well
        log.keeping().compress(timedelta(days=90))
        return {name: each for name, each in listed.items() if (log.directory / name).exists()}

    monkeypatch.setattr(Survey, "_forms", forms)
    plan = log.keeping().survey().plan(cutoff_of(timedelta(days=90)))
    assert (plan.goes, plan.stays) == ((), ())


@pytest.fixture
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever signs does not enter the ends of sessions whose process is gone."""
    monkeypatch.setattr("structlog_audit.checkpoint.ends_as_found", lambda *_: [])


@pytest.mark.usefixtures("nobody_looks")
def test_a_session_without_an_end_stays_and_one_that_broke_goes(log: Log) -> None:
    """A killed process leaves none; where a write failed, the journal knows how far it goes."""
    killed, broken = _killed(log), _broken(log)
    log.record(80)

    shown = log.retain("--yes")

    assert f"{killed.name}: it has no end in the journal" in shown
    assert killed.exists()
    assert not broken.exists()
    entered = journal_events(log.directory)
    ended = any(each["event"] == "Break" and each["file"] == killed.name for each in entered)
    assert log.verify().verdict == ("valid" if ended else "incomplete")


def _killed(log: Log) -> Path:
    kept = []

    def work() -> str:
        with days_ago(200):
            sink = FileSink(log.directory, signer=log.signer)
            kept.append(AuditHandler(sink))
            kept[0].record({"action": "A"})
            return sink.path

    return Path(in_child(work))


def _broken(log: Log) -> Path:
    with days_ago(190):
        sink = FileSink(log.directory, signer=log.signer)
        handler = AuditHandler(sink)
        handler.record({"action": "A"})
        path = Path(sink.path)
        with path.open("ab") as file:
            file.write(b'{"torn')  # the session ends by it
        handler.record({"action": "A"})
        handler.close()
    return path


def test_a_session_that_is_being_written_stays(log: Log) -> None:
    """Its process has it open, however old its entries are."""
    with days_ago(200):
        handler = AuditHandler(FileSink(log.directory, signer=log.signer))
        handler.record({"action": "A"})
    log.record(80)

    shown = log.retain("--yes")

    assert "it is being written" in shown
    handler.record({"action": "B"})
    handler.close()
    assert log.verify().verdict == "valid"


def test_a_file_that_was_changed_stays_and_is_named(log: Log) -> None:
    """It is evidence; the others go."""
    bad, good = log.record(200), log.record(190)
    log.record(80)
    lines = lines_of(bad)
    put(bad, [lines[0], edited(lines[1]), *lines[2:]])

    shown = log.retain("--yes")

    assert f"{bad.name}: it is not what the journal says: line 2 was edited" in shown
    assert bad.exists()
    assert not good.exists()


def test_a_file_that_no_journal_knows_stays(log: Log) -> None:
    """Nobody knows what it is."""
    old = log.record(200)
    log.record(80)
    stray = old.with_name(old.name.replace(old.name[-27:-7], "z" * 20))
    stray.write_bytes(old.read_bytes())

    shown = log.retain("--yes")

    assert f"{stray.name}: the journal does not know it" in shown
    assert stray.exists()


def test_a_link_in_place_of_a_file_stays(log: Log, tmp_path: Path) -> None:
    """Neither followed nor removed."""
    old = log.record(200)
    log.record(80)
    elsewhere = tmp_path / "elsewhere"
    old.rename(elsewhere)
    old.symlink_to(elsewhere)

    assert "it is no regular file" in log.retain("--yes")
    assert old.is_symlink()
    assert elsewhere.exists()


def _change_a_line(log: Log) -> None:
    path = log.directory / "audit-journal.ndjson"
    lines = lines_of(path)
    put(path, [lines[0], lines[1].replace(b'"sequence":', b'"sequence":1'), *lines[2:]])


def _remove_it(log: Log) -> None:
    (log.directory / "audit-journal.ndjson").unlink()


def _forget_the_key(log: Log) -> None:
    log.environ.clear()


def _take_another_key(log: Log) -> None:
    make_key(log.key_file)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_change_a_line, "is not to be relied on"),
        (_remove_it, "there is no journal"),
        (_forget_the_key, "is signed, and no key is configured"),
        (_take_another_key, "nothing in it is signed by the given keys"),
    ],
)
def test_nothing_goes_where_the_journal_cannot_be_relied_on(
    log: Log, change: Callable[[Log], None], told: str
) -> None:
    """An error and a hint, and not a byte is written."""
    log.record(200)
    log.record(80)
    change(log)
    before = contents(log.directory)

    ran = command("retain", log.directory, *KEEP, "--yes", **log.environ)

    assert ran.returncode == 1
    assert told in ran.stderr
    assert "hint: " in ran.stderr
    assert {**contents(log.directory), ".keeping.lock": b""} == {**before, ".keeping.lock": b""}


def test_after_a_change_of_keys_the_earlier_public_key_is_named(log: Log, tmp_path: Path) -> None:
    """With --key it goes on; what is written is signed by the new one."""
    log.record(200)
    log.record(80)
    earlier = tmp_path / "earlier.pub"
    new = make_key(log.key_file).verifier
    earlier.write_text(
        f"{log.keys[0]} until=2100-01-01T00:00:00Z\n{new} since=2020-01-01T00:00:00Z\n"
    )

    log.retain("--key", earlier, "--yes")

    report = verify(log.directory, keys=[*log.keys, new])
    assert report.verdict == "valid", report.findings
    assert [each.signed for each in report.pruned] == [True]


@pytest.mark.parametrize("what", ["retain", "compress", "hold"])
def test_a_key_that_has_signed_nothing_is_named_as_the_reason(
    log: Log, tmp_path: Path, what: str
) -> None:
    """Not what cannot be told without the right one: whether a hold was released."""
    log.record(200)
    log.record(80)
    hold = log.keeping().add_hold("x")
    log.keeping().release_hold(hold.id, "over")
    log.retain("--yes")
    make_key(tmp_path / "other.key")
    words = {"retain": ["retain", log.directory, *KEEP, "--yes"],
             "compress": ["compress", log.directory, "--yes"],
             "hold": ["hold", "add", log.directory, "--reason", "x"]}  # fmt: skip

    ran = command(*words[what], AUDIT_LOG_SIGNING_KEY_FILE=str(tmp_path / "other.key"))

    assert ran.returncode == 1
    assert "is not to be relied on: nothing in it is signed by the given keys" in ran.stderr
    assert "--key names the earlier public key" in ran.stderr


def test_without_keys_a_log_is_retained_and_verification_says_what_that_is_worth(
    audit_dir: Path,
) -> None:
    """Who can write there could have written the tombstone as well."""
    record(audit_dir, 200)
    record(audit_dir, 80)

    done("retain", audit_dir, *KEEP, "--yes")

    report = verify(audit_dir)
    assert report.verdict == "valid"
    assert any("pruned is what the journal says" in said for said in report.not_checked)


def test_another_prefix_is_left_alone(audit_dir: Path) -> None:
    """Each has its own journal."""
    record(audit_dir, 200)
    record(audit_dir, 80)
    other = [record(audit_dir, days, prefix="billing") for days in (200, 80)]

    done("retain", audit_dir, *KEEP, "--yes", "--prefix", "billing")

    assert not other[0].exists()
    assert len(session_files(audit_dir)) == 4  # the record of the run
    assert verify(audit_dir).verdict == "valid"


def test_a_session_whose_end_is_not_signed_stays_until_it_is(log: Log) -> None:
    """Somebody recorded without the key, or wrote it; what the run signs covers it from then on."""
    signed, unsigned = log.record(200), record(log.directory, 190)
    record(log.directory, 80)

    assert f"{unsigned.name}: its end in the journal is not signed yet" in log.retain("--yes")
    assert not signed.exists()
    assert unsigned.exists()
    assert "1 session gone" in log.retain("--yes")


def test_a_file_that_changes_behind_its_copy_stays(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing goes that was not verified as it is."""
    path = log.record(200)
    log.record(80)
    real = copies.copy

    def copy(*arguments: Any) -> None:
        real(*arguments)
        with path.open("ab") as file:
            file.write(b"more\n")

    monkeypatch.setattr(copies, "copy", copy)
    keeping = log.keeping()
    keeping.retain(timedelta(days=90), "--keep 90d", str(tmp_path / "archive"))
    assert [reason for _, reason in keeping.outcome.stayed] == ["it was changed meanwhile"]
    assert path.exists()
    assert not log.verify().pruned


@pytest.mark.parametrize("work", ["archive", "compress"])
def test_a_copy_that_reads_otherwise_than_it_was_written_is_thrown_away(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """The disk has something else than what it took: the original stays."""
    path = log.record(200)
    log.record(80)
    monkeypatch.setattr(copies._durable, "read_anew", lambda file: os.write(file, b"x"))
    keeping, archive = log.keeping(), tmp_path / "archive"
    if work == "archive":
        keeping.retain(timedelta(days=90), "--keep 90d", str(archive))
        assert not list(archive.iterdir())
    else:
        keeping.compress(timedelta(days=90))
    assert len(keeping.outcome.stayed) == 1
    assert path.exists()
    assert not list(log.directory.glob("*.zst"))
    assert not list(log.directory.glob(".*.part"))


# What the journal says of it


@pytest.fixture
def pruned(log: Log) -> dict[str, Any]:
    """What a tombstone of an old session has to say; its file is gone, as if it were pruned."""
    old = log.record(200)
    log.record(80)
    close = next(e for e in journal_events(log.directory) if e["event"] == "Close")
    old.unlink()
    told = {name: close[name] for name in ("file", "session", "sequence", "hash")}
    return {"event": "Prune", **told, "reason": "--keep 90d", "by": "mallory", "to": "removed"}


def _enter(log: Log, *events: dict[str, Any], sign: bool = True) -> None:
    journal = Journal(str(log.directory), "audit")
    if sign:
        journal.append_signed(
            events,
            lambda *tree: log.signer.sign(*tree, with_tree=True, acts=len(events)),
            log.signer.restore,
        )
    else:
        journal.append(*events)


def test_a_file_that_is_gone_without_a_tombstone_is_missing(
    log: Log, pruned: dict[str, Any]
) -> None:
    """As before."""
    assert [(f.kind, f.verdict) for f in log.verify().findings] == [("missing", "tampered")]


def test_a_tombstone_that_is_not_signed_at_once_makes_it_incomplete(
    log: Log, pruned: dict[str, Any]
) -> None:
    """Anybody may have written it; also when a writer's next note covers it, or another run's."""
    _enter(log, pruned, sign=False)
    told = [log.verify()]
    record(log.directory, 1, signer=log.signer)
    told.append(log.verify())
    log.keeping().add_hold("case 4711")
    told.append(log.verify())
    for report in told:
        assert report.verdict == "incomplete"
        assert [f.kind for f in report.findings] == ["unsigned"]
        assert "nothing signs that together with it" in report.findings[0].reason


def test_a_tombstone_that_another_key_signs_makes_it_incomplete(
    log: Log, pruned: dict[str, Any], tmp_path: Path
) -> None:
    """Anybody can make a key; it may also be one that was not given to verify."""
    make_key(tmp_path / "other.key", "example.com/other")
    other = Signer(tmp_path / "other.key")
    Journal(str(log.directory), "audit").append_signed(
        [pruned], lambda *tree: other.sign(*tree, with_tree=False, acts=1), other.restore
    )
    log.record(1)
    report = log.verify()
    assert report.verdict == "incomplete"
    assert [f.kind for f in report.findings] == ["unsigned"]


@pytest.mark.parametrize("signs", ["a hold", "a tombstone", "a checkpoint"])
def test_a_tombstone_just_before_somebody_signs_is_not_vouched_for(
    log: Log, pruned: dict[str, Any], signs: str
) -> None:
    """A note says how many of the lines in front of it are its signer's own."""
    other = log.record(150)
    log.record(75)
    _enter(log, pruned, sign=False)
    if signs == "a hold":
        _enter(log, {"event": "Hold", "id": "x", "reason": "x", "by": "x"})
    elif signs == "a tombstone":
        close = [e for e in journal_events(log.directory) if e["event"] == "Close"][-2]
        told = {name: close[name] for name in ("file", "session", "sequence", "hash")}
        assert told["file"] == other.name
        _enter(log, {**pruned, **told})
        other.unlink()
    else:
        _enter(log)

    report = log.verify()
    assert report.verdict == "incomplete"
    assert [f.kind for f in report.findings] == ["unsigned"]
    assert pruned["file"] in report.findings[0].file


def test_a_tombstone_that_was_added_to_a_real_one_changes_nothing(log: Log) -> None:
    """The one that is signed counts."""
    log.record(200)
    log.record(80)
    log.retain("--yes")
    real = next(e for e in journal_events(log.directory) if e["event"] == "Prune")
    told = {n: real[n] for n in ("event", "file", "session", "sequence", "hash", "to")}
    _enter(log, {**told, "by": "mallory", "reason": "fun"}, sign=False)
    report = log.verify()
    assert report.verdict == "valid"
    assert [each.policy for each in report.pruned] == ["--keep 90d"]


def test_a_log_that_was_retained_before_it_was_signed_is_valid(log: Log) -> None:
    """The first note covers all that was there."""
    record(log.directory, 200)
    record(log.directory, 80)
    done("retain", log.directory, *KEEP, "--yes")
    log.record(1)
    report = log.verify()
    assert report.verdict == "valid", report.findings
    assert [each.signed for each in report.pruned] == [True]


@pytest.mark.parametrize(
    "change",
    [
        {"hash": "0" * 64},
        {"sequence": 2},
        {"file": "audit-20260101-aaaaaaaaaaaaaaaaaaaa.ndjson"},
        {"session": "a" * 20},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_tombstone_of_something_else_is_tampered(
    log: Log, pruned: dict[str, Any], change: dict[str, Any]
) -> None:
    """It must name the end that the journal knows; with a key as well."""
    _enter(log, {**pruned, **change})
    kinds = {finding.kind for finding in log.verify().findings}
    assert kinds == {"prune", "missing"}


@pytest.mark.usefixtures("nobody_looks")
def test_a_tombstone_of_a_session_without_an_end_is_tampered(log: Log) -> None:
    """Such a session never goes."""
    path = _killed(log)
    log.record(80)
    opened = next(e for e in journal_events(log.directory) if e["event"] == "Open")
    path.unlink()
    _enter(log, {"event": "Prune", "reason": "--keep 90d", "by": "x", "to": "removed",
                 **{n: opened[n] for n in ("file", "session", "sequence", "hash")}})  # fmt: skip
    assert "prune" in {finding.kind for finding in log.verify().findings}


def test_a_tombstone_without_its_fields_is_no_line_of_a_journal(
    log: Log, pruned: dict[str, Any]
) -> None:
    """Nor is one with others in them."""
    del pruned["hash"]
    _enter(log, pruned)
    assert log.verify().verdict == "tampered"


def test_a_file_with_a_tombstone_that_is_still_there_is_checked_and_mentioned(
    log: Log, pruned: dict[str, Any], tmp_path: Path
) -> None:
    """A crash leaves one; so does somebody who brings it back from the archive. The next run takes
    it again."""
    old = log.record(150)
    close = [e for e in journal_events(log.directory) if e["event"] == "Close"][-1]
    told = {name: close[name] for name in ("file", "session", "sequence", "hash")}
    _enter(log, pruned, {**pruned, **told})
    log.record(70)

    report = log.verify()
    assert report.verdict == "valid", report.findings
    assert [each.there for each in report.pruned if each.file == str(old)] == [True]
    assert "1 session gone" in log.retain("--yes")
    assert not old.exists()
    assert log.verify().verdict == "valid"


# Others at work


def test_a_second_run_is_told_who_is_at_work(log: Log) -> None:
    """Nothing is done twice at once; a dry run looks all the same."""
    log.record(200)
    log.record(80)
    keeping = log.keeping()
    with keeping.at_work():
        for words in (["retain", log.directory, *KEEP, "--yes"],
                      ["compress", log.directory, "--yes"],
                      ["hold", "add", log.directory, "--reason", "x"]):  # fmt: skip
            ran = command(*words, **log.environ)
            assert ran.returncode == 1
            assert ran.stderr.startswith(f"error: process {os.getpid()} on ")
            assert "is at work in" in ran.stderr
        assert "1 session would go" in log.retain()
    assert "1 session gone" in log.retain("--yes")


def test_those_that_record_meanwhile_are_not_disturbed(
    log: Log, tmp_path: Path, make_handler: Callable[..., AuditHandler]
) -> None:
    """Some record, one retains, one compresses, one verifies again and again: all is well."""
    for days in range(160, 100, -1):
        log.record(days)
    stop, errors, verdicts = threading.Event(), [], set()

    def write() -> None:
        handler = make_handler(FileSink(log.directory, signer=log.signer))
        while not stop.is_set():
            try:
                handler.record({"action": "Busy"})
                handler.close()
            except Exception as error:
                errors.append(error)

    def watch() -> None:
        while not stop.is_set():
            report = log.verify()
            verdicts.add((report.verdict, report.findings))

    threads = [threading.Thread(target=work) for work in (write, write, watch)]
    for thread in threads:
        thread.start()
    try:
        keeping = log.keeping()
        keeping.compress(timedelta(days=140))
        keeping.retain(timedelta(days=120, hours=12), "--keep 2892h", str(tmp_path / "archive"))
        keeping.compress(timedelta(days=90))
    finally:
        stop.set()
        for thread in threads:
            thread.join(HANG)
    assert not errors
    assert {each[0] for each in verdicts} == {"valid"}, verdicts
    report = log.verify()
    assert report.verdict == "valid"
    assert len(report.pruned) == 40
    assert len(list((tmp_path / "archive").iterdir())) == 40


@pytest.mark.parametrize("how", ["pruned", "compressed"])
def test_a_file_that_goes_while_it_is_verified_is_not_missing(
    log: Log, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It was listed, and is gone when it is to be read: the journal, or a copy, tells where to."""
    log.record(200)
    log.record(80)
    module = importlib.import_module("structlog_audit.verify")
    real = module.scan_all

    def scan_all(*arguments: Any) -> Any:
        monkeypatch.setattr(module, "scan_all", real)
        if how == "pruned":
            log.keeping().retain(timedelta(days=90), "--keep 90d", None)
        else:
            log.keeping().compress(timedelta(days=90))
        return real(*arguments)

    monkeypatch.setattr(module, "scan_all", scan_all)
    report = log.verify()
    assert report.verdict == "valid", report.findings
    assert [each.there for each in report.pruned] == ([False] if how == "pruned" else [])


def test_what_a_forwarder_has_not_shipped_stays(log: Log) -> None:
    """Where its cursors are, they must be at the end; afterwards it goes."""
    old = log.record(200)
    log.record(80)
    (log.directory / ".forward").mkdir(mode=0o700)

    assert "the forwarder has not shipped all of it" in log.retain("--yes")
    assert old.exists()
    assert "the forwarder" in done("compress", log.directory, "--yes", **log.environ)

    sink = MemorySink()
    Forwarder(log.directory, sink).run_once()
    assert "1 session gone" in log.retain("--yes")
    assert sum(b"InvoiceDelete" in line for line in sink.lines) == 4


def test_when_the_run_cannot_be_recorded_nothing_goes(log: Log) -> None:
    """The disk takes no more bytes: an error, and every file is there."""
    for days in (200, 190, 80):
        log.record(days)
    before = contents(log.directory)
    script = """
        import resource, sys, datetime
        from structlog_audit import Settings
        from structlog_audit.keeping import Keeping
        keeping = Keeping(sys.argv[1], Settings(signing_key_file=sys.argv[2]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
        keeping.retain(datetime.timedelta(days=90), "--keep 90d", None)
    """
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in script.splitlines()),
         str(log.directory), str(log.key_file)],
        env=environment(), capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert "AuditWriteError" in ran.stderr, ran.stderr
    assert {**contents(log.directory), ".keeping.lock": b""} == {**before, ".keeping.lock": b""}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_another_user_is_told_whom_the_directory_belongs_to(log: Log) -> None:
    """What root would write there, the service could not read."""
    log.record(200)
    log.record(80)
    os.chown(log.directory, 65534, 65534)
    ran = command("retain", log.directory, *KEEP, "--yes", **log.environ)
    assert ran.returncode == 1
    assert "belongs to user 65534" in ran.stderr


@pytest.mark.parametrize("words", [["--keep", "5y"], ["--keep", "0d"], []])
def test_a_wrong_use_is_refused_without_a_traceback(log: Log, words: list[str]) -> None:
    """With a status that is not 0."""
    log.record(200)
    ran = command("retain", log.directory, *words, **log.environ)
    assert ran.returncode != 0
    assert "Traceback" not in ran.stderr


def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    """Nor anything in it."""
    away = tmp_path / "x"
    for words in (
        ["retain", away, *KEEP, "--yes"],
        ["compress", away, "--yes"],
        ["hold", "add", away, "--reason", "y"],
        ["hold", "list", away],
    ):
        ran = command(*words)
        assert ran.returncode == 1
        assert ran.stderr.startswith("error: there is no directory")
    assert not away.exists()
