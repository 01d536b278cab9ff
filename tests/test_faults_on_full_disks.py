"""Disks that really fill up, limits, and directories that refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from faults.checker import check_run, read_files
from faults.disks import NOBODY, linux, mount, needs_root, small_disk
from faults.runner import PATIENCE, Run, child, environment, needs, read_journal, run
from faults.table import NAMED, prepare, run_case
from reading import session_files


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, with a place for session files."""
    with small_disk(tmp_path / "disk") as place:
        yield place


class Paused:
    """A child that waits after some of its entries, so that the test can change the disk."""

    def __init__(self, directory: Path, journal: Path, **options: Any) -> None:
        self._journal = journal
        self._directory = directory
        command = child(directory, journal=str(journal), **options)
        self._process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Paused:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # has ended already, unless the test failed
        self._process.communicate()

    def wait(self) -> list[dict[str, Any]]:
        """Wait for the next pause; return the journal so far."""
        assert self._process.stdout.readline() == "paused\n"
        return read_journal(self._journal)

    def go_on(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> Run:
        self._process.communicate(timeout=PATIENCE)
        return Run(self._directory, self._process.returncode, read_journal(self._journal))


def test_disk_full_raises_and_the_next_entry_is_whole(small_disk: Path, tmp_path: Path) -> None:
    """A disk fills up for real; calls fail until there is room, and nothing torn is continued."""
    with Paused(small_disk, tmp_path / "journal", calls=30, bytes=5_000, pauses=[19]) as recorder:
        journal = recorder.wait()
        full = [line["error"] for line in journal if "error" in line]
        assert full
        assert full == list(range(full[0], 20)), "an entry was recorded on a full disk"
        (file,) = session_files(small_disk)  # failing calls leave no files
        size = file.stat().st_size
        subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk.parent)], check=True)
        recorder.go_on()
        result = recorder.end()
    assert [line["ok"] for line in result.acknowledged] == [*range(full[0]), *range(20, 30)]
    files = check_run(result)
    assert len(files) == 2
    assert file.stat().st_size == size
    assert not files[result.acknowledged[-1]["session"]].tail


def test_space_that_is_freed_is_used_by_the_next_call(small_disk: Path, tmp_path: Path) -> None:
    """Somebody else fills the disk and goes away again; the same process records on."""
    small_disk.parent.joinpath("big").write_bytes(b"x" * 60_000)
    with Paused(small_disk, tmp_path / "journal", calls=4, bytes=9_000, pauses=[1]) as recorder:
        assert [line["error"] for line in recorder.wait() if "error" in line] == [0, 1]
        assert list(small_disk.iterdir()) == []
        small_disk.parent.joinpath("big").unlink()
        recorder.go_on()
        result = recorder.end()
    assert [line["ok"] for line in result.acknowledged] == [2, 3]
    check_run(result)


def test_a_thousand_failing_calls_leave_no_files(small_disk: Path, tmp_path: Path) -> None:
    """Each failing call begins a session and takes its file away again."""
    small_disk.mkdir(mode=0o700)
    with open(small_disk.parent / "big", "wb", buffering=0) as big, suppress(OSError):
        while True:
            big.write(b"x" * 1_000)
    result = run(small_disk, tmp_path / "journal", calls=1_000)
    assert result.status == 0, result.stderr
    assert len(result.errors) == 1_000
    assert {(line["errno"], line["persisted"]) for line in result.errors} == {(28, "no")}
    assert list(small_disk.iterdir()) == []
    before, after = result.journal[-1]["descriptors"]
    assert before == after


@linux
def test_a_console_on_dev_full_raises(tmp_path: Path) -> None:
    """Standard output goes to a device that is always full."""
    journal = tmp_path / "journal"
    with open("/dev/full", "wb") as full:
        subprocess.run(
            child(tmp_path, 3, journal=str(journal), console=True),
            env=environment(), stdout=full, timeout=PATIENCE, check=True,
        )  # fmt: skip
    told = read_journal(journal)
    assert [(line["errno"], line["persisted"]) for line in told[:-1]] == [(28, "no")] * 3


@linux
def test_a_console_whose_reader_is_gone_raises(tmp_path: Path) -> None:
    """Standard output is a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    journal = tmp_path / "journal"
    command = child(tmp_path, 3, journal=str(journal), console=True)
    subprocess.run(command, env=environment(), stdout=writing, timeout=PATIENCE, check=True)
    os.close(writing)
    assert [line["errno"] for line in read_journal(journal)[:-1]] == [32] * 3


@linux
def test_a_file_size_limit_cuts_a_line_once_and_never_glues(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes a real short write; the half stays alone, the next file is whole."""
    directory = tmp_path / "audit"
    result = run(directory, tmp_path / "journal", calls=20, bytes=1_000, limits={"FSIZE": 7_000})
    assert result.status == 0, result.stderr
    assert result.errors
    assert {line["persisted"] for line in result.errors} == {"no"}
    files = check_run(result)
    torn = [file for file in files.values() if file.tail]
    assert len(torn) == len(result.errors)
    assert {file.path.stat().st_size for file in torn} == {7_000}
    assert len(result.acknowledged) + len(result.errors) == 20


@linux
def test_a_file_size_limit_below_the_first_line_leaves_no_file(tmp_path: Path) -> None:
    """Not even the first line fits; what was written of it is removed again."""
    directory = tmp_path / "audit"
    result = run(directory, tmp_path / "journal", calls=3, bytes=20_000, limits={"FSIZE": 10_000})
    assert len(result.errors) == 3
    assert list(directory.iterdir()) == []


@linux
def test_no_descriptors_left_raises(tmp_path: Path) -> None:
    """RLIMIT_NOFILE is used up; the call says EMFILE, and leaves no file."""
    directory = prepare(tmp_path)
    result = run(directory, tmp_path / "journal", calls=2, limits={"NOFILE": 4})
    assert [line["errno"] for line in result.errors] == [24, 24]
    assert list(directory.iterdir()) == []


@linux
def test_one_descriptor_too_few_leaves_none_open(tmp_path: Path) -> None:
    """The directory can be opened and the file cannot; the directory is closed again."""
    directory = prepare(tmp_path)
    result = run(directory, tmp_path / "journal", calls=50, limits={"NOFILE": 5})
    assert [line["errno"] for line in result.errors] == [24] * 50
    assert list(directory.iterdir()) == []
    before, after = result.journal[-1]["descriptors"]
    assert before == after


def test_a_read_only_file_system_raises(tmp_path: Path) -> None:
    """The file system was remounted read-only; every call says so."""
    needs_root()
    directory = tmp_path / "audit"
    directory.mkdir(mode=0o700)
    mount("--bind", str(directory), str(directory))
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(directory)], check=True)
        result = run(directory, tmp_path / "journal", calls=2)
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)
    assert [line["errno"] for line in result.errors] == [30, 30]
    assert run(directory, tmp_path / "again", calls=1).acknowledged


@pytest.mark.skipif(os.name != "posix", reason="a matter of POSIX")
def test_a_directory_that_refuses_an_ordinary_user_raises(tmp_path: Path) -> None:
    """The service's user has no right to write there; every call says so."""
    with TemporaryDirectory() as place:  # pytest's own directories let no other user in
        os.chmod(place, 0o755)
        directory = Path(place, "audit")
        directory.mkdir(mode=0o555)
        limits = {"uid": NOBODY} if os.geteuid() == 0 else {}
        result = run(directory, tmp_path / "journal", calls=2, limits=limits)
        assert list(directory.iterdir()) == []
    assert [line["errno"] for line in result.errors] == [13, 13], result.stderr
    assert "permission" in result.errors[0]["text"]


def test_a_missing_directory_is_made_for_its_owner(tmp_path: Path) -> None:
    """Neither the directory nor its parent is there."""
    directory = tmp_path / "made" / "audit"
    result = run(directory, tmp_path / "journal", calls=2)
    assert len(result.acknowledged) == 2
    check_run(result)
    if os.name == "posix":
        assert {path.stat().st_mode & 0o777 for path in (directory, directory.parent)} == {0o700}


@pytest.mark.parametrize("name", ["audit", "audit/below"])
def test_a_file_in_the_directory_s_place_raises_and_is_left_alone(
    name: str, tmp_path: Path
) -> None:
    """A part of the path is a file; it is neither written nor removed."""
    in_the_way = tmp_path / "audit"
    in_the_way.write_text("mine")
    result = run(tmp_path / name, tmp_path / "journal", calls=2)
    assert {line["errno"] for line in result.errors} == {20}
    assert in_the_way.read_text() == "mine"


def test_an_immutable_directory_raises(tmp_path: Path) -> None:
    """`chattr +i` keeps even root from making a file."""
    needs_root()
    directory = tmp_path / "audit"
    directory.mkdir(mode=0o700)
    if shutil.which("chattr") is None:
        pytest.skip("no chattr on this host")
    done = subprocess.run(["chattr", "+i", str(directory)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("this file system has no immutable directories")
    try:
        result = run(directory, tmp_path / "journal", calls=2)
    finally:
        subprocess.run(["chattr", "-i", str(directory)], check=True)
    assert [line["errno"] for line in result.errors] == [1, 1]
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(
    "accident", [os.unlink, lambda path: os.rename(path, f"{path}.old")], ids=["deleted", "moved"]
)
def test_a_file_taken_away_underneath_costs_no_entry(
    accident: Callable[[str], None], tmp_path: Path
) -> None:
    """The next call notices, and records in a new session."""
    directory = tmp_path / "audit"
    with Paused(directory, tmp_path / "journal", calls=4, pauses=[1]) as recorder:
        first = recorder.wait()[0]["session"]
        (path,) = session_files(directory)
        accident(str(path))
        recorder.go_on()
        result = recorder.end()
    told = result.acknowledged
    assert [line["ok"] for line in told] == [0, 1, 2, 3]
    assert told[2]["session"] != first
    follows = read_files(directory)[told[2]["session"]].entries[0]["data"]["follows"]
    assert (follows["session"], follows["hash"]) == (first, told[1]["hash"])


@pytest.mark.fault
@pytest.mark.parametrize("name", ["sync of the new file", "sync of the fourth write"])
def test_a_sync_that_fails_once_and_then_would_succeed_is_never_tried_again(
    name: str, tmp_path: Path
) -> None:
    """The kernel reports the error once; the file's second sync would be a lie."""
    needs("strace")
    result = run_case(NAMED[name], "ENOSPC", tmp_path)
    (broken,) = result.injected
    later = result.trace[result.trace.index(broken) + 1 :]
    assert not [call for call in later if call.name in ("fsync", "fdatasync", "write")
                and call.path == broken.path]  # fmt: skip
