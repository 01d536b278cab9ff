"""The demonstration: real entries in a real file, a full disk, and what a caller sees."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import orjson
import structlog

from structlog_audit.context import audit_context
from structlog_audit.entry import Receipt
from structlog_audit.exceptions import AuditWriteError
from structlog_audit.handler import AuditHandler
from structlog_audit.logger import get_logger
from structlog_audit.processors import Redact
from structlog_audit.settings import audit_processors
from structlog_audit.sinks.file import FileSink

if TYPE_CHECKING:
    from rich.console import Console

QUOTA = 200
"""Bytes a file may have while the disk is "full"; less than the first line of a session."""


def run_demo(console: Console, directory: str | None) -> None:
    """Show what the library does.

    Args:
        console: where to print.
        directory: where to write and keep the files; None for a temporary one.
    """
    for name in [name for name in os.environ if name.startswith(("AUDIT_LOG_", "AUDIT_SERVER_"))]:
        console.print(f"(the demonstration has a target of its own and ignores {name})")
        del os.environ[name]
    where = tempfile.mkdtemp(prefix="structlog-audit-demo-") if directory is None else directory
    handler = AuditHandler(FileSink(where))
    try:
        _Demo(console, where, handler).run()
    finally:
        handler.close()
        if directory is None:
            shutil.rmtree(where)
    console.print("The directory was temporary and is removed." if directory is None
                  else f"The files are kept in {where}.")  # fmt: skip


class _Demo:
    def __init__(self, console: Console, directory: str, handler: AuditHandler) -> None:
        self._console = console
        self._directory = directory
        self._handler = handler
        self._receipts: list[Receipt] = []
        self._invoices = {"inv_41", "inv_42", "inv_43"}
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                Redact(),
                *audit_processors(app="billing", handler=handler),
                structlog.processors.add_log_level,
                structlog.dev.ConsoleRenderer(),
            ]
        )
        self._audit_log = get_logger()

    def run(self) -> None:
        with audit_context(
            user_id="2780", company_id="2350", client_ip="87.116.137.97", type="CLI"
        ):
            self._record()
            self._fill_disk()
            self._recover()
        self._handler.close()
        self._check()

    def _record(self) -> None:
        self._say("1. An operation: its Begin is on disk before the invoice is deleted.")
        with self._audit_log.operation(action="InvoiceDelete", invoiceId="inv_41") as operation:
            self._invoices.remove("inv_41")
            operation.data["rows"] = 1
        self._keep(operation.receipt)
        self._say("2. A refused operation: the attempt is on record, and so is its Fail.")
        with self._audit_log.operation(action="InvoiceDelete", invoiceId="inv_99") as operation:
            operation.fail("the user may not delete this invoice")
        self._keep(operation.receipt)
        self._say("3. A one-off entry; what must not be logged is redacted.")
        self._keep(self._audit_log.info(action="Login", method="password", password="hunter2"))  # noqa: S106
        self._show_file()

    def _fill_disk(self) -> None:
        self._say(f"4. The disk fills up (from here on, no file may exceed {QUOTA} bytes).")
        try:
            with _full_disk():
                self._delete("inv_42")
        except AuditWriteError as error:
            self._print(f"   the caller got {type(error).__name__}: {error}")
        kept = "is still there" if "inv_42" in self._invoices else "is GONE"
        self._print(f"   the deletion did not happen: inv_42 {kept}")

    def _recover(self) -> None:
        self._say("5. There is room again: the same call goes through, in a new session.")
        self._delete("inv_42")
        self._say("   The first line of the new session tells what happened:")
        self._show(f"   {self._lines()[0].decode()}")

    def _delete(self, invoice: str) -> None:
        self._keep(self._audit_log.info(action="InvoiceDelete", data={"invoiceId": invoice}))
        self._invoices.remove(invoice)

    def _check(self) -> None:
        self._say("6. Was anything lost? Each receipt carries the SHA-256 of its line.")
        hashes = set()
        for name in sorted(os.listdir(self._directory)):
            with open(os.path.join(self._directory, name), "rb") as file:
                hashes |= {hashlib.sha256(line.rstrip(b"\n")).hexdigest() for line in file}
        found = [receipt for receipt in self._receipts if receipt.hash in hashes]
        self._print(f"   {len(found)} of {len(self._receipts)} receipts have their line on disk.")

    def _keep(self, receipt: Receipt | None) -> None:
        assert receipt is not None
        self._receipts.append(receipt)
        self._print(f"   receipt: session {receipt.session}, sequence {receipt.sequence}, "
                    f"hash {receipt.hash[:16]}…")  # fmt: skip

    def _lines(self) -> list[bytes]:
        """Return the lines of the session's file."""
        with open(self._path(), "rb") as file:
            return file.read().split(b"\n")[:-1]

    def _path(self) -> str:
        sink = self._handler.sink
        assert isinstance(sink, FileSink)
        assert sink.path is not None
        return sink.path

    def _show_file(self) -> None:
        """Show the lines of the session's file in short, and the last as it stands there."""
        raw = self._lines()
        self._show(f"   {self._path()}")
        for line in raw:
            entry = orjson.loads(line)
            data = orjson.dumps(entry["data"]).decode()
            row = f"   {entry['sequence']:>4}  {entry['event']:<9} {entry['action']:<14} {data}"
            fits = not self._console.is_terminal or len(row) <= self._console.width
            self._show(row if fits else f"{row[: self._console.width - 1]}…")
        self._print("   the last of these lines, as it stands there:")
        self._show(f"   {raw[-1].decode()}")

    def _say(self, text: str) -> None:
        self._console.print(text, style="bold", markup=False)

    def _print(self, text: str) -> None:
        """Print words, on a terminal wrapped to its width."""
        if self._console.is_terminal:
            text = textwrap.fill(
                text, self._console.width - 1, subsequent_indent="   ",
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
        self._show(text)

    def _show(self, text: str) -> None:
        """Print text as it is: a line from a file can be copied in one piece."""
        self._console.print(text, markup=False, soft_wrap=True)


@contextmanager
def _full_disk() -> Iterator[None]:
    """Let every write beyond a quota fail, as on a full disk; needs no privileges."""
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (QUOTA, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
