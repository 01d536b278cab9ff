"""What files are called: session files, the journal beside them, and compressed copies of both."""

from __future__ import annotations

import re

COPIES = (".gz", ".zst")
"""Behind the name of a compressed copy."""
_PREFIX = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_COPY = r"(?P<copy>\.gz|\.zst)?"
PREFIX = re.compile(_PREFIX)
"""Begin of a name: letters, digits, dot, dash, underscore."""
SESSION_FILE = re.compile(
    rf"(?P<plain>(?P<prefix>{_PREFIX})-(?P<day>[0-9]{{8}})-(?P<session>[a-z0-9]{{20}})\.ndjson)"
    + _COPY
)
"""Name of a session file: its `prefix`, `day` and `session`; its `plain` name without `copy`."""
JOURNAL = re.compile(rf"(?P<prefix>{_PREFIX})-journal\.ndjson" + _COPY)
"""Name of a journal."""


def session_name(prefix: str, day: str, session: str) -> str:
    """Return the name of a session's file.

    Args:
        prefix: begin of the name.
        day: when the session began, UTC, as `YYYYMMDD`.
        session: its identity.
    """
    return f"{prefix}-{day}-{session}.ndjson"


def journal_name(prefix: str) -> str:
    """Return the name of the journal of the session files with that prefix."""
    return f"{prefix}-journal.ndjson"


def session_names(prefix: str) -> re.Pattern[str]:
    """Return a pattern for the names of session files with that prefix; group 1 is the session."""
    return re.compile(rf"{re.escape(prefix)}-[0-9]{{8}}-([a-z0-9]{{20}})\.ndjson")


def is_file_of(session: str, file: str, prefix: str | None = None) -> bool:
    """Tell whether a name is that of a session's file.

    A line of a journal that says otherwise is none of ours: it may be anybody's.

    Args:
        session: the session.
        file: the name, uncompressed.
        prefix: begin of the name; None for any.
    """
    named = SESSION_FILE.fullmatch(file)
    if named is None or named["copy"] is not None:
        return False
    return named["session"] == session and prefix in (None, named["prefix"])
