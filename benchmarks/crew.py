"""The contenders' processes, and whose turn it is: they alternate, so a drift hits all alike."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent
Answer = dict[str, Any]


class Member:
    """One contender in its process.

    Args:
        name: of the contender.
        directory: empty, on the disk to measure.
        options: for the contender.
        environment: variables to add.
    """

    def __init__(
        self, name: str, directory: Path, options: Answer, environment: dict[str, str]
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", name, directory, json.dumps(options)],
            cwd=HOME.parent, env={**os.environ, **environment}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.first: int = self.answer()["first"]

    def order(self, **order: Any) -> None:
        """Tell it what to do."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Answer:
        """Wait for its answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the contender {self.name!r} failed; see above")
        answer: Answer = json.loads(line)
        return answer

    def do(self, **order: Any) -> Answer:
        """Have it do something while all others sleep."""
        self.order(**order)
        return self.answer()

    def dismiss(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def crew(
    disk: Path, names: Sequence[str], *, slow: int = 0, options: Answer | None = None
) -> Iterator[list[Member]]:
    """Start a process for each name, each in a directory of its own; remove all afterwards.

    Args:
        disk: where to write.
        names: of contenders; one may take part more than once.
        slow: microseconds that a sync takes at least; 0 leaves the disk as it is.
        options: for all of them.
    """
    environment = {"LD_PRELOAD": str(_library(disk)), "SLOW_SYNC_US": str(slow)} if slow else {}
    home = disk / "crew"
    members: list[Member] = []
    try:
        for number, name in enumerate(names):
            directory = home / str(number)
            directory.mkdir(parents=True)
            members.append(Member(name, directory, options or {}, environment))
        yield members
    finally:
        for member in members:
            member.dismiss()
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def server(disk: Path) -> Iterator[str]:
    """Start the tests' stand-in for Seq, which syncs each request; yield its URL."""
    program = HOME.parent / "tests" / "servers" / "seq.py"
    command = [sys.executable, str(program), "--port", "0", "--store", str(disk / "seq.clef")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def rounds(members: Sequence[Member], count: int, **order: Any) -> list[list[Answer]]:
    """Have each do the same, in turns; return the answers of each, one for every round."""
    answers: list[list[Answer]] = [[] for _ in members]
    for number in range(count):
        turn = list(zip(members, answers, strict=True))
        for member, its in turn if number % 2 else reversed(turn):
            its.append(member.do(**order))
    return answers


def has_compiler() -> bool:
    """Tell whether a slow disk can be emulated here."""
    return sys.platform == "linux" and shutil.which("cc") is not None


def _library(disk: Path) -> Path:
    library = disk / "slow_sync.so"
    if not library.exists():
        source = HOME / "slow_sync.c"
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True)
    return library
