"""Files and directories that somebody else changes, or that are not safe to begin with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from reading import only_file, read_session, recorded, session_files
from running import run_well

from structlog_audit import (
    AuditConfigurationError,
    AuditHandler,
    AuditWriteError,
    FileSink,
)

MakeHandler = Callable[..., AuditHandler]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes and links")


def deleted(path: Path) -> None:
    path.unlink()


def renamed(path: Path) -> None:
    path.rename(path.with_suffix(".old"))


def replaced(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def replaced_by_a_link(path: Path) -> None:
    path.rename(path.with_suffix(".old"))
    path.symlink_to(path.with_suffix(".old"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def appended_to(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"{}\n")


def directory_renamed(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def directory_removed(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize(
    ("meddle", "ended"),
    [(deleted, "deleted or moved"), (renamed, "deleted or moved"),
     (replaced, "replaced"), (replaced_by_a_link, "replaced"),
     (cut, "cut or written by somebody else"), (emptied, "cut or written by somebody else"),
     (appended_to, "cut or written by somebody else"),
     (directory_renamed, "deleted or moved"), (directory_removed, "deleted or moved")],
)  # fmt: skip
def test_whatever_happens_to_the_file_the_next_entry_stands_in_a_whole_one(
    meddle: Callable[[Path], None], ended: str, handler: AuditHandler, audit_dir: Path
) -> None:
    """Noticed before the next acknowledgement; the new session says what happened to the old."""
    first = handler.record({"action": "A"})
    path = only_file(audit_dir)
    meddle(path)
    left = path.read_bytes() if path.exists() else None

    second = handler.record({"action": "B"})

    assert second.session != first.session
    (new,) = audit_dir.glob(f"*{second.session}*")
    begin, entry = read_session(new)
    follows = begin["data"]["follows"]
    assert (follows["session"], follows["hash"]) == (first.session, first.hash)
    assert follows["ended"] == f"its file was {ended}"
    assert entry["action"] == "B"
    assert "gap" not in begin["data"]
    assert (path.read_bytes() if path.exists() else None) == left  # left alone


def test_meddling_is_noticed_at_close_as_well(handler: AuditHandler, audit_dir: Path) -> None:
    """The session's own last line goes nowhere, and nothing raises."""
    handler.record({"action": "A"})
    only_file(audit_dir).unlink()

    handler.close()

    assert [path.name for path in audit_dir.iterdir()] == ["audit-journal.ndjson"]


def test_a_directory_that_is_a_link_is_refused_unless_asked_for(
    make_handler: MakeHandler, tmp_path: Path
) -> None:
    """At the check and at the call; `allow_unsafe_directory` accepts it."""
    real = tmp_path / "real"
    real.mkdir(0o700)
    link = tmp_path / "link"
    link.symlink_to(real)

    refused = make_handler(FileSink(link))
    with pytest.raises(AuditConfigurationError, match="symbolic link"):
        refused.check()
    with pytest.raises(AuditWriteError, match=r"symbolic link[\s\S]*allow_unsafe_directory"):
        refused.record({"action": "A"})
    make_handler(FileSink(link, allow_unsafe_directory=True)).record({"action": "B"})

    assert [entry["action"] for entry in recorded(real)] == ["B"]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_directory_that_anybody_may_write_to_is_refused_unless_asked_for(
    mode: int, make_handler: MakeHandler, audit_dir: Path
) -> None:
    """Anybody could delete or replace the files there."""
    audit_dir.mkdir()
    audit_dir.chmod(mode)

    with pytest.raises(AuditConfigurationError, match="anybody"):
        make_handler().check()
    with pytest.raises(AuditWriteError, match="anybody"):
        make_handler().record({"action": "A"})
    make_handler(FileSink(audit_dir, allow_unsafe_directory=True)).record({"action": "B"})

    assert [entry["action"] for entry in recorded(audit_dir)] == ["B"]


def test_what_others_print_to_closed_streams_does_not_land_in_the_file(audit_dir: Path) -> None:
    """A daemon that closed its standard streams must not get a session file in their place."""
    run_well(
        """
        import os, sys
        from structlog_audit import AuditHandler, FileSink
        handler = AuditHandler(FileSink(sys.argv[1]))
        for stream in (0, 1, 2):
            os.close(stream)
        handler.record({"action": "First"})
        for stream in (0, 1, 2):
            try:
                os.write(stream, b"printed by somebody")
            except OSError:
                pass
        handler.record({"action": "Second"})
        handler.close()
        os._exit(0)
        """,
        audit_dir,
    )
    assert [entry["action"] for entry in recorded(audit_dir)] == ["First", "Second"]
    assert len(session_files(audit_dir)) == 1
    assert b"printed" not in (audit_dir / "audit-journal.ndjson").read_bytes()
