"""The disk under a directory: what a sync means there, and how long one takes."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

from structlog_audit.exceptions import AuditConfigurationError
from structlog_audit.sinks import _durable

_OCTAL = re.compile(r"\\(040|011|012|134)")  # what proc(5) escapes: blank, tab, newline, backslash
_IN_MEMORY = {"tmpfs", "ramfs"}
_ELSEWHERE = {"nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "fuse", "fuseblk", "fuse.sshfs"}


def file_system(path: str) -> dict[str, Any]:
    """Tell what file system a path is on, and what a sync means there.

    Args:
        path: an existing file or directory.

    Returns:
        `type`, `mount`, `durable` (False where a sync means nothing) and `meaning`.
    """
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            mounts = [_mount(line) for line in lines]
    except OSError:
        return {
            "type": "unknown",
            "mount": "",
            "durable": True,
            "meaning": "an unknown file system",
        }
    real = os.path.realpath(path)
    inside = [m for m in mounts if real == m[0] or real.startswith(m[0].rstrip("/") + "/")]
    mount, kind, options = max(enumerate(inside), key=lambda m: (len(m[1][0]), m[0]))[1]
    durable, meaning = _meaning(kind, options)
    return {"type": kind, "mount": mount, "durable": durable, "meaning": meaning}


def _mount(line: str) -> tuple[str, str, str]:
    before, _, after = line.partition(" - ")
    point = _OCTAL.sub(lambda found: chr(int(found[1], 8)), before.split()[4])
    kind, _, options = after.split(" ", 2)
    return point, kind, options.strip()


def _meaning(kind: str, options: str) -> tuple[bool, str]:
    if kind in _IN_MEMORY:
        return False, f"{kind}: it lives in memory, a sync means nothing, a restart loses all"
    if kind == "overlay":
        parts = [part.partition("=") for part in options.split(",")]
        given = {name: value for name, _, value in parts}
        if "volatile" in given:
            return False, "overlay mounted volatile: a sync does nothing"
        upper = given.get("upperdir", "")
        if os.path.isdir(upper) and not file_system(upper)["durable"]:
            return False, "overlay whose upper directory lives in memory: a sync means nothing"
        return True, "overlay: files vanish with the container; use a volume"
    if kind in _ELSEWHERE:
        return True, f"{kind}: a sync is as good as the server behind it"
    return True, f"{kind}: a sync reaches the device, as far as the device is honest"


class BareFile:
    """A file that is written and synced without anything else: the floor of what a call costs."""

    def __init__(self, directory: str, descriptor: int) -> None:
        self._directory = directory
        self._descriptor = descriptor

    def write(self, line: bytes) -> tuple[int, int]:
        """Append a line and sync it.

        Returns:
            The nanoseconds that the write took, and those that the sync took.

        Raises:
            AuditConfigurationError: the disk is full.
        """
        start = time.perf_counter_ns()
        taken = _durable.append(self._descriptor, line)
        between = time.perf_counter_ns()
        _durable.sync(self._descriptor)
        end = time.perf_counter_ns()
        if taken != len(line):
            raise AuditConfigurationError(f"short write in {self._directory}: it is full")
        return between - start, end - between


@contextlib.contextmanager
def bare_file(directory: str, name: str) -> Iterator[BareFile]:
    """Make a file to measure with; it is removed afterwards.

    Args:
        directory: an existing directory.
        name: of the file; it must not be there yet.

    Raises:
        AuditConfigurationError: it cannot be written to.
    """
    try:
        base = _durable.open_directory(directory)
        try:
            descriptor = _durable.create(directory, base, name)
            try:
                yield BareFile(directory, descriptor)
            finally:
                _durable.close(descriptor)
                _durable.remove(directory, base, name)
        finally:
            _durable.close(base)
    except OSError as error:
        raise AuditConfigurationError(f"cannot write to {directory}: {error.strerror}") from error


def percentiles(times: Sequence[int]) -> dict[str, float]:
    """Return p50, p99 and the most of some nanoseconds, in microseconds."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "p50_us": round(ordered[min(last, len(ordered) // 2)] / 1000, 1),
        "p99_us": round(ordered[min(last, len(ordered) * 99 // 100)] / 1000, 1),
        "max_us": round(ordered[last] / 1000, 1),
    }
