"""Who is the client of a web request, by address.

Any client can send any header, so a header proves nothing by itself. The rules, in this order:

1. The peer of the connection is the client, unless the peer is a proxy that the operator trusts.
2. A chain of addresses is read from the right, where the nearest proxy wrote: addresses of trusted
   proxies are skipped, and the first other one is the client. All trusted: the left-most.
3. An element that is no address ends the walk, since nobody trusted vouches for what is left of it.
   The last address before it is the answer: in the end the peer.
4. `X-Forwarded-For` and `Forwarded` are walked apart. Where they disagree the peer is the answer: a
   proxy writes one of them and hands on the other as the client sent it, and we cannot know which.
   `header=` names the one to read.
5. The chain is recorded beside, whatever was believed of it.

What comes out as an address was read and written anew by `ipaddress`; no text of a client gets
through. Nothing that a client sends raises.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final, Literal

from structlog_audit.exceptions import AuditConfigurationError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_HOPS: Final = 16
"""Elements of a chain that are read, from the right."""
MAX_CHAIN: Final = 512
"""Characters of each chain that are recorded, from the right: the left end is anybody's."""
MIN_KEY: Final = 16
"""Bytes of a key; all IPv4 addresses are tried in no time, so only the key hides them."""

_LONGEST_ELEMENT = 512  # beside the address, an element of Forwarded holds a host name
_TEXT_READ = 16 * 1024  # Node refuses requests whose headers are longer

_XFF = "x-forwarded-for"
_FORWARDED = "forwarded"
_CHAINS = (_XFF, _FORWARDED)

# https://github.com/pbojinov/request-ip 3.3.0, src/index.js. The build on npm is older than its
# source, and does not read do-connecting-ip (issue 90 there).
_REQUEST_IP = (
    "x-client-ip",
    _XFF,
    "cf-connecting-ip",
    "do-connecting-ip",
    "fastly-client-ip",
    "true-client-ip",
    "x-real-ip",
    "x-cluster-client-ip",
    "x-forwarded",
    "forwarded-for",
    _FORWARDED,
    "x-appengine-user-ip",
)

_PORT = r"(?::(?:[0-9]{1,5}|_[A-Za-z0-9._-]+))?"
_ZONE = r"(?:%[A-Za-z0-9._~-]+)?"
_V6 = r"([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)"
_WRITTEN = re.compile(rf"([0-9.]+){_PORT}|\[{_V6}{_ZONE}\]{_PORT}|{_V6}{_ZONE}")

# RFC 7239, section 4. Proxies also send ports and brackets without quotes: let them, but no quote
# and no backslash, so that a comma within quotes cannot be mistaken for the start of an element.
_PAIR = re.compile(
    r"""[ \t]*(?:([!#$%&'*+.^_`|~0-9A-Za-z-]+)=([^\s",;\\]+|"(?:[^"\\]|\\.)*"))?[ \t]*(?:;|\Z)"""
)
# at most an IPv6 address that ends in a dotted IPv4 address
_BARE = re.compile(r"[0-9A-Fa-f:.]{2,45}")
_HEADER_NAME = re.compile(r"[a-z0-9-]+")
_NOT_PRINTABLE = re.compile(r"[^ -~]")


@dataclass(frozen=True, slots=True)
class Client:
    """The addresses of a request, as the context of its entries takes them.

    Attributes:
        client_ip: address of the client, as far as it can be trusted, or None.
        remote_address: address of the peer of the connection, or None: a Unix socket has none.
        forwarded_for: what the headers `X-Forwarded-For` and `Forwarded` said, or None. Any client
            can write this. Repeated headers are joined by `, `, and so are the two. Of each, the
            last `MAX_CHAIN` characters are kept, behind `…` when there were more; what is not
            printable ASCII is written as `\\u` and its code. With an anonymisation, only the
            addresses of the last `MAX_HOPS` elements are kept, with `?` for any other element.
    """

    client_ip: str | None
    remote_address: str | None
    forwarded_for: str | None


class ClientAddress:
    """Finds the client of a request; called with the peer's address and the request's headers.

    By default that is the peer, and headers are believed only if the peer is a trusted proxy. Where
    a server has already put the client's address in the place of the peer's (uvicorn's
    `--proxy-headers`, werkzeug's `ProxyFix`), leave `trusted_proxies` empty.

    `source="request-ip"` finds what the npm package request-ip 3.3.0 finds: the first address in a
    fixed list of headers, whoever sent it. **Any client can choose that address.** It is for logs
    that have to agree with those of an application on Node, and proves nothing. There the address
    is what was sent, not normalised; that of the peer comes last, as the server gave it.

    Args:
        trusted_proxies: networks in CIDR notation, or how many proxies stand before the
            application, the peer included. Count them where the peer has no address: behind a Unix
            socket. A count is right only if no request can go round one of the proxies. A chain
            shorter than that gives its left-most address.
        header: the header in which a trusted peer puts the client: `CF-Connecting-IP`, `X-Real-IP`
            and so on; no other is read then. Sent twice or unreadable, it does not count, and the
            peer is the answer. `X-Forwarded-For` and `Forwarded` are read as chains. The proxy must
            overwrite what a client sends under that name.
        source: `peer`, or `request-ip`.
        anonymize: `truncate` keeps the first 24 bits of an IPv4 and 48 of an IPv6 address; `omit`
            records no address at all; a key (bytes) replaces an address by `hmac:` and the first 16
            hex digits of its HMAC-SHA-256, the same for the same address. It applies to all three
            fields.

    Raises:
        AuditConfigurationError: an option, or a combination of them, makes no sense.
    """

    __slots__ = ("_count", "_header", "_hide", "_mode", "_networks", "_request_ip", "_wanted")

    def __init__(
        self,
        *,
        trusted_proxies: Sequence[str] | int = (),
        header: str | None = None,
        source: Literal["peer", "request-ip"] = "peer",
        anonymize: Literal["truncate", "omit"] | bytes | None = None,
    ) -> None:
        self._count, self._networks = _proxies(trusted_proxies)
        self._header = _header_name(header)
        self._request_ip = _is_request_ip(source)
        self._hide, self._mode = _anonymizer(anonymize)
        trusting = bool(self._count or self._networks)
        if self._request_ip and (trusting or header is not None):
            raise AuditConfigurationError(
                "source='request-ip' believes every client: trusted_proxies= and header= are void",
                hint="leave out source= to have only trusted proxies believed",
            )
        if self._header is not None and not trusting:
            raise AuditConfigurationError(
                f"header={header!r} counts only from a trusted peer, and none is named",
                hint="name the networks of your proxies, or their number, in trusted_proxies=",
            )
        named = () if self._header is None else (self._header,)
        self._wanted = frozenset((*_CHAINS, *named, *(_REQUEST_IP if self._request_ip else ())))

    def __repr__(self) -> str:
        trusted = self._count or tuple(str(network) for network in self._networks)
        source = "request-ip" if self._request_ip else "peer"
        return (
            f"ClientAddress(trusted_proxies={trusted!r}, header={self._header!r}, "
            f"source={source!r}, anonymize={self._mode!r})"
        )

    def __call__(self, peer: str | None, headers: Iterable[tuple[str, str]]) -> Client:
        """Return the addresses of a request.

        Args:
            peer: the address of the connection's peer as the server gives it; None, or a text that
                is no address, for a Unix socket and in tests.
            headers: names in lower case and values, in order, repeated ones included.

        Returns:
            Addresses that are valid, or None.
        """
        if self._mode == "omit":
            return Client(None, None, None)
        found = self._found(headers)
        address, text = _known(peer or "")
        if not found and self._hide is None and not self._request_ip:
            return Client(text, text, None)
        return Client(
            self._as_request_ip(peer or "", found)
            if self._request_ip
            else self._spelled(self._client(address, found)),
            self._spelled(address),
            self._recorded(found),
        )

    def _found(self, headers: Iterable[tuple[str, str]]) -> dict[str, str]:
        wanted = self._wanted
        found: dict[str, str] = {}
        for name, value in headers:
            if name in wanted:
                found[name] = f"{found[name]}, {value}" if name in found else value
        return found

    def _client(self, peer: Address | None, found: dict[str, str]) -> Address | None:
        if not self._trusts(peer, 0):
            return peer
        if self._header is not None and self._header not in _CHAINS:
            return _address(found.get(self._header, "")) or peer
        named = (self._header,) if self._header is not None else _CHAINS
        chains = [(name, chain) for name, chain in _chains(found) if name in named]
        walked = {self._walk(peer, name, chain) for name, chain in chains}
        return walked.pop() if len(walked) == 1 else peer

    def _walk(self, peer: Address | None, name: str, chain: str) -> Address | None:
        known = peer
        for place, hop in enumerate(_hops(name, chain), start=1):
            if hop is None:
                break
            known = hop
            if not self._trusts(hop, place):
                break
        return known

    def _trusts(self, address: Address | None, place: int) -> bool:
        if self._count:
            return place < self._count
        return address is not None and any(address in network for network in self._networks)

    def _spelled(self, address: Address | None) -> str | None:
        if address is None:
            return None
        return str(address) if self._hide is None else self._hide(address)

    def _recorded(self, found: dict[str, str]) -> str | None:
        chains = _chains(found)
        if not chains:
            return None
        if self._hide is None:
            return ", ".join(_raw(chain) for _, chain in chains)
        return ", ".join(self._hidden(name, chain) for name, chain in chains)

    def _hidden(self, name: str, chain: str) -> str:
        more = "…, " if chain.count(",") >= MAX_HOPS else ""
        hops = [self._spelled(hop) or "?" for hop in _hops(name, chain)]
        return more + ", ".join(reversed(hops))

    def _as_request_ip(self, peer: str, found: dict[str, str]) -> str | None:
        chosen = next(filter(_is_bare, _request_ip_order(peer, found)), None)
        if chosen is None or self._hide is None:
            return chosen
        return self._spelled(_address(chosen))


def _address(text: str) -> Address | None:
    """Return the address in a text, without its port, zone, brackets and quotes."""
    if len(text) > _LONGEST_ELEMENT:
        return None
    text = text.strip(" \t")
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    match = _WRITTEN.fullmatch(text)
    if match is None:
        return None
    try:
        address = ip_address(next(filter(None, match.groups())))
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


@lru_cache(maxsize=1024)
def _known(peer: str) -> tuple[Address | None, str | None]:
    address = _address(peer)
    return address, None if address is None else str(address)


def _chains(found: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, found[name]) for name in _CHAINS if found.get(name, "").strip(" \t,")]


def _hops(name: str, chain: str) -> Iterator[Address | None]:
    """Yield the addresses of a chain from the right, and None for what is none."""
    # also where a comma stands within quotes: a quoted string may hold what a client sent as Host,
    # and read from the left, an open quote in the client's part would swallow the proxy's
    for element in reversed(chain.rsplit(",", MAX_HOPS)[-MAX_HOPS:]):
        yield _address(element if name == _XFF else _for(element))


def _for(element: str) -> str:
    """Return the value of `for` in an element of `Forwarded`, or an empty text."""
    if len(element) > _LONGEST_ELEMENT:
        return ""
    values: list[str] = []
    position = 0
    while position < len(element):
        match = _PAIR.match(element, position)
        if match is None:
            return ""
        if (match[1] or "").lower() == "for":
            values.append(match[2])
        position = match.end()
    return values[0] if len(values) == 1 else ""


def _raw(chain: str) -> str:
    text = _NOT_PRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", chain[-MAX_CHAIN - 1 :])
    return text if len(text) <= MAX_CHAIN else "…" + text[1 - MAX_CHAIN :]


def _request_ip_order(peer: str, found: dict[str, str]) -> Iterator[str]:
    for name in _REQUEST_IP:
        if name == _XFF:
            yield from map(_without_port, found.get(name, "")[:_TEXT_READ].split(","))
        else:
            yield found.get(name, "")
    yield peer


def _without_port(piece: str) -> str:
    piece = piece.strip(" \t\n\v\f\r\xa0\ufeff")  # of what JavaScript trims, what headers can hold
    return piece.partition(":")[0] if piece.count(":") == 1 else piece


def _is_bare(text: str) -> bool:
    """Say whether request-ip takes a text for an address: no port, no zone, no brackets."""
    if _BARE.fullmatch(text) is None:
        return False
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _truncated(address: Address) -> str:
    bits = 24
    if isinstance(address, IPv6Address):
        # 6to4 (RFC 3056) holds an IPv4 address in the 32 bits after the first 16
        bits = 48 if address.sixtofour is None else 40
    return str(ip_network((address, bits), strict=False).network_address)


def _token(key: bytes, address: Address) -> str:
    return "hmac:" + hmac.digest(key, str(address).encode(), "sha256").hex()[:16]


def _proxies(trusted: Sequence[str] | int) -> tuple[int, tuple[Network, ...]]:
    if isinstance(trusted, int) and not isinstance(trusted, bool):
        if not 0 <= trusted <= MAX_HOPS:
            raise AuditConfigurationError(
                f"trusted_proxies={trusted} is no number of proxies",
                hint=f"count the proxies before the application: 1 to {MAX_HOPS}, or 0 for none",
            )
        return trusted, ()
    if not isinstance(trusted, Sequence) or isinstance(trusted, (str, bytes)):
        raise AuditConfigurationError(
            f"trusted_proxies={trusted!r} is neither a list of networks nor a number",
            hint="for example trusted_proxies=['10.0.0.0/8'] or trusted_proxies=1",
        )
    return 0, tuple(_network(text) for text in trusted)


def _network(text: str) -> Network:
    try:
        if not isinstance(text, str):  # ipaddress would take a number for an address
            raise ValueError(f"{text!r} is no text")
        network = ip_network(text)
    except ValueError as error:
        raise AuditConfigurationError(
            f"trusted_proxies: {error}",
            hint="name the networks of your proxies in CIDR notation, for example 10.0.0.0/8",
        ) from None
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is not None and network.prefixlen >= 96:
        network = IPv4Network((mapped, network.prefixlen - 96))
    if network.prefixlen == 0:
        raise AuditConfigurationError(
            f"trusted_proxies: {text} trusts every client, and any of them can forge its address",
            hint="name the networks of your proxies, or their number: trusted_proxies=1",
        )
    return network


def _header_name(header: str | None) -> str | None:
    if header is None:
        return None
    if not isinstance(header, str) or not _HEADER_NAME.fullmatch(header.lower()):
        raise AuditConfigurationError(
            f"header={header!r} is no name of a header",
            hint="for example header='CF-Connecting-IP'",
        )
    return header.lower()


def _is_request_ip(source: str) -> bool:
    if source not in ("peer", "request-ip"):
        raise AuditConfigurationError(
            f"source={source!r} is unknown", hint="it is 'peer' or 'request-ip'"
        )
    return source == "request-ip"


def _anonymizer(
    anonymize: str | bytes | None,
) -> tuple[Callable[[Address], str] | None, str | None]:
    if isinstance(anonymize, bytes):
        if len(anonymize) < MIN_KEY:
            raise AuditConfigurationError(
                f"the key given as anonymize= has {len(anonymize)} bytes: it can be guessed",
                hint=f"give at least {MIN_KEY} random bytes, for example secrets.token_bytes(32)",
            )
        return partial(_token, anonymize), "hmac"
    if anonymize == "truncate":
        return _truncated, "truncate"
    if anonymize is None or anonymize == "omit":
        return None, anonymize
    # not its value: it may be a key that is no bytes
    raise AuditConfigurationError(
        f"anonymize= is an unknown {type(anonymize).__name__}",
        hint="it is 'truncate', 'omit', or a key as bytes",
    )
