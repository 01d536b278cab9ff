"""Acts on a log that are entries of the log itself: exports, holds, deletions.

1. They are recorded as the service records there: by the same user, signed if the log is signed,
   and in a directory that is not open to all. Where that cannot be, the act is refused.
2. The entry goes where the service's entries go if the environment names this very log, perhaps
   to a server as well; otherwise to the directory.
3. It is durable before the act happens.
4. Where the act is lines of the journal, the entry's session ends behind them: who cuts these off
   leaves a session without an end, which verification sees.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator, Mapping, Sequence

from structlog_audit.entry import Receipt
from structlog_audit.evidence import Evidence, read_journal
from structlog_audit.exceptions import (
    AuditConfigurationError,
    AuditError,
    SinkError,
    from_oserror,
)
from structlog_audit.handler import AuditHandler
from structlog_audit.names import journal_name
from structlog_audit.note import VerifierKey
from structlog_audit.settings import Settings
from structlog_audit.sinks import _durable
from structlog_audit.sinks.file import FileSink
from structlog_audit.values import well_formed

_log = logging.getLogger("structlog_audit")
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_OF_A_COPY = (
    "if this is a copy, do it where the log is written: search, show, report and verify only read"
)


class Recorder:
    """Records acts on a log in the log itself.

    Args:
        directory: the log.
        settings: who signs, what is accepted of a directory, and where its entries go.
        prefix: begin of the file names; that of the settings if None.
        keys: public keys that have signed the journal; those of the signer are known.

    Attributes:
        directory: the log, as an absolute path.
        prefix: begin of the file names.
        journal: path of its journal.
        signer: signs what is written; None without a key.
        keys: all public keys that are known.

    Raises:
        AuditConfigurationError: the directory has no usable name, or the signer's key is unusable.
    """

    def __init__(
        self,
        directory: str,
        settings: Settings,
        *,
        prefix: str | None = None,
        keys: Sequence[VerifierKey] = (),
    ) -> None:
        self._settings = settings
        self.signer = settings.signer()
        sink = self._sink(directory, settings.prefix if prefix is None else prefix)
        self.directory, self.prefix = sink.directory, sink.prefix
        self.journal = os.path.join(self.directory, journal_name(self.prefix))
        own = [] if self.signer is None else [key.verifier for key in self.signer.keys]
        named = {(key.name, key.public) for key in keys}  # they may know until when one is good
        self.keys = (*keys, *(key for key in own if (key.name, key.public) not in named))

    def _sink(self, directory: str, prefix: str) -> FileSink:
        return FileSink(
            directory,
            prefix,
            allow_unsafe_directory=self._settings.allow_unsafe_dir,
            signer=self.signer,
        )

    def check(self) -> None:
        """Make sure, as far as can be known, that an act could be recorded. Nothing is written.

        Raises:
            AuditConfigurationError: it could not, or not as it should be.
        """
        self.check_place()
        if os.path.lexists(self.journal):
            self.check_signer(read_journal(self.journal, self.prefix, self.keys, ()))
        try:
            self._sink(self.directory, self.prefix).check()
        except SinkError as error:
            raise AuditConfigurationError(
                f"this has to be an entry of the log, and {error.reason}",
                hint=_OF_A_COPY if error.errno in _READ_ONLY else error.hint,
            ) from error
        self._handler().close()  # there may be a server, which may be away

    def check_place(self) -> None:
        """Make sure that we are the user who writes there, and that not everybody can.

        Raises:
            AuditConfigurationError: we are another one, everybody can, or it is not there.
        """
        if not os.path.isdir(self.directory):
            raise AuditConfigurationError(f"there is no directory {self.directory}")
        try:
            path, owner = self._writer()
            mode = os.stat(self.directory).st_mode
        except OSError as error:
            raise from_oserror(f"cannot look at {self.directory}", error) from error
        if os.name == "posix" and owner != os.geteuid():
            raise AuditConfigurationError(
                f"{path} belongs to user {owner}, and we are user {os.geteuid()}",
                hint="run it as that user, who must be able to read what is written there "
                f"(sudo -u '#{owner}' structlog-audit …); {_OF_A_COPY}",
            )
        if _durable.is_world_writable(mode) and not self._settings.allow_unsafe_dir:
            raise AuditConfigurationError(
                f"the directory {self.directory} can be written to by anybody",
                hint="chmod o-w, or AUDIT_LOG_ALLOW_UNSAFE_DIR=1 accepts it",
            )

    def _writer(self) -> tuple[str, int]:
        """Return who writes there, and what shows it.

        It is the owner of the directory; but one of root's may be open to a group, and then it is
        the owner of the journal.
        """
        owner = os.stat(self.directory).st_uid
        if owner == 0 and os.path.lexists(self.journal):
            return self.journal, os.lstat(self.journal).st_uid
        return self.directory, owner

    def check_reader(self, evidence: Evidence) -> None:
        """Make sure that we can tell what a key of the log's has signed, if the log is signed.

        Args:
            evidence: what its journal says, read with our keys.

        Raises:
            AuditConfigurationError: none of them has signed it: anybody may have written what it
                says of holds.
        """
        if evidence.is_signed_by_others:
            raise AuditConfigurationError(
                f"the journal {self.journal} is signed, and no key that signed it is given",
                hint="--key FILE names the public key of the log, after a change of keys the "
                "earlier one as well; or set AUDIT_LOG_SIGNING_KEY_FILE as the service has it",
            )

    def check_signer(self, evidence: Evidence) -> None:
        """Make sure that what we write is signed by a key of the log's, if the log is signed.

        Args:
            evidence: what its journal says, read with our keys.

        Raises:
            AuditConfigurationError: it is signed, and we have no key, or another one; or we would
                be the first to sign it; or nobody can read it.
        """
        if not evidence.readable:
            raise AuditConfigurationError(
                f"the journal {self.journal} cannot be read, so nobody knows whether it is signed",
                hint="run structlog-audit verify on the directory",
            )
        if not evidence.is_signed:
            self._check_late_key(evidence)
            return
        if self.signer is None:
            raise AuditConfigurationError(
                f"the journal {self.journal} is signed, and no key is configured",
                hint="set AUDIT_LOG_SIGNING_KEY_FILE as the service has it: an export, a hold or a "
                f"tombstone that is not signed could be anybody's; {_OF_A_COPY}",
            )
        if evidence.is_signed_by_others:
            raise AuditConfigurationError(
                f"the journal {self.journal} is signed, and not by the key that is configured",
                hint="set AUDIT_LOG_SIGNING_KEY_FILE as the service has it; after a change of "
                "keys, --key names the earlier public key",
            )

    def _check_late_key(self, evidence: Evidence) -> None:
        """Our signature would be the first one, and vouch for all that stands there."""
        if self.signer is not None and evidence.unsigned_endings():
            raise AuditConfigurationError(
                f"nothing in the journal {self.journal} is signed, although sessions have ended "
                "and a key is configured: either the key is new, or the signatures were removed",
                hint="if it was signed before, keep it as it is for an investigation; if the key "
                "is new, let the service record with it first",
            )

    def record(self, entry: Mapping[str, object]) -> Receipt:
        """Record an act before it happens, in a session of its own.

        Raises:
            AuditError: it is not durable; the act must not happen.
        """
        handler = self._handler()
        try:
            return handler.record(entry)
        finally:
            handler.close()

    @contextlib.contextmanager
    def recording(self, entry: Mapping[str, object]) -> Iterator[Receipt]:
        """Record an act before it happens, in a session that ends when the act is done.

        A session that cannot be ended is logged: the act was done all the same, or failed by an
        error that tells more.

        Raises:
            AuditError: it is not durable; the act must not happen.
        """
        handler = self._handler()
        try:
            yield handler.record(entry)
        finally:
            try:
                handler.close()
            except AuditError as error:
                _log.error("the session of %s in %s could not be ended, and what was recorded "
                           "and done before stays: %s",
                           entry["action"], self.directory, error.reason)  # fmt: skip

    def _handler(self) -> AuditHandler:
        named = self._settings.directory or ""
        if (
            self.prefix == self._settings.prefix
            and os.path.isdir(named)
            and os.path.samefile(named, self.directory)
        ):
            return self._settings.handler()
        return AuditHandler(self._sink(self.directory, self.prefix), app=self._settings.app)


def user() -> str:
    """Return the name of the user whom the system takes us for, whatever the environment says."""
    if os.name != "posix":
        import getpass

        return well_formed(getpass.getuser())
    import pwd

    try:
        return well_formed(pwd.getpwuid(os.geteuid()).pw_name)
    except KeyError:
        return f"user {os.geteuid()}"
