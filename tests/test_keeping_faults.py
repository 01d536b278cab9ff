"""Retention and compression, killed before each system call that changes something, or failing.

The state of a disk changes with these calls alone, so a kill anywhere else leaves one of the states
that are tried here.
"""

from __future__ import annotations

import collections
import ctypes
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import zstandard
from aging import record
from faults.runner import needs
from reading import check_cut_short
from running import HANG
from signing import make_key

from structlog_audit import AuditError, Settings, Signer
from structlog_audit.keeping import Keeping
from structlog_audit.note import VerifierKey
from structlog_audit.verify import verify

pytestmark = [
    pytest.mark.fault,
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

CHANGES = ("openat", "write", "fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink",
           "unlinkat", "ftruncate", "mkdir", "mkdirat", "fchmod", "flock")  # fmt: skip
SESSIONS = 3
"""Old ones; the newest of them stays."""
Work = Callable[[Path], None]


class Ground:
    """A directory with old sessions, fresh for each attempt."""

    def __init__(self, place: Path) -> None:
        self._template = place / "template"
        self.directory = place / "audit"
        self.archive = place / "archive"
        self.key_file = place / "audit.key"
        self.keys: list[VerifierKey] = [make_key(self.key_file).verifier]
        signer = Signer(self.key_file)
        self.files = [record(self._template, 200 - n, signer=signer) for n in range(SESSIONS)]
        self.content = {path.name: path.read_bytes() for path in self.files}
        self._trace = place / "trace"

    def renew(self) -> None:
        for path in (self.directory, self.archive):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self._template, self.directory)

    def keeping(self) -> Keeping:
        return Keeping(str(self.directory), Settings(signing_key_file=str(self.key_file)))

    def run(self, work: Work, *injections: str) -> int:
        """Work in a child under strace; return its status."""
        ready, child_ready = os.pipe()
        child_go, go = os.pipe()
        child = os.fork()
        if child == 0:
            self._work_traced(work, child_ready, child_go)
        for descriptor in (child_ready, child_go):
            os.close(descriptor)
        os.read(ready, 1)
        command = ["strace", "-f", "-p", str(child), "-o", str(self._trace),
                   "-e", f"trace={','.join('?' + name for name in CHANGES)}",
                   *(word for each in injections for word in ("-e", f"inject={each}"))]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert "attached" in tracer.stderr.readline()
            os.write(go, b"x")
            _, status = os.waitpid(child, 0)
            tracer.communicate(timeout=HANG)
        for descriptor in (ready, go):
            os.close(descriptor)
        return status

    def calls(self) -> list[tuple[str, int, bool]]:
        """Return the calls of the last run: name, how manieth, whether it changes something."""
        counts: collections.Counter[str] = collections.Counter()
        calls = []
        for name, rest in re.findall(r"^\d+ +(\w+)\((.*)", self._trace.read_text(), re.MULTILINE):
            counts[name] += 1
            calls.append((name, counts[name], _changes(name, rest)))
        return calls

    def _work_traced(self, work: Work, ready: int, go: int) -> None:
        status = 3
        try:
            ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, _ANY
            os.write(ready, b"x")
            os.read(go, 1)
            work(self)
            status = 0
        except AuditError:
            status = 1
        finally:
            os._exit(status)

    def check(self) -> None:
        """Nothing is lost, nothing is half, and nothing looks as if somebody had meddled."""
        report = verify(self.directory, keys=self.keys)
        pruned = {os.path.basename(each.file) for each in report.pruned if each.signed}
        for name, content in self.content.items():
            whole = [path for path in self.forms(name) if path.exists()]
            assert all(_text(path) == content for path in whole), f"{name} is half"
            here = [path for path in whole if path.parent == self.directory]
            gone_well = name in pruned and (whole or not self.archive.exists())
            assert here or gone_well, f"{name} is lost"
        check_cut_short(report)

    def forms(self, name: str) -> list[Path]:
        zst = f"{name}.zst"
        return [self.directory / name, self.directory / zst, self.archive / name]

    def leftovers(self) -> list[str]:
        there = [
            *self.directory.iterdir(),
            *(self.archive.iterdir() if self.archive.exists() else ()),
        ]
        return [path.name for path in there if path.name.endswith(".part")]


def _changes(name: str, arguments: str) -> bool:
    return name != "flock" and (name != "openat" or "O_CREAT" in arguments)


def _text(path: Path) -> bytes:
    data = path.read_bytes()
    return (
        zstandard.ZstdDecompressor().decompressobj().decompress(data)
        if path.suffix == ".zst"
        else data
    )


def archive(ground: Ground) -> None:
    ground.keeping().retain(timedelta(days=90), "--keep 90d", str(ground.archive))


def remove(ground: Ground) -> None:
    ground.keeping().retain(timedelta(days=90), "--keep 90d", None)


def compress(ground: Ground) -> None:
    ground.keeping().compress(timedelta(days=90))


def is_done(ground: Ground, work: Work) -> bool:
    """Tell whether the old ones went. A run that was killed may have left a newer session behind
    them, so that the newest of them may go in the next one."""
    left = [path.name for path in ground.files if (ground.directory / path.name).exists()]
    moved = [path for path in ground.files[:-1] if any(map(Path.exists, ground.forms(path.name)))]
    return left in ([], [ground.files[-1].name]) and len(moved) == (0 if work is remove else 2)


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    needs("strace")
    return Ground(tmp_path)


def attempts(ground: Ground, work: Work, *, all_: bool) -> list[tuple[str, int]]:
    """Return the calls to be tried: which one, and the how manieth; all, or those that change."""
    ground.renew()
    assert ground.run(work) == 0
    assert is_done(ground, work)
    ground.check()
    calls = ground.calls()
    assert sum(name.startswith("unlink") for name, *_ in calls) >= 2, calls
    return [(name, number) for name, number, changes in calls if changes or all_]


def completes(ground: Ground, work: Work) -> None:
    """Check that nothing is lost, and that the next run does what is left to do."""
    ground.check()
    work(ground)
    ground.check()
    assert is_done(ground, work)
    assert not ground.leftovers()


@pytest.mark.parametrize("work", [archive, remove, compress])
def test_killed_before_any_call_nothing_is_lost_and_the_next_run_completes(
    work: Work, ground: Ground
) -> None:
    """SIGKILL at each call in turn: what was there is there, whole; then it goes on."""
    killed = 0
    for name, number in attempts(ground, work, all_=False):
        ground.renew()
        status = ground.run(work, f"{name}:signal=KILL:when={number}")
        killed += status == signal.SIGKILL
        try:
            completes(ground, work)
        except BaseException as error:
            raise AssertionError(f"killed at {name} number {number}") from error
    assert killed > 20


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("work", [archive, remove, compress])
def test_a_call_that_fails_is_told_and_the_next_run_completes(
    work: Work, fault: str, ground: Ground
) -> None:
    """A full or failing disk at each call in turn: an error of ours, and nothing is lost."""
    failed = 0
    for name, number in attempts(ground, work, all_=fault == "EIO"):
        ground.renew()
        status = ground.run(work, f"{name}:error={fault}:when={number}")
        failed += status != 0
        try:
            assert status in (0, 1 << 8), "no error of ours"
            completes(ground, work)
        except BaseException as error:
            raise AssertionError(f"{fault} of {name} number {number}") from error
    assert failed > 10


def hold(ground: Ground) -> None:
    ground.keeping().add_hold("case 4711")


def release(ground: Ground) -> None:
    keeping = ground.keeping()
    for name in holds(ground):
        keeping.release_hold(name, "over")


def holds(ground: Ground) -> list[str]:
    """Return the holds in force."""
    return [each.id for each in ground.keeping().survey().holds() if each.released is None]


@pytest.mark.parametrize("fault", ["signal=KILL", "error=EIO", "error=ENOSPC"])
def test_a_hold_is_in_force_or_not_and_can_be_set_and_released_again(
    fault: str, ground: Ground
) -> None:
    """Interrupted at each call in turn; a release that was interrupted is no half one."""
    ground.renew()
    assert ground.run(hold) == 0
    calls = [(name, number) for name, number, changes in ground.calls() if changes]
    for name, number in calls:
        ground.renew()
        for work in (hold, release):
            status = ground.run(work, f"{name}:{fault}:when={number}")
            assert status in (0, 1 << 8, signal.SIGKILL), f"{fault} of {name} number {number}"
            ground.check()
            work(ground)
            ground.check()
            assert bool(holds(ground)) is (work is hold), f"{fault} of {name} number {number}"
