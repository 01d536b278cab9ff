"""Certificates, good and bad, made anew for each run."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import trustme

from servers.seq import tls_context


@dataclass(frozen=True)
class Pair:
    """The files of a certificate and of its private key."""

    cert: Path
    private: Path

    def server_context(self, client_ca: Path | None = None) -> ssl.SSLContext:
        """Return a context for a server that shows this, and wants a certificate of that CA."""
        return tls_context(self.cert, self.private, client_ca)


@dataclass(frozen=True)
class Certificates:
    """What `make_certificates` made; all are of `ca`, but `foreign` and its `foreign_ca`."""

    ca: Path
    foreign_ca: Path
    good: Pair
    wrong_name: Pair
    expired: Pair
    foreign: Pair
    client: Pair
    foreign_client: Pair


def make_certificates(directory: Path) -> Certificates:
    """Write them into the directory, which must be there."""
    ca, other = trustme.CA(), trustme.CA()
    name = "client@audit.example"
    here = ("127.0.0.1", "localhost")
    past = datetime(2020, 1, 1, tzinfo=timezone.utc)
    return Certificates(
        ca=_write_ca(directory / "ca.pem", ca),
        foreign_ca=_write_ca(directory / "foreign-ca.pem", other),
        good=_write(directory / "good", ca.issue_cert(*here)),
        wrong_name=_write(directory / "wrong-name", ca.issue_cert("audit.example")),
        expired=_write(directory / "expired", ca.issue_cert(*here, not_after=past)),
        foreign=_write(directory / "foreign", other.issue_cert(*here)),
        client=_write(directory / "client", ca.issue_cert(name)),
        foreign_client=_write(directory / "foreign-client", other.issue_cert(name)),
    )


def _write_ca(path: Path, ca: trustme.CA) -> Path:
    ca.cert_pem.write_to_path(path)
    return path


def _write(stem: Path, leaf: trustme.LeafCert) -> Pair:
    pair = Pair(stem.with_suffix(".pem"), stem.with_suffix(".key"))
    pair.cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    pair.private.write_bytes(leaf.private_key_pem.bytes())
    return pair
