"""Other processes: forked from this one, or a Python of their own."""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import structlog_audit

HANG = 60
"""Seconds after which something is taken to hang; nothing here takes nearly as long."""


def environment(**variables: str) -> dict[str, str]:
    """Return an environment in which this very package is imported, without settings of ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AUDIT_")}
    path = str(Path(structlog_audit.__file__).parent.parent)
    return {**kept, "PYTHONPATH": path, "PYTHONWARNINGS": "error", **variables}


def run_python(script: str, *args: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with these environment variables."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=HANG,
    )


def run_well(script: str, *args: object, **variables: str) -> str:
    """Run a script that must succeed; return what it printed."""
    done = run_python(script, *args, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_child(work: Callable[[], Any]) -> Any:
    """Run a function in a forked child; return what it returned, or fail with its traceback."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _work_and_exit(work, reading, writing)
    os.close(writing)
    try:
        if not select.select([reading], [], [], HANG)[0]:
            os.kill(child, signal.SIGKILL)
            raise AssertionError("the forked child hangs")
        with os.fdopen(reading, "rb") as answers:
            answer = answers.read()
    finally:
        os.waitpid(child, 0)
    assert answer, "the forked child died without an answer"
    ok, result = pickle.loads(answer)
    assert ok, result
    return result


def _work_and_exit(work: Callable[[], Any], reading: int, writing: int) -> None:
    try:
        os.close(reading)
        try:
            answer = pickle.dumps((True, work()))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        with os.fdopen(writing, "wb") as out:
            out.write(answer)
    finally:
        os._exit(0)


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """Run functions in threads of their own, started together; return results or exceptions."""
    results: list[Any] = [AssertionError("the thread hangs")] * len(works)
    together = threading.Barrier(len(works))

    def run(number: int, work: Callable[[], Any]) -> None:
        together.wait(HANG)
        try:
            results[number] = work()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    return results


def run_file(path: Path, script: str, *args: object, **variables: str) -> str:
    """Write a script to a file and run it, as spawned processes need it; return what it printed."""
    path.write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, str(path), *map(str, args)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_loop(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine in a loop of its own; give up when it hangs."""

    async def bounded() -> Any:
        return await asyncio.wait_for(work, HANG)

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another thread, while the loop goes on."""
    while not condition():
        await asyncio.sleep(0.001)


def stop(process: subprocess.Popen[Any], by: signal.Signals = signal.SIGTERM) -> None:
    """End a server as an operator does; one that does not end fails the test."""
    if process.poll() is None:
        process.send_signal(by)
    try:
        process.wait(HANG)
    finally:
        process.kill()
        process.wait()


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something that another thread does has happened."""
    run_loop(until(condition))
