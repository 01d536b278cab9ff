"""The table of faults must be able to fail: libraries that break a rule are caught by it.

Each test patches a copy of the package, in its text, and runs cases of the table against it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults.runner import PACKAGE
from faults.table import NAMED, fault_free, run_case

pytestmark = pytest.mark.fault


def _patched(tmp_path: Path, file: str, *changes: tuple[str, str]) -> Path:
    """Return the place of a copy of the package in which some text was replaced."""
    place = tmp_path / "broken"
    shutil.copytree(PACKAGE / "structlog_audit", place / "structlog_audit")
    target = place / "structlog_audit" / file
    text = target.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{file} has changed: {old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    target.write_text(text)
    return place


def _is_caught(tmp_path: Path, package: Path, point: str, fault: str, complaint: str) -> None:
    """The case passes with the package as it is, and fails with its broken copy."""
    run_case(NAMED[point], fault, tmp_path / "sound")
    with pytest.raises(AssertionError, match=complaint):
        run_case(NAMED[point], fault, tmp_path / "case", package)


DURABLE = "sinks/_durable.py"
FILE = "sinks/file.py"


def test_a_library_without_fdatasync_is_caught(tmp_path: Path) -> None:
    """Later entries are acknowledged from the page cache."""
    package = _patched(tmp_path, DURABLE, ("        os.fdatasync(descriptor)", "        pass"))
    with pytest.raises(AssertionError, match="acknowledged before the syncs"):
        fault_free(False, package=package)


def test_a_library_without_fsync_of_a_new_file_is_caught(tmp_path: Path) -> None:
    """The first entry is acknowledged before its file is durable."""
    package = _patched(
        tmp_path,
        DURABLE,
        ("        os.fsync(descriptor)\n    sync_directory", "        pass\n    sync_directory"),
    )
    with pytest.raises(AssertionError, match="acknowledged before the syncs"):
        fault_free(False, package=package)


def test_a_library_that_does_not_sync_the_directory_is_caught(tmp_path: Path) -> None:
    """The first entry is acknowledged before its file's name is durable."""
    package = _patched(
        tmp_path,
        DURABLE,
        ("os.fsync(descriptor)\n    sync_directory(base)", "os.fsync(descriptor)"),
    )
    with pytest.raises(AssertionError, match=r"acknowledged before the syncs.*'directory'"):
        fault_free(False, package=package)


def test_a_library_that_does_not_sync_parents_is_caught(tmp_path: Path) -> None:
    """The first entry is acknowledged before the names of new directories are durable."""
    package = _patched(tmp_path, DURABLE, ("        sync_directory(parent)", "        pass"))
    with pytest.raises(AssertionError, match=r"acknowledged before the syncs.*'directory'"):
        fault_free(True, package=package)


SWALLOWED = ('            raise self._failed("sync of", error, "unknown") from error',
             "            pass")  # fmt: skip


@pytest.mark.parametrize("point", ["sync of the new file", "sync of the fourth write"])
def test_a_library_that_swallows_a_failed_sync_is_caught(point: str, tmp_path: Path) -> None:
    """The caller is told that all is well although the disk said otherwise."""
    package = _patched(tmp_path, FILE, SWALLOWED)
    _is_caught(tmp_path, package, point, "EIO", "touched after|acknowledged")


def test_a_library_that_syncs_again_after_a_failure_is_caught(tmp_path: Path) -> None:
    """The second sync succeeds, with nothing stored."""
    again = (
        "        try:\n            os.fdatasync(descriptor)\n"
        "        except OSError:\n            os.fdatasync(descriptor)"
    )
    package = _patched(tmp_path, DURABLE, ("        os.fdatasync(descriptor)", again))
    _is_caught(tmp_path, package, "sync of the fourth write", "EIO", "touched after its failure")


def test_a_library_that_ignores_a_short_write_is_caught(tmp_path: Path) -> None:
    """Half an entry is acknowledged as a whole one."""
    package = _patched(tmp_path, FILE, ("if written != len(data):", "if False:"))
    _is_caught(tmp_path, package, "fourth write", "short 100", "touched after|acknowledged")


def test_a_library_that_writes_the_rest_later_is_caught(tmp_path: Path) -> None:
    """What follows a short write in the same file may follow a hole."""
    rest = "while written < len(data):\n            written += _durable.append("
    rest += "self._descriptor, data[written:])\n        if False:"
    package = _patched(tmp_path, FILE, ("if written != len(data):", rest))
    _is_caught(tmp_path, package, "fourth write", "short 100", "touched after its failure")


def test_a_library_that_goes_on_with_a_broken_file_is_caught(tmp_path: Path) -> None:
    """The next entry goes to the file whose last write failed."""
    package = _patched(tmp_path, "session.py", ("        self._over(error.reason)\n", ""))
    _is_caught(tmp_path, package, "fourth write", "ENOSPC", "touched after its failure")


def test_a_library_that_swallows_a_failed_write_is_caught(tmp_path: Path) -> None:
    """The entry is acknowledged and is nowhere."""
    old = '            raise self._failed("write to", error, "no") from error'
    package = _patched(tmp_path, FILE, (old, "            written = len(data)"))
    _is_caught(tmp_path, package, "fourth write", "ENOSPC", "touched after|acknowledged")


def test_a_library_that_leaves_empty_files_is_caught(tmp_path: Path) -> None:
    """A session of which nothing was written leaves a file."""
    failing = "\n        except OSError:"
    old = f"            _durable.remove(self.directory, self._base, self._name){failing}"
    new = f"            raise OSError{failing}"
    package = _patched(tmp_path, FILE, (old, new))
    _is_caught(tmp_path, package, "first write", "ENOSPC", "has no whole line and was left")


def test_a_library_that_claims_too_much_is_caught(tmp_path: Path) -> None:
    """An entry whose sync failed is called 'not stored', although it stands there."""
    new = ('raise self._failed("sync of", error, "unknown")',
           'raise self._failed("sync of", error, "no")')  # fmt: skip
    package = _patched(tmp_path, FILE, new)
    _is_caught(tmp_path, package, "sync of the fourth write", "EIO", "stands there whole")


def test_a_library_that_tells_of_no_gap_is_caught(tmp_path: Path) -> None:
    """The session after a failure does not say that calls failed."""
    package = _patched(
        tmp_path, "session.py", ('            data["gap"] = gap\n', "            pass\n")
    )
    with pytest.raises((AssertionError, KeyError), match="gap"):
        run_case(NAMED["fourth write"], "EIO", tmp_path / "case", package)


JOURNAL = "journal.py"


def test_a_library_that_does_not_sync_the_journal_is_caught(tmp_path: Path) -> None:
    """A session is acknowledged that the journal may forget."""
    package = _patched(
        tmp_path, JOURNAL, ("            _durable.sync_new_file(self.descriptor, self._base)",
                            "            pass"),
    )  # fmt: skip
    with pytest.raises(AssertionError, match="acknowledged before the syncs"):
        fault_free(False, package=package)


def test_a_library_that_enters_no_session_is_caught(tmp_path: Path) -> None:
    """An entry is acknowledged in a session of which the journal does not know."""
    package = _patched(tmp_path, FILE, ("            self._enter(head)\n", "            pass\n"))
    with pytest.raises(AssertionError, match=r"an end without a begin|not its session"):
        fault_free(False, package=package)


def test_a_library_that_enters_no_end_is_caught(tmp_path: Path) -> None:
    """Nobody can tell a session that was closed from one that was cut."""
    package = _patched(
        tmp_path,
        "session.py",
        ("                self._tell_end(reason, clean)\n", "                pass\n"),
    )
    with pytest.raises(AssertionError, match="was not entered"):
        fault_free(False, package=package)


def test_a_library_that_swallows_a_failure_of_the_journal_is_caught(tmp_path: Path) -> None:
    """The caller is told that all is well although the session is not entered."""
    old = '                error.persisted = "unknown"\n            raise\n'
    package = _patched(tmp_path, FILE, (old, old.replace("raise", "return")))
    _is_caught(tmp_path, package, "first write of the journal", "EIO", "acknowledged|missing")


@pytest.mark.parametrize(
    ("point", "fault"), [("write of a begin", "short 100"), ("sync of a begin", "EIO")]
)
def test_a_library_that_does_not_cut_the_journal_is_caught(
    point: str, fault: str, tmp_path: Path
) -> None:
    """What had failed stays, and is linked to."""
    package = _patched(
        tmp_path,
        JOURNAL,
        ("                _durable.cut(file.descriptor, self._seen.offset)\n", ""),
    )
    _is_caught(tmp_path, package, point, fault, "glued|to be cut|missing")


def test_a_library_that_leaves_the_file_of_a_session_that_was_not_entered_is_caught(
    tmp_path: Path,
) -> None:
    """An entry that was 'not stored' stands there whole."""
    package = _patched(tmp_path, FILE, ("and not self._discard_durably():", "and False:"))
    _is_caught(tmp_path, package, "first write of the journal", "EIO", "stands there whole")
