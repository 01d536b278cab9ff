"""Acts on a log that are entries of the log themselves: exports, holds, deletions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from structlog_audit.entry import Receipt
from structlog_audit.handler import AuditHandler
from structlog_audit.note import VerifierKey
from structlog_audit.settings import Settings
from structlog_audit.sinks.file import FileSink


class Recorder:
    """Records acts in the log that they concern.

    Attributes:
        keys: the public keys of those that sign there, as far as the environment has them.
    """

    def __init__(self, handler: AuditHandler, keys: tuple[VerifierKey, ...]) -> None:
        self._handler = handler
        self.keys = keys

    def record(self, entry: Mapping[str, object]) -> Receipt:
        """Record an act before it happens.

        Raises:
            AuditError: it is not durable; the act must not happen.
        """
        return self._handler.record(entry)


@contextmanager
def recorder(directory: str, prefix: str) -> Iterator[Recorder]:
    """Record in a directory, as the environment says if it names that one.

    Args:
        directory: the log.
        prefix: begin of the file names.

    Raises:
        AuditConfigurationError: the environment or the directory is unusable.
    """
    settings = Settings.from_environ()
    signer = settings.signer()
    named = settings.directory is not None and os.path.isdir(directory)
    if (
        named
        and os.path.samefile(settings.directory or "", directory)
        and settings.prefix == prefix
    ):
        handler = settings.handler()
    else:
        sink = FileSink(directory, prefix, signer=signer, allow_unsafe_directory=True)
        handler = AuditHandler(sink, app=settings.app)
    try:
        yield Recorder(handler, tuple(key.verifier for key in signer.keys) if signer else ())
    finally:
        handler.close()
