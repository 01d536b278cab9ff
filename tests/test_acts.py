"""Acts on a log are entries of it, written as the service writes there, or they are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
from aging import command, contents, done, record
from faults.runner import needs
from reading import recorded
from running import HANG, environment
from servers.processes import SeqServer
from signing import make_key

from structlog_audit import Signer
from structlog_audit.verify import verify

pytest.importorskip("click", reason="the command line is an extra")
root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives files away, and mounts"
)
TODAY = str(datetime.now(timezone.utc).date())
SOMEBODY = 65_534
READERS = "if this is a copy, do it where the log is written: search, show, report and verify"


class Act:
    """What is done to a log, in words of the command line."""

    def __init__(self, place: Path) -> None:
        self.log = place / "audit"
        self.archive = place / "x.zip"
        self.words: dict[str, list[object]] = {
            "export": ["export", self.log, "--from", TODAY, "--to", TODAY,
                       "--output", self.archive],
            "hold": ["hold", "add", self.log, "--reason", "case 4711"],
            "retain": ["retain", self.log, "--keep", "1d", "--yes"],
        }  # fmt: skip

    def refused(self, what: str, **environ: str) -> str:
        """Act, and see that it is refused, with nothing done and not a byte written."""
        before = contents(self.log)
        ran = command(*self.words[what], **environ)
        assert ran.returncode == 1
        assert ran.stderr.startswith("error: ")
        assert "\nhint: " in ran.stderr
        assert not self.archive.exists()
        after = contents(self.log)
        if what != "export":  # it needs no lock
            after.pop(".keeping.lock", None)
        assert after == before
        return ran.stderr


@pytest.fixture
def act(tmp_path: Path) -> Act:
    """On a log of two sessions, which nobody signs."""
    act = Act(tmp_path)
    record(act.log, 200)
    record(act.log, 80)
    return act


ACTS = pytest.mark.parametrize("what", ["export", "hold", "retain"])


@root
@ACTS
@pytest.mark.parametrize("of", ["the directory", "the journal"])
def test_another_user_is_told_who_writes_there(act: Act, what: str, of: str) -> None:
    """What root would write there, the service could not read, or not append to."""
    given = act.log if of == "the directory" else act.log / "audit-journal.ndjson"
    os.chown(given, SOMEBODY, SOMEBODY)

    said = act.refused(what)

    assert f"error: {given} belongs to user {SOMEBODY}, and we are user 0\n" in said
    assert f"sudo -u '#{SOMEBODY}' structlog-audit" in said
    assert READERS in said


@ACTS
def test_a_signed_log_takes_no_act_without_a_key(tmp_path: Path, what: str) -> None:
    """Its entry would not be signed, and the log incomplete ever after."""
    act, file = Act(tmp_path), tmp_path / "audit.key"
    key = make_key(file).verifier
    record(act.log, 200, signer=Signer(file))
    record(act.log, 80, signer=Signer(file))

    said = act.refused(what)

    assert "audit-journal.ndjson is signed, and no key is configured" in said
    assert "set AUDIT_LOG_SIGNING_KEY_FILE as the service has it" in said
    assert READERS in said
    done(*act.words[what], AUDIT_LOG_SIGNING_KEY_FILE=str(file))
    assert verify(act.log, keys=[key]).verdict == "valid"


def test_a_log_that_another_key_signs_is_not_exported_without_that_one(tmp_path: Path) -> None:
    """After a change of keys, the earlier one is named."""
    act, file, other = Act(tmp_path), tmp_path / "audit.key", tmp_path / "new.key"
    earlier = tmp_path / "earlier.pub"
    earlier.write_text(str(make_key(file).verifier))
    record(act.log, 200, signer=Signer(file))
    make_key(other)

    said = act.refused("export", AUDIT_LOG_SIGNING_KEY_FILE=str(other))

    assert "is signed, and not by the key that is configured" in said
    assert "--key names the earlier public key" in said
    done(*act.words["export"], "--key", earlier, AUDIT_LOG_SIGNING_KEY_FILE=str(other))


@ACTS
def test_a_log_without_a_signature_is_not_signed_by_an_act(
    act: Act, tmp_path: Path, what: str
) -> None:
    """Its first signature vouches for all that stands there, and signatures can be removed."""
    file = tmp_path / "audit.key"
    make_key(file)

    act.refused(what, AUDIT_LOG_SIGNING_KEY_FILE=str(file))

    record(act.log, 0, signer=Signer(file))  # the service does so
    done(*act.words[what], AUDIT_LOG_SIGNING_KEY_FILE=str(file))


def test_a_journal_that_cannot_be_read_is_not_written_to(act: Act) -> None:
    """Nobody knows whether it is signed."""
    journal = act.log / "audit-journal.ndjson"
    newer = journal.read_bytes().replace(b'"format":1', b'"format":9', 1)
    assert newer != journal.read_bytes()
    journal.write_bytes(newer)

    assert "cannot be read, so nobody knows whether it is signed" in act.refused("export")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
@ACTS
def test_a_directory_that_is_open_to_all_is_refused_unless_the_host_accepts_it(
    act: Act, what: str
) -> None:
    """As the service itself would."""
    act.log.chmod(0o777)

    said = act.refused(what)

    assert f"the directory {act.log} can be written to by anybody" in said
    assert "hint: chmod o-w, or AUDIT_LOG_ALLOW_UNSAFE_DIR=1 accepts it\n" in said
    done(*act.words[what], AUDIT_LOG_ALLOW_UNSAFE_DIR="1")


@root
@pytest.mark.fault
def test_a_copy_that_cannot_be_written_is_not_exported(act: Act) -> None:
    """Evidence that was mounted: it can be read, and the reason and the way out are said."""
    needs("unshare")
    mount = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; exec "$@"'
    python = [sys.executable, "-m", "structlog_audit", *map(str, act.words["export"])]

    ran = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", mount, "sh", str(act.log), *python],
        env=environment(), capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip

    assert ran.returncode == 1
    assert "error: this has to be an entry of the log, and cannot create a file in" in ran.stderr
    assert "[EROFS] Read-only file system" in ran.stderr
    assert READERS in ran.stderr
    assert not act.archive.exists()


ACTIONS = {"export": "AuditExport", "hold": "AuditHoldAdd", "retain": "AuditRetain"}


@ACTS
def test_the_entry_goes_where_the_service_records(act: Act, tmp_path: Path, what: str) -> None:
    """To its server as well, if the environment names this log."""
    with SeqServer(tmp_path) as seq:
        done(*act.words[what], AUDIT_SERVER_URL=seq.url, AUDIT_LOG_DIR=str(act.log))
        assert ACTIONS[what] in str(seq.stored())
    assert [entry["action"] for entry in recorded(act.log)][-1] == ACTIONS[what]


@ACTS
def test_the_entry_goes_to_no_server_of_another_log(act: Act, tmp_path: Path, what: str) -> None:
    """Another directory, or other file names: it stays in the directory."""
    with SeqServer(tmp_path) as seq:
        done(*act.words[what], "--prefix", "audit", AUDIT_SERVER_URL=seq.url,
             AUDIT_LOG_DIR=str(act.log), AUDIT_LOG_PREFIX="billing")  # fmt: skip
        assert seq.stored() == []
    assert ACTIONS[what] in {entry["action"] for entry in recorded(act.log)}


@ACTS
def test_while_the_server_of_the_log_is_away_nothing_is_done(act: Act, what: str) -> None:
    """As no entry of the service's is recorded then, either."""
    away = {"AUDIT_SERVER_URL": "http://127.0.0.1:1", "AUDIT_LOG_DIR": str(act.log)}

    assert "cannot be reached: Connection refused" in act.refused(what, **away)


def test_the_file_names_of_an_export_are_those_of_the_host(tmp_path: Path) -> None:
    """Without --prefix, AUDIT_LOG_PREFIX says how they begin, as for all other acts."""
    act = Act(tmp_path)
    record(act.log, 80, prefix="billing")

    done(*act.words["export"], AUDIT_LOG_PREFIX="billing")

    assert (act.log / "billing-journal.ndjson").exists()
    assert not (act.log / "audit-journal.ndjson").exists()


def test_who_exports_is_told_by_the_system(act: Act) -> None:
    """Whatever the environment says."""
    done(*act.words["export"], USER="mallory", LOGNAME="mallory")

    assert "mallory" not in str(recorded(act.log))
