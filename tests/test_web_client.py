"""Who is the client of a web request: whatever the headers claim, and whoever sent them."""

from __future__ import annotations

import ipaddress
import pickle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from structlog_audit import AuditConfigurationError, audit_context, audit_log
from structlog_audit.web._client import MAX_CHAIN, MAX_HOPS, Client, ClientAddress

PROXY = "10.0.0.1"
NETWORKS = ["10.0.0.0/8", "2001:db8:ffff::/48"]
KEY = b"a key that nobody knows, 32 byte"
behind_proxies = ClientAddress(trusted_proxies=NETWORKS)


def xff(*values: str) -> list[tuple[str, str]]:
    return [("x-forwarded-for", value) for value in values]


def forwarded(*values: str) -> list[tuple[str, str]]:
    return [("forwarded", value) for value in values]


# --- the peer


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7:4711", "192.0.2.7"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        (None, None),
        ("", None),
        ("/run/app.sock", None),
        ("unix:", None),
        ("testclient", None),
        ("127.0.0.01", None),
        ("192.0.2.7%eth0", None),
        ("192.0.2.7" + " " * 600 + "x", None),
        ("192.0.2.7\n", None),
        ("１９２.0.2.7", None),
    ],
)
def test_a_peer_is_an_address_or_nothing(peer: str | None, address: str | None) -> None:
    """Servers give zones, mapped addresses, names of test clients and nothing at all."""
    assert ClientAddress()(peer, []) == Client(address, address, None)


def test_a_client_that_forges_every_header_is_recorded_by_its_own_address() -> None:
    """By default no header is believed; the chain is recorded beside."""
    names = ["x-client-ip", "cf-connecting-ip", "true-client-ip", "x-real-ip", "x-forwarded"]
    headers = [*xff("6.6.6.6"), *((name, "6.6.6.6") for name in names)]

    assert ClientAddress()("192.0.2.7", headers) == Client("192.0.2.7", "192.0.2.7", "6.6.6.6")


def test_an_untrusted_peer_cannot_pass_itself_off_as_a_proxy() -> None:
    """Its chain is not walked, though it names trusted proxies."""
    headers = [*xff("6.6.6.6, 10.0.0.9"), ("cf-connecting-ip", "6.6.6.6")]

    assert behind_proxies("192.0.2.7", headers).client_ip == "192.0.2.7"
    cloudflare = ClientAddress(trusted_proxies=NETWORKS, header="CF-Connecting-IP")
    assert cloudflare("192.0.2.7", headers).client_ip == "192.0.2.7"


# --- chains


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        (xff("192.0.2.7"), "192.0.2.7"),
        (xff("6.6.6.6, 192.0.2.7"), "192.0.2.7"),
        (xff("6.6.6.6, 192.0.2.7, 10.0.0.3,10.0.0.2"), "192.0.2.7"),
        (xff("6.6.6.6", "192.0.2.7", "10.0.0.2"), "192.0.2.7"),
        (xff("10.0.0.4, 10.0.0.3"), "10.0.0.4"),
        (xff("192.0.2.7:5555"), "192.0.2.7"),
        (xff("[2001:db8::1]:443"), "2001:db8::1"),
        (xff('"[2001:db8::1]"'), "2001:db8::1"),
        (xff("fe80::1%25eth0"), "fe80::1"),
        (xff("::ffff:192.0.2.7"), "192.0.2.7"),
        (xff("6.6.6.6, 192.0.2.7, ::ffff:10.0.0.2"), "192.0.2.7"),
        (xff("6.6.6.6, 192.0.2.7, 2001:db8:ffff::2"), "192.0.2.7"),
        (xff("6.6.6.6, unknown"), PROXY),
        (xff("6.6.6.6, unknown, 10.0.0.2"), "10.0.0.2"),
        (xff("6.6.6.6, , 10.0.0.2"), "10.0.0.2"),
        (xff("6.6.6.6, 192.0.2.7x"), PROXY),
        (xff("6.6.6.6 192.0.2.7"), PROXY),
        (xff("192.0.2.7:999999"), PROXY),
        (xff(""), PROXY),
        (xff(" , "), PROXY),
        ([], PROXY),
        (forwarded("for=192.0.2.7"), "192.0.2.7"),
        (forwarded("for=6.6.6.6, For=192.0.2.7;proto=https; by=10.0.0.1"), "192.0.2.7"),
        (forwarded("for=6.6.6.6", "proto=http;for=192.0.2.7", "for=10.0.0.2"), "192.0.2.7"),
        (forwarded('for="192.0.2.7:4711"'), "192.0.2.7"),
        (forwarded("for=192.0.2.7:4711"), "192.0.2.7"),
        (forwarded('for="[2001:DB8::1]:443"'), "2001:db8::1"),
        (forwarded('for="[2001:db8::1]:_port"'), "2001:db8::1"),
        (forwarded("for=[2001:db8::1]"), "2001:db8::1"),
        (forwarded('for="[::ffff:192.0.2.7]"'), "192.0.2.7"),
        (forwarded("for=6.6.6.6, for=unknown"), PROXY),
        (forwarded("for=6.6.6.6, for=_hidden, for=10.0.0.2"), "10.0.0.2"),
        (forwarded("for=6.6.6.6, proto=https"), PROXY),
        (forwarded("for=6.6.6.6;for=192.0.2.7"), PROXY),
        (forwarded("for=6.6.6.6, for"), PROXY),
        (forwarded("for=6.6.6.6, 192.0.2.7"), PROXY),
        (forwarded("for=192.0.2.7;host=" + "a" * 512), PROXY),
    ],
)
def test_a_chain_is_read_from_the_right(headers: list[tuple[str, str]], client: str) -> None:
    """Trusted hops are skipped; what is no address ends the walk at the last one known."""
    assert behind_proxies(PROXY, headers).client_ip == client


@pytest.mark.parametrize(
    ("chain", "client"),
    [
        # the client sends an open quote: read from the left it would swallow the proxy's element
        ('for=6.6.6.6;a=", for=192.0.2.7', "192.0.2.7"),
        ('for=6.6.6.6;a=", for="[2001:db8::1]:443"', "2001:db8::1"),
        # the proxy quotes the Host that the client sent
        ('for=192.0.2.7;host="a, for=6.6.6.6"', PROXY),
        ('for=192.0.2.7;host="a, for=6.6.6.6";proto=https', PROXY),
        ('for=192.0.2.7;host="a, for=6.6.6.6;a=";by="[2001:db8::1]"', PROXY),
        (r'for=192.0.2.7;host="a, for=6.6.6.6;a=\"b"', PROXY),
    ],
)
def test_a_client_cannot_quote_its_way_past_the_proxys_element(chain: str, client: str) -> None:
    """Neither an open quote nor a comma within quotes makes its text the right-most element."""
    assert behind_proxies(PROXY, forwarded(chain)).client_ip == client


@pytest.mark.parametrize(
    ("proxies", "chain", "client"),
    [
        (1, "6.6.6.6, 192.0.2.7", "192.0.2.7"),
        (2, "6.6.6.6, 192.0.2.7, 203.0.113.5", "192.0.2.7"),
        (3, "192.0.2.7, 203.0.113.5", "192.0.2.7"),
        (2, "6.6.6.6, unknown", None),
        (1, "", None),
        (0, "192.0.2.7", None),
    ],
)
def test_proxies_are_counted_from_the_peer(proxies: int, chain: str, client: str | None) -> None:
    """Also where the peer is a Unix socket, that has no address."""
    found = ClientAddress(trusted_proxies=proxies)(None, xff(chain))

    assert (found.client_ip, found.remote_address) == (client, None)


def test_a_unix_socket_is_in_no_network() -> None:
    """Who can reach it is not known from a list of networks."""
    assert behind_proxies(None, xff("192.0.2.7")).client_ip is None


def test_two_chains_that_disagree_prove_nothing() -> None:
    """A proxy writes one and hands on the other as the client sent it; which, we cannot know."""
    both = [*xff("192.0.2.7"), *forwarded("for=6.6.6.6")]

    assert behind_proxies(PROXY, both) == Client(PROXY, PROXY, "192.0.2.7, for=6.6.6.6")
    agreed = [*xff("6.6.6.6, 192.0.2.7"), *forwarded("for=192.0.2.7")]
    assert behind_proxies(PROXY, agreed).client_ip == "192.0.2.7"
    blank = [*xff("192.0.2.7"), *forwarded(" ")]
    assert behind_proxies(PROXY, blank) == Client("192.0.2.7", PROXY, "192.0.2.7")


@pytest.mark.parametrize("header", ["X-Forwarded-For", "forwarded"])
def test_the_chain_to_read_can_be_named(header: str) -> None:
    """The other one, that the proxy hands on, is recorded and not believed."""
    both = [*xff("6.6.6.6, 192.0.2.7"), *forwarded("for=192.0.2.8")]
    address = ClientAddress(trusted_proxies=NETWORKS, header=header)

    client = {"X-Forwarded-For": "192.0.2.7", "forwarded": "192.0.2.8"}[header]
    assert address(PROXY, both).client_ip == client


def test_a_named_header_counts_from_a_trusted_peer() -> None:
    """Sent twice, or no address, it does not count; no other header takes its place."""
    address = ClientAddress(trusted_proxies=NETWORKS, header="CF-Connecting-IP")
    cf = "cf-connecting-ip"

    assert address(PROXY, [(cf, "2001:DB8::1"), *xff("6.6.6.6")]).client_ip == "2001:db8::1"
    assert address(PROXY, [(cf, "192.0.2.7"), (cf, "6.6.6.6")]).client_ip == PROXY
    assert address(PROXY, [(cf, "x"), *xff("6.6.6.6")]).client_ip == PROXY
    assert address(PROXY, xff("6.6.6.6")).client_ip == PROXY


def test_a_chain_longer_than_any_real_one_is_not_followed() -> None:
    """`MAX_HOPS` elements are read, and the last of them is the answer."""
    hops = [f"10.0.0.{n}" for n in range(2, 2 + MAX_HOPS)]

    assert behind_proxies(PROXY, xff("192.0.2.7, " + ", ".join(hops))).client_ip == hops[0]
    assert behind_proxies(PROXY, xff("192.0.2.7, " + ", ".join(hops[1:]))).client_ip == "192.0.2.7"


# --- the recorded chain


def test_eight_kilobytes_of_garbage_do_not_push_out_what_the_proxy_wrote() -> None:
    """The right end is kept, of each of the two headers."""
    garbage = "A" * 8192
    client = behind_proxies(PROXY, [*xff(garbage, "192.0.2.7"), *forwarded(garbage)])

    first, second = (client.forwarded_for or "").rsplit(", ", 1)
    assert first == "…" + "A" * (MAX_CHAIN - 12) + ", 192.0.2.7"
    assert second == "…" + "A" * (MAX_CHAIN - 1)
    exact = "1" * MAX_CHAIN
    assert behind_proxies(PROXY, xff(exact)).forwarded_for == exact


def test_text_that_breaks_lines_and_terminals_is_escaped() -> None:
    """Control characters, escape sequences, separators and lone surrogates."""
    client = behind_proxies(PROXY, xff("\r\n\x00\x1b[2J\x7f\x85\u2028\u202e\ud800é"))

    assert client.forwarded_for == (
        r"\u000d\u000a\u0000\u001b[2J\u007f\u0085\u2028\u202e\ud800\u00e9"
    )


def test_it_goes_into_an_entry(audit_entries: list[dict[str, Any]]) -> None:
    """The three fields have the names of the audit context's."""
    client = behind_proxies(PROXY, xff("6.6.6.6, 192.0.2.7"))
    with audit_context(
        client_ip=client.client_ip,
        remote_address=client.remote_address,
        forwarded_for=client.forwarded_for,
    ):
        audit_log.info(action="A")

    (entry,) = audit_entries
    assert entry["clientIpAddress"] == "192.0.2.7"
    assert (entry["remoteAddress"], entry["forwardedFor"]) == (PROXY, "6.6.6.6, 192.0.2.7")


# --- anonymisation

LEAKS = ["192.0.2.7", "6.6.6.6", "10.0.0.1", "2001:db8:1:2::3"]


@pytest.mark.parametrize("anonymize", ["truncate", "omit", KEY])
@pytest.mark.parametrize("source", ["peer", "request-ip"])
@pytest.mark.parametrize(
    "headers",
    [
        xff("6.6.6.6, 192.0.2.7"),
        xff("6.6.6.6x, ip=6.6.6.6, 192.0.2.7:80"),
        forwarded("for=6.6.6.6;host=6.6.6.6, for=192.0.2.7;by=10.0.0.1"),
        forwarded('for="[2001:db8:1:2::3]:443"'),
        forwarded("6.6.6.6"),
        [("x-client-ip", "6.6.6.6")],
        [],
    ],
)
def test_no_address_leaks_past_an_anonymisation(
    anonymize: Any, source: Any, headers: list[tuple[str, str]]
) -> None:
    """Not from the chain either, nor from what is no address but holds one."""
    trusted = NETWORKS if source == "peer" else ()
    address = ClientAddress(trusted_proxies=trusted, source=source, anonymize=anonymize)

    client = address(PROXY, headers)

    assert not [leak for leak in LEAKS if leak in repr(client)]
    assert (client.client_ip is None) == (anonymize == "omit")


@pytest.mark.parametrize(
    ("address", "truncated"),
    [
        ("192.0.2.7", "192.0.2.0"),
        ("::ffff:192.0.2.7", "192.0.2.0"),
        ("2001:db8:1:2::3", "2001:db8:1::"),
        ("2002:c000:207:1::3", "2002:c000:200::"),
        ("64:ff9b::192.0.2.7", "64:ff9b::"),
    ],
)
def test_truncation_leaves_the_network(address: str, truncated: str) -> None:
    """24 bits of IPv4, 48 of IPv6, and no IPv4 address that an IPv6 address embeds."""
    client = ClientAddress(anonymize="truncate")(address, xff(f"x, {address}"))

    assert client == Client(truncated, truncated, f"?, {truncated}")


def test_a_keyed_token_is_the_same_wherever_the_address_stands() -> None:
    """And another with another key, so that only who has the key can look addresses up."""
    address = ClientAddress(trusted_proxies=NETWORKS, anonymize=KEY)

    client = address(PROXY, xff("192.0.2.7"))

    # printf 192.0.2.7 | openssl dgst -sha256 -hmac "$KEY"
    assert client.client_ip == "hmac:306d392ef34550ec"
    assert client.forwarded_for == client.client_ip
    assert address("::ffff:192.0.2.7", []).remote_address == client.client_ip
    assert client.remote_address != client.client_ip
    other = ClientAddress(anonymize=KEY[::-1])("192.0.2.7", [])
    assert other.client_ip != client.client_ip


def test_an_anonymised_chain_tells_that_there_was_more() -> None:
    """Of a long one, the last elements are kept."""
    chain = ", ".join(["192.0.2.7"] * MAX_HOPS)
    address = ClientAddress(anonymize="truncate")

    kept = ", ".join(["192.0.2.0"] * MAX_HOPS)
    assert address(PROXY, xff(chain)).forwarded_for == kept
    assert address(PROXY, xff("192.0.2.7, " + chain)).forwarded_for == "…, " + kept


# --- request-ip

OF_REQUEST_IP = [
    "x-client-ip", "x-forwarded-for", "cf-connecting-ip", "do-connecting-ip", "fastly-client-ip",
    "true-client-ip", "x-real-ip", "x-cluster-client-ip", "x-forwarded", "forwarded-for",
    "forwarded", "x-appengine-user-ip",
]  # fmt: skip


def test_request_ip_takes_the_first_header_of_its_list() -> None:
    """In its order, whatever the order of the request."""
    headers = [(name, f"6.6.6.{place}") for place, name in enumerate(OF_REQUEST_IP)][::-1]
    address = ClientAddress(source="request-ip")

    found = [address("192.0.2.7", headers[:left]).client_ip for left in range(len(headers), 0, -1)]

    assert found == [f"6.6.6.{place}" for place in range(len(headers))]


@pytest.mark.parametrize(
    ("peer", "headers", "client"),
    [
        ("192.0.2.7", [("x-client-ip", "6.6.6.6"), *xff("1.1.1.1")], "6.6.6.6"),
        ("192.0.2.7", xff("unknown, 10.0.0.1, 2.2.2.2"), "10.0.0.1"),
        ("192.0.2.7", xff("1.1.1.1:5555, 2.2.2.2"), "1.1.1.1"),
        ("192.0.2.7", xff("unknown", " 2.2.2.2 "), "2.2.2.2"),
        ("192.0.2.7", xff("[2001:db8::1]:443, 2.2.2.2"), "2.2.2.2"),
        ("192.0.2.7", xff("2001:DB8::1, 2.2.2.2"), "2001:DB8::1"),
        ("192.0.2.7", forwarded("for=192.0.2.60;proto=http"), "192.0.2.7"),
        ("192.0.2.7", forwarded("6.6.6.6"), "6.6.6.6"),
        ("192.0.2.7", [("x-real-ip", "3.3.3.3:80")], "192.0.2.7"),
        ("192.0.2.7", [("x-real-ip", " 3.3.3.3")], "192.0.2.7"),
        ("192.0.2.7", [("x-real-ip", "3.3.3.3"), ("x-real-ip", "4.4.4.4")], "192.0.2.7"),
        ("192.0.2.7", [("cf-pseudo-ipv4", "3.3.3.3")], "192.0.2.7"),
        ("192.0.2.7", [("x-real-ip", "01.2.3.4")], "192.0.2.7"),
        ("::ffff:127.0.0.1", [], "::ffff:127.0.0.1"),
        ("fe80::1%eth0", [], None),
        (None, [], None),
    ],
)
def test_request_ip_is_reproduced(
    peer: str | None, headers: list[tuple[str, str]], client: str | None
) -> None:
    """As measured with request-ip 3.3.0 under Node 20, its mistakes included."""
    assert ClientAddress(source="request-ip")(peer, headers).client_ip == client


def test_the_peer_and_the_chain_stand_beside_what_request_ip_found() -> None:
    """They are what tells a forged address."""
    client = ClientAddress(source="request-ip")("::ffff:192.0.2.7", xff("6.6.6.6"))

    assert client == Client("6.6.6.6", "192.0.2.7", "6.6.6.6")


# --- whatever comes

characters = st.sampled_from('0123456789abcdefFOR:.,;="[]%_\\ /' + "\t\r\n\x00é\ud800")
pieces = st.sampled_from(
    ["for=", "192.0.2.7", "10.0.0.2", "::ffff:", "2001:db8::1", ", ", "unknown", '"[', "e" * 600]
)
values = st.one_of(st.text(max_size=60), st.lists(characters | pieces, max_size=30).map("".join))
names = st.sampled_from([*OF_REQUEST_IP, "x-forwarded-for", "forwarded", "accept"])
peers = st.none() | values | st.just(PROXY) | st.ip_addresses().map(str)
everyone = st.sampled_from([
    ClientAddress(), behind_proxies, ClientAddress(trusted_proxies=2),
    ClientAddress(trusted_proxies=1, header="x-real-ip"), ClientAddress(source="request-ip"),
    ClientAddress(trusted_proxies=1, anonymize="truncate"),
    ClientAddress(source="request-ip", anonymize="truncate"),
])  # fmt: skip


@settings(deadline=None, max_examples=1000)
@given(address=everyone, peer=peers, headers=st.lists(st.tuples(names, values), max_size=6))
@example(ClientAddress(source="request-ip"), None, xff("," * 100_000))
@example(behind_proxies, PROXY, forwarded('for="' + "\\" * 100_000))
def test_whatever_comes_is_an_address_or_nothing(
    address: ClientAddress, peer: str | None, headers: list[tuple[str, str]]
) -> None:
    """Never an exception, never a client's text, and a chain that fits on a line."""
    client = address(peer, headers)

    as_is = "source='request-ip', anonymize=None" in repr(address)
    for text in (client.remote_address, client.client_ip):
        assert text is None or str(ipaddress.ip_address(text)) == text or as_is
    if client.client_ip is not None:
        assert "%" not in client.client_ip
        ipaddress.ip_address(client.client_ip)
    chain = client.forwarded_for
    assert chain is None or len(chain) <= 2 * MAX_CHAIN + 2
    assert chain is None or (chain.replace("…", "").isascii() and chain.isprintable())


@settings(deadline=None, max_examples=500)
@given(forged=values, header=st.sampled_from(["x-forwarded-for", "forwarded"]))
def test_whatever_a_client_sends_its_proxy_has_the_last_word(forged: str, header: str) -> None:
    """A proxy appends the client's address; nothing in front of it changes the answer."""
    written = "192.0.2.7" if header == "x-forwarded-for" else "for=192.0.2.7"

    for sent in ([(header, f"{forged}, {written}")], [(header, forged), (header, written)]):
        assert behind_proxies(PROXY, sent).client_ip == "192.0.2.7"


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trusted_proxies": "10.0.0.0/8"}, "neither a list of networks nor a number"),
        ({"trusted_proxies": True}, "neither a list of networks nor a number"),
        ({"trusted_proxies": None}, "neither a list of networks nor a number"),
        ({"trusted_proxies": -1}, "no number of proxies"),
        ({"trusted_proxies": MAX_HOPS + 1}, "no number of proxies"),
        ({"trusted_proxies": ["nginx"]}, "'nginx' does not appear to be"),
        ({"trusted_proxies": ["10.0.0.1/8"]}, "has host bits set"),
        ({"trusted_proxies": [167772161]}, "is no text"),
        ({"trusted_proxies": ["0.0.0.0/0"]}, "trusts every client"),
        ({"trusted_proxies": ["::/0"]}, "trusts every client"),
        ({"trusted_proxies": ["::ffff:0:0/96"]}, "trusts every client"),
        ({"trusted_proxies": 1, "header": "X Real IP"}, "no name of a header"),
        ({"trusted_proxies": 1, "header": ""}, "no name of a header"),
        ({"header": "X-Real-IP"}, "counts only from a trusted peer"),
        ({"trusted_proxies": 0, "header": "X-Real-IP"}, "counts only from a trusted peer"),
        ({"source": "socket"}, "source='socket' is unknown"),
        ({"source": "request-ip", "trusted_proxies": 1}, "believes every client"),
        ({"source": "request-ip", "header": "X-Real-IP"}, "believes every client"),
        ({"anonymize": "hash"}, "unknown str"),
        ({"anonymize": True}, "unknown bool"),
        ({"anonymize": b""}, "has 0 bytes"),
        ({"anonymize": KEY[:15]}, "has 15 bytes"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    """When the middleware is made, with what to do instead."""
    with pytest.raises(AuditConfigurationError, match=message) as caught:
        ClientAddress(**options)

    assert caught.value.hint


def test_a_network_of_mapped_addresses_is_one_of_ipv4() -> None:
    """Mapped peers are taken for IPv4; a network written like them would match none."""
    address = ClientAddress(trusted_proxies=["::ffff:10.0.0.0/104"])

    assert address("::ffff:10.0.0.1", xff("192.0.2.7")).client_ip == "192.0.2.7"


def test_the_key_is_in_no_message_and_no_repr() -> None:
    """Not even where it was given as text."""
    address = ClientAddress(trusted_proxies=["10.0.0.0/8"], header="X-Real-IP", anonymize=KEY)

    assert repr(address) == (
        "ClientAddress(trusted_proxies=('10.0.0.0/8',), header='x-real-ip', source='peer', "
        "anonymize='hmac')"
    )
    with pytest.raises(AuditConfigurationError) as caught:
        ClientAddress(anonymize=KEY.decode())  # type: ignore[arg-type]
    assert KEY.decode() not in str(caught.value)


def test_it_goes_to_another_process() -> None:
    """Options travel with the application under spawn."""
    copy = pickle.loads(pickle.dumps(ClientAddress(trusted_proxies=NETWORKS, anonymize=KEY)))

    assert copy(PROXY, xff("192.0.2.7")) == ClientAddress(trusted_proxies=NETWORKS, anonymize=KEY)(
        PROXY, xff("192.0.2.7")
    )
