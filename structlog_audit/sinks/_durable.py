"""Durable files: system calls in an order that a crash cannot spoil.

Each step tells what a crash after it means; sources are in the tests and in `docs/durability.md`.
Only this module opens, writes and syncs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would turn \n into \r\n otherwise
_HAS_DIR_FD = os.open in os.supports_dir_fd
# a directory in which we could not have made anything, or one of the kernel's own
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EINVAL)
_F_FULLFSYNC = 51 if sys.platform == "darwin" else None  # fcntl.h; fsync does not flush there


def make_directories(path: str) -> None:
    """Make a directory and its missing parents, each durable in its own parent.

    A crash leaves some of them empty, which hinders nobody. The lowest one that is there already
    is made durable as well: whoever made it may have been killed before doing so.
    """
    missing = []
    current = path
    while not os.path.lexists(current):
        missing.append(current)
        current = os.path.dirname(current)
    try:
        sync_parent(current)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
    for directory in reversed(missing):
        _make_directory(directory)


def _make_directory(path: str) -> None:
    try:
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.mkdir(path, 0o700)
            os.chmod(path, 0o700)  # the umask may have taken bits away
        sync_parent(path)
    except OSError:
        with contextlib.suppress(OSError):
            os.rmdir(path)  # or the next call would take it for durable
        raise


def sync_parent(path: str) -> None:
    """Make the name of a file or directory durable in the directory above it."""
    parent = open_directory(os.path.dirname(path))
    try:
        sync_directory(parent)
    finally:
        close(parent)


def open_directory(path: str, *, follow: bool = True) -> int:
    """Open a directory for syncs and as the base of names; -1 where that cannot be done."""
    if not _HAS_DIR_FD:
        return -1
    return os.open(path, os.O_RDONLY | _DIRECTORY | _CLOEXEC | (0 if follow else _NOFOLLOW))


def create(directory: str, base: int, name: str) -> int:
    """Create a new file for appending, for its owner alone.

    A crash leaves an empty file, or none. `O_EXCL` refuses a file or link that is there already.
    The umask can only take bits away from the mode, so it is set once more.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | _NOFOLLOW | _CLOEXEC | _BINARY
    if base < 0:
        return os.open(os.path.join(directory, name), flags, 0o600)
    descriptor = os.open(name, flags, 0o600, dir_fd=base)
    try:
        descriptor = _above_standard(descriptor)
        os.fchmod(descriptor, 0o600)
    except OSError:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        with contextlib.suppress(OSError):
            remove(directory, base, name)
        raise
    return descriptor


def open_shared(directory: str, base: int, name: str) -> int:
    """Open a file that several processes append to, or create it, for its owner alone.

    A crash leaves an empty file, or none. One that is new is not removed whatever fails: another
    process may have opened it already. What is no regular file is not waited for.

    Returns:
        Its descriptor, for reading and appending.
    """
    flags = os.O_RDWR | os.O_APPEND | _NOFOLLOW | _CLOEXEC | _BINARY | getattr(os, "O_NONBLOCK", 0)
    path, where = (os.path.join(directory, name), None) if base < 0 else (name, base)
    with contextlib.suppress(FileNotFoundError):
        return _open_above_standard(path, flags, where)
    try:
        descriptor = _open_above_standard(path, flags | os.O_CREAT | os.O_EXCL, where)
    except FileExistsError:  # another process was faster
        return _open_above_standard(path, flags, where)
    if base >= 0:
        try:
            os.fchmod(descriptor, 0o600)  # the umask may have taken bits away
        except OSError:
            os.close(descriptor)
            raise
    return descriptor


def _open_above_standard(path: str, flags: int, where: int | None) -> int:
    descriptor = os.open(path, flags, 0o600, dir_fd=where)
    try:
        return _above_standard(descriptor)
    except OSError:
        os.close(descriptor)
        raise


def _above_standard(descriptor: int) -> int:
    """Move a descriptor away from 0, 1 and 2.

    Where a daemon closed its standard streams, the file would become one of them, and whatever
    somebody prints would land in it.
    """
    if descriptor > 2:
        return descriptor
    import fcntl

    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(descriptor)
    return moved


def append(descriptor: int, data: bytes) -> int:
    """Append in one system call; return how many bytes were taken.

    A crash leaves any part of them. Fewer bytes than given mean a full disk, a quota or a limit.
    """
    return os.write(descriptor, data)


def write_all(descriptor: int, data: bytes) -> None:
    """Write what may take several calls, to a file that nobody reads before it is synced."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def read_anew(descriptor: int) -> None:
    """Have what was synced be read from the disk again, where the system can be asked for that."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def cut(descriptor: int, size: int) -> None:
    """Take back what could not be appended, or not be made durable, and was never acknowledged.

    What is appended next writes the same pages anew, so an earlier failed sync of them is no
    matter. A crash leaves any part of what was to be cut.
    """
    os.ftruncate(descriptor, size)


def sync(descriptor: int) -> None:
    """Make what was appended durable; afterwards a crash leaves all of it.

    After an error this file must never be synced again: the kernel reports it once and marks the
    pages clean, and a second sync would succeed with nothing stored (Rebello et al., USENIX ATC
    2020; PostgreSQL's fsync change of 2018).
    """
    if _F_FULLFSYNC is not None:
        import fcntl

        fcntl.fcntl(descriptor, _F_FULLFSYNC)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def sync_new_file(descriptor: int, base: int) -> None:
    """Make a new file durable: its content, its inode, and its name in the directory."""
    if _F_FULLFSYNC is not None:
        sync(descriptor)
    else:
        os.fsync(descriptor)
    sync_directory(base)


def sync_directory(base: int) -> None:
    """Make the names in a directory durable; on Windows the file system does it by itself."""
    if base >= 0:
        os.fsync(base)


def remove(directory: str, base: int, name: str) -> None:
    """Remove a file that could not take its first line."""
    if base < 0:
        os.unlink(os.path.join(directory, name))
    else:
        os.unlink(name, dir_fd=base)


def close(descriptor: int) -> None:
    """Close a descriptor; -1 is none."""
    if descriptor >= 0:
        os.close(descriptor)


def is_world_writable(mode: int) -> bool:
    """Tell whether anybody may write, going by a mode of `stat`."""
    return os.name == "posix" and bool(mode & stat.S_IWOTH)
