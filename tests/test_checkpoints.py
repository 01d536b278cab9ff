"""Checkpoints: what is signed, when, by whom, and what happens when it cannot be."""

from __future__ import annotations

import logging
import pickle
import threading
from base64 import b64decode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson
import pytest
from reading import read_session, session_files
from running import HANG, eventually, run_python, run_well
from signing import make_key

from structlog_audit import (
    AuditConfigurationError,
    AuditHandler,
    AuditWriteError,
    FileSink,
    Settings,
    Signer,
)
from structlog_audit.merkle import Frontier, leaf_hash
from structlog_audit.note import Checkpoint, SigningKey, open_note
from structlog_audit.session_tree import SessionTree
from structlog_audit.testing import FailingSink, MemorySink


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    """A key, and its file `audit.key`."""
    return make_key(tmp_path / "audit.key")


def signing(directory: Path, tmp_path: Path, **options: Any) -> AuditHandler:
    signer = Signer(tmp_path / "audit.key", **{"interval": 3600, **options})
    return AuditHandler(FileSink(directory, signer=signer))


def journal(directory: Path) -> list[bytes]:
    return (directory / "audit-journal.ndjson").read_bytes().split(b"\n")[:-1]


def events(directory: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in journal(directory)]


def root_of(lines: list[bytes]) -> bytes:
    tree = Frontier()
    for line in lines:
        tree.append(leaf_hash(line))
    return tree.root()


def check(directory: Path, *keys: SigningKey) -> int:
    """Check every note and root of a directory; return how many notes there are."""
    lines, sessions, notes = journal(directory), {}, 0
    for path in session_files(directory):
        sessions[path.name[-27:-7]] = path.read_bytes().split(b"\n")[:-1]
    for number, event in enumerate(map(orjson.loads, lines), 1):
        assert event["number"] == number
        if "root" in event:
            of_session = sessions[event["session"]][: event["sequence"]]
            assert b64decode(event["root"]) == root_of(of_session)
        if event["event"] == "Checkpoint":
            text, signed_by = open_note(event["note"], [key.verifier for key in keys])
            assert signed_by == tuple(key.verifier for key in keys)
            origin = f"{keys[0].name}/{sha256(lines[0]).hexdigest()[:16]}"
            checkpoint = Checkpoint.parse(text)
            assert checkpoint == Checkpoint(
                origin, number - 1, root_of(lines[: number - 1]), checkpoint.acts
            )
            told = [orjson.loads(line) for line in lines[: number - 1][-checkpoint.acts :]]
            assert {each["pid"] for each in told} == {event["pid"]}
            assert all("root" in each for each in told)
            notes += 1
    return notes


def test_a_sessions_end_is_signed(audit_dir: Path, tmp_path: Path, key: SigningKey) -> None:
    """The note covers all lines of the journal before it, and with them the session's."""
    handler = signing(audit_dir, tmp_path)
    handler.record({"action": "A"})
    handler.close()

    *_, close, checkpoint = events(audit_dir)
    assert (close["event"], checkpoint["event"]) == ("Close", "Checkpoint")
    assert close["sequence"] == 3
    assert "root" in close
    assert check(audit_dir, key) >= 1


def test_checkpoints_come_after_so_many_entries(
    audit_dir: Path, tmp_path: Path, key: SigningKey
) -> None:
    """Without waiting for the interval or the session's end."""
    handler = signing(audit_dir, tmp_path, entries=10)
    for _ in range(25):  # the first checkpoint may come anywhere among them
        handler.record({"action": "A"})

    eventually(lambda: any(e.get("sequence", 0) >= 10 for e in events(audit_dir)))
    handler.close()
    check(audit_dir, key)


def test_checkpoints_come_also_when_nothing_happens(
    audit_dir: Path, tmp_path: Path, key: SigningKey
) -> None:
    """An interval without entries is signed as such."""
    handler = signing(audit_dir, tmp_path, interval=0.02)
    handler.record({"action": "A"})

    eventually(lambda: sum(e.get("sequence") == 2 for e in events(audit_dir)) >= 4)
    handler.close()
    assert check(audit_dir, key) >= 4


def test_several_processes_sign_one_journal(
    audit_dir: Path, tmp_path: Path, key: SigningKey
) -> None:
    """Each goes on from the tree of the one before, and every note holds."""
    script = f"""
        import sys, threading
        from structlog_audit import AuditHandler, FileSink, Signer
        signer = Signer({str(tmp_path / "audit.key")!r}, entries=3, interval=0.01)
        for _ in range(5):
            handler = AuditHandler(FileSink({str(audit_dir)!r}, signer=signer))
            for number in range(20):
                handler.record({{"action": "A", "n": number}})
            handler.close()
    """
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run_well(script), range(4)))

    assert len(session_files(audit_dir)) == 20
    assert check(audit_dir, key) >= 20


def test_a_tree_that_we_did_not_sign_is_not_gone_on_from(
    audit_dir: Path, tmp_path: Path, key: SigningKey
) -> None:
    """Whoever may write the journal could have us sign another past."""
    handler = signing(audit_dir, tmp_path)
    handler.record({"action": "A"})
    handler.close()
    path = audit_dir / "audit-journal.ndjson"
    *before, last, end = path.read_bytes().split(b"\n")
    event = orjson.loads(last)
    event["tree"] = ["A" * 43 + "=" for _ in range((event["number"] - 1).bit_count())]
    path.write_bytes(b"\n".join([*before, orjson.dumps(event), end]))

    handler = signing(audit_dir, tmp_path)
    handler.record({"action": "A"})
    handler.close()

    check(audit_dir, key)


def test_an_older_tree_of_ours_in_a_later_line_is_not_gone_on_from(
    audit_dir: Path, tmp_path: Path, key: SigningKey
) -> None:
    """It is signed, but it is not that of the lines before it."""
    for _ in range(2):
        handler = signing(audit_dir, tmp_path)
        handler.record({"action": "A"})
        handler.close()
    path = audit_dir / "audit-journal.ndjson"
    lines = path.read_bytes().split(b"\n")
    old, new = (orjson.loads(line) for line in lines if b'"tree"' in line)
    at = new["number"] - 1
    lines[at] = orjson.dumps({**new, "note": old["note"], "tree": old["tree"]})
    path.write_bytes(b"\n".join(lines))

    handler = signing(audit_dir, tmp_path)
    handler.record({"action": "A"})
    handler.close()

    *_, checkpoint = events(audit_dir)
    text, _ = open_note(checkpoint["note"], [key.verifier])
    before = journal(audit_dir)[: checkpoint["number"] - 1]
    assert Checkpoint.parse(text).root == root_of(before)


def test_the_last_line_must_be_the_one_that_was_acknowledged(audit_dir: Path) -> None:
    """Nothing follows it yet that would tell."""
    handler = AuditHandler(FileSink(audit_dir))
    receipt = handler.record({"action": "A", "amount": 1000})
    (path,) = session_files(audit_dir)

    assert SessionTree(str(path)).covers(2, receipt.hash, gently=True)
    path.write_bytes(path.read_bytes().replace(b'"amount":1000', b'"amount":9000'))
    assert not SessionTree(str(path)).covers(2, receipt.hash, gently=True)
    path.write_bytes(path.read_bytes().replace(b'"amount":9000', b'"amount":1000'))
    handler.close()


def test_the_tree_of_another_journal_is_not_gone_on_from(
    audit_dir: Path, tmp_path: Path, key: SigningKey
) -> None:
    """It is signed by us, and has the right size."""
    for directory in (audit_dir, tmp_path / "other"):
        handler = signing(directory, tmp_path)
        handler.record({"action": "A"})
        handler.close()
    *mine, last, end = (audit_dir / "audit-journal.ndjson").read_bytes().split(b"\n")
    other = next(e for e in reversed(events(tmp_path / "other")) if "tree" in e)
    place = next(n for n, line in enumerate([*mine, last]) if b'"tree"' in line)
    lines = [*mine, last, end]
    event = orjson.loads(lines[place])
    assert other["number"] == event["number"]
    lines[place] = orjson.dumps({**event, "note": other["note"], "tree": other["tree"]})
    (audit_dir / "audit-journal.ndjson").write_bytes(b"\n".join(lines))

    handler = signing(audit_dir, tmp_path)
    handler.record({"action": "A"})
    handler.close()

    *_, checkpoint = events(audit_dir)
    text, _ = open_note(checkpoint["note"], [key.verifier])
    assert Checkpoint.parse(text).root == root_of(journal(audit_dir)[: checkpoint["number"] - 1])


@pytest.mark.parametrize("cut", [False, True])
def test_a_tree_is_found_or_made_anew(
    audit_dir: Path, tmp_path: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    """A new process looks for it near the end, and reads everything when there is none."""
    if cut:
        monkeypatch.setattr("structlog_audit.journal.WINDOW", 2_000)
    for _ in range(5):
        signer = Signer(tmp_path / "audit.key", interval=3600)
        handler = AuditHandler(FileSink(audit_dir, signer=signer), max_bytes=1_000)
        for _ in range(30):
            handler.record({"action": "A"})
        handler.close()

    assert check(audit_dir, key) >= 5


def test_during_a_rotation_both_keys_sign(audit_dir: Path, tmp_path: Path) -> None:
    """Who knows one of them can verify."""
    old = SigningKey.generate("example.com/audit")
    keys = [old, make_key(tmp_path / "audit.key", "example.com/audit", old)]

    handler = signing(audit_dir, tmp_path)
    handler.record({"action": "A"})
    handler.close()

    assert check(audit_dir, *keys) >= 1
    assert open_note(events(audit_dir)[-1]["note"], [keys[1].verifier])


def test_a_file_that_was_changed_underneath_is_not_signed_as_recorded(
    audit_dir: Path, tmp_path: Path, key: SigningKey, caplog: pytest.LogCaptureFixture
) -> None:
    """What was acknowledged is signed, by its hash; the changed lines are not, and it is said."""
    handler = signing(audit_dir, tmp_path)
    handler.record({"action": "A", "amount": 1000})
    (path,) = session_files(audit_dir)
    eventually(lambda: "Checkpoint" in [e["event"] for e in events(audit_dir)])
    handler.record({"action": "B", "amount": 1000})
    with path.open("r+b") as file:
        content = file.read().replace(b'"amount":1000', b'"amount":9000')
        file.seek(0)
        file.write(content)
    with caplog.at_level(logging.ERROR, "structlog_audit"):
        handler.close()

    close = next(e for e in events(audit_dir) if e["event"] == "Close")
    assert "root" not in close
    assert "was changed: its line 4 " in caplog.text


def test_a_forked_child_signs_its_own_session(
    audit_dir: Path, tmp_path: Path, key: SigningKey
) -> None:
    """It has no thread of its parent's, and starts one."""
    run_well(f"""
        import os, time
        from structlog_audit import AuditHandler, FileSink, Signer
        signer = Signer({str(tmp_path / "audit.key")!r}, entries=5, interval=3600)
        handler = AuditHandler(FileSink({str(audit_dir)!r}, signer=signer))
        handler.record({{"action": "A"}})
        child = os.fork()
        for _ in range(20):
            handler.record({{"action": "A"}})
        handler.close()
        if child:
            assert os.waitpid(child, 0)[1] == 0
    """)

    ends = [e for e in events(audit_dir) if e["event"] == "Close"]
    assert [end["sequence"] for end in ends] in ([22, 23], [23, 22])
    assert all("root" in end for end in ends)
    check(audit_dir, key)


def test_checkpoints_are_anchored(audit_dir: Path, tmp_path: Path, key: SigningKey) -> None:
    """The last one as well: closing waits for it."""
    sink = MemorySink()
    handler = signing(audit_dir, tmp_path, anchor=AuditHandler(sink))
    handler.record({"action": "A"})
    handler.close()

    anchored = [e["data"]["note"] for e in sink.entries if e["action"] == "AuditCheckpoint"]
    assert anchored[-1] == events(audit_dir)[-1]["note"]


def test_an_anchor_that_is_away_aborts_nobody(
    audit_dir: Path,
    tmp_path: Path,
    key: SigningKey,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is said, and the newest checkpoint is sent when it is back."""
    monkeypatch.setattr("structlog_audit.anchoring.RETRY", 0.02)
    monkeypatch.setattr("structlog_audit.anchoring.PATIENCE", 0.2)
    away = True
    sink = FailingSink(lambda number: away)
    anchor = AuditHandler(sink)
    handler = signing(audit_dir, tmp_path, anchor=anchor)
    with caplog.at_level(logging.WARNING, "structlog_audit"):
        handler.record({"action": "A"})
        handler.close()
        eventually(lambda: "anchoring" in caplog.text)
        away = False
        monkeypatch.setattr("structlog_audit.anchoring.PATIENCE", HANG)
        handler.record({"action": "A"})
        handler.close()

    assert "works again" in caplog.text
    assert check(audit_dir, key) >= 1


def test_a_journal_that_cannot_be_signed_is_said_and_aborts_nobody(
    audit_dir: Path, tmp_path: Path, key: SigningKey, caplog: pytest.LogCaptureFixture
) -> None:
    """A directory in the journal's place, from the middle of a session on."""
    handler = signing(audit_dir, tmp_path, entries=2)
    handler.record({"action": "A"})
    path = audit_dir / "audit-journal.ndjson"
    eventually(lambda: "Checkpoint" in [e["event"] for e in events(audit_dir)])
    path.rename(tmp_path / "gone")
    path.mkdir()
    with caplog.at_level(logging.ERROR, "structlog_audit"):
        for _ in range(5):
            handler.record({"action": "A"})
        eventually(lambda: "signing" in caplog.text)
    path.rmdir()
    (tmp_path / "gone").rename(path)
    handler.record({"action": "A"})
    handler.close()

    check(audit_dir, key)


def test_the_key_is_never_shown_nor_pickled(tmp_path: Path, key: SigningKey) -> None:
    """A signer is pickled by the name of its key file."""
    signer = Signer(tmp_path / "audit.key")
    secret = key.reveal().split("+", 4)[4]

    assert secret not in repr(signer)
    pickled = pickle.dumps(FileSink(tmp_path, signer=signer))
    assert secret.encode() not in pickled
    assert b64decode(secret) not in pickled
    assert pickle.loads(pickled).signer.keys[0].verifier == key.verifier
    with pytest.raises(TypeError, match="key file"):
        pickle.dumps(Signer.from_text(key.reveal()))


def test_a_traceback_that_shows_variables_does_not_show_the_key(key: SigningKey) -> None:
    """Whatever was wrong beside it."""
    secret = key.reveal().split("+", 4)[4]
    for text, options in ((key.reveal() + "\njunk", {}), (key.reveal(), {"entries": 0})):
        with pytest.raises(AuditConfigurationError) as caught:
            Signer.from_text(text, **options)
        trace, ours = caught.value.__traceback__, []
        while trace is not None:
            if "structlog_audit" in trace.tb_frame.f_code.co_filename:
                ours.append(repr(trace.tb_frame.f_locals))
            trace = trace.tb_next
        assert secret not in "".join(ours)


def test_an_anchor_that_hangs_does_not_stop_the_signing(
    audit_dir: Path,
    tmp_path: Path,
    key: SigningKey,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is said, and closing waits for so long only."""
    monkeypatch.setattr("structlog_audit.anchoring.PATIENCE", 0.1)
    over = threading.Event()

    class Hanging(MemorySink):
        def write(self, lines: Sequence[bytes]) -> None:
            over.wait(HANG)
            super().write(lines)

    anchor = AuditHandler(Hanging(), timeout=HANG)
    handler = signing(audit_dir, tmp_path, interval=0.02, anchor=anchor)
    with caplog.at_level(logging.ERROR, "structlog_audit"):
        handler.record({"action": "A"})
        eventually(lambda: sum(e["event"] == "Checkpoint" for e in events(audit_dir)) > 5)
        eventually(lambda: "has been under way" in caplog.text)
        handler.close()
    monkeypatch.setattr("structlog_audit.anchoring.PATIENCE", HANG)
    over.set()
    handler.close()


def test_an_end_that_was_owed_is_signed(audit_dir: Path, tmp_path: Path, key: SigningKey) -> None:
    """An unsigned one could be anybody's."""
    handler = signing(audit_dir, tmp_path)
    handler.record({"action": "A"})
    eventually(lambda: "Checkpoint" in [e["event"] for e in events(audit_dir)])
    path = audit_dir / "audit-journal.ndjson"
    path.rename(tmp_path / "gone")
    path.mkdir()
    (session,) = session_files(audit_dir)
    session.rename(tmp_path / "moved")
    with pytest.raises(AuditWriteError):
        handler.record({"action": "B"})
    path.rmdir()
    (tmp_path / "gone").rename(path)
    handler.record({"action": "C"})

    told = [event["event"] for event in events(audit_dir)]
    at = told.index("Break")
    assert told[at + 1] == "Checkpoint"
    assert "Open" in told[at + 2 :]
    handler.close()


def environ(tmp_path: Path, **more: str) -> dict[str, str]:
    return {
        "AUDIT_LOG_DIR": str(tmp_path / "audit"),
        "AUDIT_LOG_SIGNING_KEY_FILE": str(tmp_path / "audit.key"),
        **more,
    }


def test_the_environment_names_key_and_anchor(tmp_path: Path, key: SigningKey) -> None:
    """A file or the key itself; the anchor in a directory of its own."""
    settings = Settings.from_environ(environ(tmp_path, AUDIT_LOG_ANCHOR=str(tmp_path / "mail")))
    handler = settings.handler()
    handler.record({"action": "A"})
    handler.close()

    assert check(tmp_path / "audit", key) >= 1
    (anchored,) = session_files(tmp_path / "mail")
    assert read_session(anchored)[1]["action"] == "AuditCheckpoint"

    given = {"AUDIT_LOG_DIR": str(tmp_path / "b"), "AUDIT_LOG_SIGNING_KEY": key.reveal()}
    signer = Settings.from_environ(given).signer()
    assert signer is not None
    assert signer.keys[0].verifier == key.verifier
    assert key.reveal() not in repr(Settings.from_environ(given))


@pytest.mark.parametrize(
    "more",
    [
        {"AUDIT_LOG_SIGNING_KEY": "x"},
        {"AUDIT_LOG_ANCHOR": "server"},
        {"AUDIT_LOG_SIGNING_KEY_FILE": "/nowhere/key"},
        {"AUDIT_LOG_DIR": "/dev/stdout"},
        {"AUDIT_LOG_CHECKPOINT_ENTRIES": "0"},
        {"AUDIT_LOG_CHECKPOINT_INTERVAL": "soon"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_cannot_sign_is_refused_at_start(
    tmp_path: Path, key: SigningKey, more: dict[str, str]
) -> None:
    """Not at the first checkpoint."""
    with pytest.raises(AuditConfigurationError):
        Settings.from_environ(environ(tmp_path, **more)).handler()


def test_an_anchor_that_cannot_be_opened_is_refused_at_start(
    tmp_path: Path, key: SigningKey
) -> None:
    """A file in the place of the directory."""
    (tmp_path / "mail").write_text("")
    given = environ(tmp_path, AUDIT_LOG_ANCHOR=str(tmp_path / "mail"))

    with pytest.raises(AuditConfigurationError, match="the anchor for checkpoints"):
        Settings.from_environ(given).handler()


def test_doctor_tells_who_signs_and_leaves_no_trace(tmp_path: Path, key: SigningKey) -> None:
    """Its public key, and the anchor; neither directory is there afterwards."""
    done = run_python(
        "from structlog_audit.__main__ import main; import sys; sys.argv[1:] = ['doctor']; main()",
        **environ(tmp_path, AUDIT_LOG_ANCHOR=str(tmp_path / "mail")),
    )

    assert done.returncode == 0, done.stderr
    assert str(key.verifier) in done.stdout
    assert f"anchored at FileSink('{tmp_path / 'mail'}')" in done.stdout
    assert sorted(item.name for item in tmp_path.iterdir()) == ["audit.key"]


def test_an_anchor_without_a_key_is_refused(tmp_path: Path) -> None:
    """It would anchor nothing."""
    given = {"AUDIT_LOG_DIR": str(tmp_path), "AUDIT_LOG_ANCHOR": "/dev/stdout"}

    with pytest.raises(AuditConfigurationError, match="no key"):
        Settings.from_environ(given).handler()


def test_a_damaged_key_in_the_environment_is_not_printed(tmp_path: Path) -> None:
    """The message says what is wrong, and nothing of the key."""
    given = {"AUDIT_LOG_DIR": str(tmp_path), "AUDIT_LOG_SIGNING_KEY": "PRIVATE+KEY+secret"}

    with pytest.raises(AuditConfigurationError) as caught:
        Settings.from_environ(given).handler()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"entries": 0}, {"entries": 1.5}, {"interval": 0}, {"interval": float("nan")}]
)
def test_unusable_numbers_are_refused(
    tmp_path: Path, key: SigningKey, options: dict[str, Any]
) -> None:
    """At construction."""
    with pytest.raises(AuditConfigurationError):
        Signer(tmp_path / "audit.key", **options)
