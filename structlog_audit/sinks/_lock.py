"""Locks on files, between processes: they end with the process, whatever becomes of it."""

from __future__ import annotations

import contextlib
import os
import sys

if sys.platform == "win32":
    import msvcrt

    _FAR = 2**30  # what is locked cannot be read there, and the others want to read the text

    def try_lock(descriptor: int) -> bool:
        """Lock an open file for us alone; False if somebody else has it."""
        return _at_far(descriptor, msvcrt.LK_NBLCK)

    def is_locked(path: str) -> bool:
        """Tell that it is, for all that can be known here."""
        return True

    def mark_alive(descriptor: int) -> None:
        """Do nothing: a lock would keep readers out of what they want to read."""

    def unlock(descriptor: int) -> None:
        """Give the lock up, also on behalf of forked children that inherited it."""
        _at_far(descriptor, msvcrt.LK_UNLCK)

    def _at_far(descriptor: int, verb: int) -> bool:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, verb, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def try_lock(descriptor: int) -> bool:
        """Lock an open file for us alone; False if somebody else has it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_locked(path: str) -> bool:
        """Tell whether a process holds the lock that says it is there still.

        Raises:
            OSError: it cannot be told.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def mark_alive(descriptor: int) -> None:
        """Hold a lock as long as we live, where the file system has locks; nobody waits for it.

        Whoever reads the file can tell by it whether its process is there still.
        """
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def unlock(descriptor: int) -> None:
        """Give the lock up, also on behalf of forked children that inherited it."""
        fcntl.flock(descriptor, fcntl.LOCK_UN)
