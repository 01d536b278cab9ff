"""kill -9 in a loop, while several threads record and acknowledge through a pipe."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from faults.checker import check_file, check_promises, read_files
from faults.runner import PATIENCE, Run, child, environment

if os.name != "posix":
    pytest.skip("kill -9 is a matter of POSIX", allow_module_level=True)

ROUNDS = 10
THREADS = 4
PLENTY = 100_000
"""Entries that no round comes to."""


def _record_until_killed(directory: Path, first: int, after: int) -> list[dict[str, Any]]:
    """Start a child, kill it after so many acknowledgements, return what came through the pipe."""
    reading, writing = os.pipe()
    command = child(directory, PLENTY, pipe=writing, threads=THREADS, first=first, bytes=3_000)
    process = subprocess.Popen(command, env=environment(), pass_fds=[writing])
    os.close(writing)
    told = []
    with process, open(reading, "rb") as pipe:
        for line in pipe:
            told.append(line)
            if len(told) == after:
                process.kill()
        process.wait(PATIENCE)
    if told and not told[-1].endswith(b"\n"):
        told.pop()  # cut by the kill
    assert process.returncode == -9, "it was not killed"
    return [json.loads(line) for line in told]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[dict[str, Any]]]]:
    """A directory that saw several kills, and what each round acknowledged."""
    directory = tmp_path_factory.mktemp("killed") / "audit"
    rounds = [
        _record_until_killed(directory, first=number * THREADS * PLENTY, after=1 + number * 37)
        for number in range(ROUNDS)
    ]
    return directory, rounds


def test_every_acknowledged_entry_survives_kill_9(
    killed: tuple[Path, list[list[dict[str, Any]]]],
) -> None:
    """Ten processes were killed at work; what each of them acknowledged is there, and whole."""
    directory, rounds = killed
    files = read_files(directory)
    for number, journal in enumerate(rounds):
        assert len(journal) >= 1 + number * 37
        assert not [line for line in journal if "error" in line]
        check_promises(Run(directory, -9, journal), files)


def test_kill_9_leaves_one_linked_session_a_process(
    killed: tuple[Path, list[list[dict[str, Any]]]],
) -> None:
    """Threads share their process's session; it is whole but for a torn end, never continued."""
    directory, rounds = killed
    files = read_files(directory)
    assert len(files) == ROUNDS
    for file in files.values():
        check_file(file)
        pids = {entry["pid"] for entry in file.entries}
        assert len(pids) == 1, "two processes wrote to one file"
    for journal in rounds:
        assert len({line["session"] for line in journal}) == 1


def test_a_torn_tail_hinders_no_start_and_is_never_glued(tmp_path: Path) -> None:
    """A file that ends in the middle of a line stays as it is; the next start has its own."""
    directory = tmp_path / "audit"
    journal = _record_until_killed(directory, first=0, after=20)
    (file,) = read_files(directory).values()
    with open(file.path, "ab") as torn:  # what a kill in the middle of a write leaves
        torn.write(b'{"level":35,"time":"2026-11-')
    before = file.path.read_bytes()
    later = _record_until_killed(directory, first=PLENTY * THREADS, after=20)
    assert file.path.read_bytes() == before
    files = read_files(directory)
    check_promises(Run(directory, -9, [*journal, *later]), files)
    others = [other for other in files.values() if other.path != file.path]
    assert [other.session for other in others] == [later[0]["session"]]
