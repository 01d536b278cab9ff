"""Where a server is and how it is talked to: what is wrong with it is said when it is given."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from structlog_audit.exceptions import AuditConfigurationError

_OURS = frozenset({"connection", "content-encoding", "content-length", "expect", "host",
                   "idempotency-key", "transfer-encoding", "upgrade"})  # fmt: skip


def checked_url(url: str, *, allow_insecure: bool) -> str:
    parts = _parted(url)
    if parts.username is not None or parts.fragment or "apikey" in parts.query.lower():
        raise AuditConfigurationError(
            "the URL of an audit server carries a key or a password, which would end up in logs",
            hint="give it as api_key=, AUDIT_SERVER_API_KEY or AUDIT_SERVER_API_KEY_FILE",
        )
    if parts.scheme == "http" and not allow_insecure and not _is_this_machine(parts.hostname or ""):
        raise AuditConfigurationError(
            f"{shown(url)} is not encrypted: whoever is in between reads and changes entries",
            hint="use https; where that cannot be had, allow_insecure=True or "
            "AUDIT_SERVER_ALLOW_INSECURE=1 accepts it",
        )
    return url


def _parted(url: str) -> SplitResult:
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.port != 0
        if usable and _is_host(parts.hostname or "") and not re.search(r"[\s\x00-\x1f]", url):
            return parts
    raise AuditConfigurationError(
        "the URL of an audit server looks like https://logs.example.com or "
        "https://logs.example.com:8443/seq",
        hint="a name with other letters than those of English is written as xn--…",
    )


def _is_host(host: str) -> bool:
    if ":" in host:
        return bool(ipaddress.IPv6Address(host.partition("%")[0]))
    return re.fullmatch(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?",
                        host) is not None  # fmt: skip


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown(url: str) -> str:
    """Return a URL without its query, which may hold what is nobody's business."""
    return url.partition("?")[0]


def checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(headers, Mapping):
        raise AuditConfigurationError("headers is a mapping of names and texts")
    for name, value in headers.items():
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name)
            or not isinstance(value, str)
        ):
            raise AuditConfigurationError("a header is a name and a text")
        if name.lower() in _OURS:
            raise AuditConfigurationError(
                f"the header {name} is not yours to give: it is made here"
            )
        if not re.fullmatch(r"[\x20-\x7e]*", value):
            raise AuditConfigurationError(f"the header {name} has characters that none may have")
    return dict(headers)


def check_certificates(files: Mapping[str, str | None]) -> None:
    """Read them now: a mistake in them would otherwise look like one of the server's."""
    if files["client_key"] is not None and files["client_cert"] is None:
        raise AuditConfigurationError("client_key is the key of a client_cert, and none is given")
    ca, certificate = files["ca"], files["client_cert"]
    if ca is None and certificate is None:
        return
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca is not None:
            context.load_verify_locations(ca)
    except (ssl.SSLError, OSError) as error:
        raise AuditConfigurationError(
            f"ca: {ca} has no certificate that can be read", hint="it must be in PEM format"
        ) from error
    try:
        if certificate is not None:
            context.load_cert_chain(certificate, files["client_key"], password="")
    except (ssl.SSLError, OSError) as error:
        raise AuditConfigurationError(
            f"client_cert: {certificate} and its key do not go together, or cannot be read",
            hint="both in PEM format; a key in a file of its own is named by client_key= or "
            "AUDIT_SERVER_CLIENT_KEY, and must not have a password",
        ) from error


def checked_file(name: str, path: str | os.PathLike[str]) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise AuditConfigurationError(f"{name} names a file, and {path!r} is no path")
    text = os.fspath(path)
    if not os.access(text, os.R_OK) or os.path.isdir(text):
        raise AuditConfigurationError(f"{name}: {text} is no file that can be read")
    return text
