"""Which addresses an outgoing request may connect to, and a transport that connects to the checked address and to no other.

Users write a workspace's URLs and registries, and the servers there write what they answer: redirects, upload locations, token
servers. The request runs inside the cluster's network or the cloud's. Without a guard a URL (or a redirect, or a
name that resolves differently the second time) could reach the cloud's metadata service or an internal API. So every request is resolved
once, every address is checked, and the connection is made to that very address while the certificate is still checked against the name.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any

from kaito_core.problems import UserError

if TYPE_CHECKING:
    import ssl

    import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]

NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv4 addresses as IPv6-only networks write them (RFC 6052)."""
LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")
"""The same with prefixes of one network's own (RFC 8215), mostly as the last 32 bits."""
COMPATIBLE = ipaddress.ip_network("::/96")
"""IPv4 addresses as early IPv6 wrote them (RFC 4291, 2.5.5.1); ``::`` and ``::1`` are others."""
AZURE_HOST = ipaddress.ip_address("168.63.129.16")
"""Azure's wire server: a public address by number, a metadata service by nature."""

LEAST = "kaito.least"
"""The extension of a request that says which zone it may reach at least (`Zone`); without it, the transport's own."""
ZONES = "kaito.zones"
"""The extension of an answer that says in which zones the addresses of its host are: the nearest and the furthest."""


class Zone(IntEnum):
    """How far away an address is. A server may send us on within its own zone or to a more public one, and never to a nearer one."""

    LOOPBACK = 0
    """This machine, and in a pod the pod itself."""
    PRIVATE = 1
    """The cluster's or the company's network."""
    PUBLIC = 2


class ForbiddenAddress(UserError):
    """A host is at an address that this request may not reach, and nothing was sent to it. ``fact`` says where it is, and no more."""

    def __init__(self, fact: str, remedy: str) -> None:
        super().__init__(f"{fact}: kaito does not download from there", remedy)
        self.fact = fact


def private_addresses_allowed() -> bool:
    """Whether ``$KAITO_ALLOW_PRIVATE_ADDRESSES`` lets requests reach private networks (a data server in the cluster)."""
    return os.environ.get("KAITO_ALLOW_PRIVATE_ADDRESSES", "").strip().lower() in ("1", "true", "yes")


def least_zone(*, allow_private: bool) -> Zone:
    """The nearest zone that a URL of a Workspace may be in."""
    return Zone.LOOPBACK if allow_private else Zone.PUBLIC


def zone(address: Address) -> Zone:
    """Where this address is."""
    inner = _inner_ipv4(address)
    if inner is not None:
        return min(zone(inner), Zone.PRIVATE if address in LOCAL_NAT64 else Zone.PUBLIC)
    if address.is_loopback:
        return Zone.LOOPBACK
    return Zone.PUBLIC if address.is_global else Zone.PRIVATE


def refusal(address: Address, least: Zone) -> str:
    """Why this address may not be connected to; empty when it may.

    Metadata services live at link-local addresses and hold credentials, never data: they stay closed whatever ``least`` is."""
    inner = _inner_ipv4(address) or address
    if inner.is_link_local or inner == AZURE_HOST:
        return "link-local: the place of cloud metadata services"
    if inner.is_multicast or inner.is_unspecified:
        return "not the address of a server"
    there = zone(address)
    if there >= least:
        return ""
    return "loopback: this machine itself" if there == Zone.LOOPBACK else "private"


def _inner_ipv4(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for, where it does."""
    if not isinstance(address, ipaddress.IPv6Address):
        return None
    if address in NAT64 or address in LOCAL_NAT64 or (address in COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


def resolve(host: str, port: int) -> list[str]:
    """The addresses of ``host``, in the system's order. OSError when it has none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def checked(host: str, port: int, least: Zone, resolver: Resolve = resolve) -> list[str]:
    """The addresses of ``host``. `ForbiddenAddress` when any of them may not be connected to; OSError when it has none."""
    addresses = list(resolver(host.strip("[]"), port))
    for text in addresses:
        why = refusal(_parsed(text), least)
        if why:
            open_up = "" if "metadata" in why else "; to allow private networks set KAITO_ALLOW_PRIVATE_ADDRESSES=1"
            raise ForbiddenAddress(
                f"{host} is at {text}, which is {why}", f"put the data where anyone with the URL can reach it{open_up}"
            )
    return addresses


def _parsed(address: str) -> Address:
    return ipaddress.ip_address(address.partition("%")[0])


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def tls() -> ssl.SSLContext:
    """The authorities that are trusted here (``$SSL_CERT_FILE``, ``$SSL_CERT_DIR``), read once."""
    return _tls(os.environ.get("SSL_CERT_FILE", ""), os.environ.get("SSL_CERT_DIR", ""))


@cache
def _tls(file: str, folder: str) -> ssl.SSLContext:
    import httpx

    return httpx.create_ssl_context()


def guarded_transport(least: Zone, resolver: Resolve = resolve) -> httpx.BaseTransport:
    """A transport that connects only to checked addresses, or goes through the proxy of ``$HTTPS_PROXY``/``$HTTP_PROXY`` (``$NO_PROXY``
    and this machine excepted). ``least`` is for requests without an extension `LEAST`. Raises `ForbiddenAddress`.

    Behind a proxy the proxy resolves names; what resolves here as well is checked here as well. Connections are not reused: a kept one
    could belong to another name at the same address."""
    import urllib.request

    import httpx

    class Guarded(httpx.BaseTransport):
        def __init__(self) -> None:
            self._direct = httpx.HTTPTransport(verify=tls(), limits=httpx.Limits(max_keepalive_connections=0))
            self._proxies: dict[str, httpx.HTTPTransport] = {}

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            host = request.url.host
            proxy = urllib.request.getproxies().get(request.url.scheme)
            through = proxy if proxy and not is_loopback(host) and not urllib.request.proxy_bypass(host) else ""
            port = request.url.port or (443 if request.url.scheme == "https" else 80)
            try:
                addresses = checked(host, port, Zone(request.extensions.get(LEAST, least)), resolver)
            except OSError as e:
                if not through:
                    raise httpx.ConnectError(
                        f"the name {host} is not known here: {e.strerror or e}", request=request
                    ) from e
                addresses = []
            response = self._proxied(through, request) if through else self._connected(request, addresses)
            found = [zone(_parsed(a)) for a in addresses] or [Zone.PUBLIC]
            response.extensions[ZONES] = min(found), max(found)
            return response

        def _proxied(self, proxy: str, request: httpx.Request) -> httpx.Response:
            if proxy not in self._proxies:
                self._proxies[proxy] = httpx.HTTPTransport(verify=tls(), proxy=proxy)
            return self._proxies[proxy].handle_request(request)

        def _connected(self, request: httpx.Request, addresses: Sequence[str]) -> httpx.Response:
            refused: httpx.ConnectError | httpx.ConnectTimeout | None = None
            for address in addresses:
                try:
                    return self._direct.handle_request(self._to(request, address))
                except (httpx.ConnectError, httpx.ConnectTimeout) as e:
                    refused = e
            raise refused or httpx.ConnectError(f"the name {request.url.host} has no address", request=request)

        @staticmethod
        def _to(request: httpx.Request, address: str) -> httpx.Request:
            # The Host header was set from the name when the request was made; TLS gets the name here.
            extensions: dict[str, Any] = {**request.extensions, "sni_hostname": request.url.host}
            url = request.url.copy_with(host=address)
            return httpx.Request(
                request.method, url, headers=request.headers, stream=request.stream, extensions=extensions
            )

        def close(self) -> None:
            for transport in (self._direct, *self._proxies.values()):
                transport.close()

    return Guarded()
