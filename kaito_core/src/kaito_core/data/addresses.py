"""Which addresses a download may connect to, and a transport that connects to the checked address and to no other.

A workspace's URLs are written by whoever may write a workspace; the download runs inside the cluster's network or the
cloud's. Without a guard a URL (or a redirect, or a name that resolves differently the second time) could read the cloud's
metadata service or an internal API. So every hop is resolved once, every address is checked, and the connection is made to
that very address while the certificate is still checked against the name.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from kaito_core.problems import Problem, UserError

if TYPE_CHECKING:
    import ssl

    import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]

NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv4 addresses as IPv6-only networks write them (RFC 6052)."""
AZURE_HOST = ipaddress.ip_address("168.63.129.16")
"""Azure's wire server: a public address by number, a metadata service by nature."""


def private_addresses_allowed() -> bool:
    """Whether ``$KAITO_ALLOW_PRIVATE_ADDRESSES`` lets downloads reach private networks (a data server in the cluster)."""
    return os.environ.get("KAITO_ALLOW_PRIVATE_ADDRESSES", "").strip().lower() in ("1", "true", "yes")


def refusal(address: Address, *, allow_private: bool) -> str:
    """Why this address may not be connected to; empty when it may.

    Metadata services live at link-local addresses and hold credentials, never data: they stay closed even with
    ``allow_private``."""
    inner = _inner_ipv4(address)
    if inner is not None:
        return refusal(inner, allow_private=allow_private)
    if address.is_link_local or address == AZURE_HOST:
        return "link-local: the place of cloud metadata services"
    if address.is_multicast or address.is_unspecified:
        return "not the address of a server"
    if allow_private:
        return ""
    if address.is_loopback:
        return "loopback: this machine itself"
    return "" if address.is_global else "private"


def _inner_ipv4(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for, where it does."""
    if not isinstance(address, ipaddress.IPv6Address):
        return None
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


def resolve(host: str, port: int) -> list[str]:
    """The addresses of ``host``, in the system's order. OSError when it has none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def checked(host: str, port: int, *, allow_private: bool, resolver: Resolve = resolve) -> list[str]:
    """The addresses of ``host``. UserError when any of them may not be connected to; OSError when it has none."""
    addresses = list(resolver(host.strip("[]"), port))
    for text in addresses:
        why = refusal(ipaddress.ip_address(text.partition("%")[0]), allow_private=allow_private)
        if why:
            open_up = "" if "metadata" in why else "; to allow private networks set KAITO_ALLOW_PRIVATE_ADDRESSES=1"
            raise UserError(
                Problem(f"{host} is at {text}, which is {why}: kaito does not download from there",
                        f"put the data where anyone with the URL can reach it{open_up}")
            )  # fmt: skip
    return addresses


@cache
def tls() -> ssl.SSLContext:
    """The authorities that are trusted here (``$SSL_CERT_FILE``, ``$SSL_CERT_DIR``), read once."""
    import httpx

    return httpx.create_ssl_context()


def guarded_transport(*, allow_private: bool, resolver: Resolve = resolve) -> httpx.BaseTransport:
    """A transport that connects only to checked addresses. Connections are not reused: a kept one could belong to another
    name at the same address."""
    import httpx

    class Guarded(httpx.BaseTransport):
        def __init__(self) -> None:
            self._inner = httpx.HTTPTransport(verify=tls(), limits=httpx.Limits(max_keepalive_connections=0))

        def handle_request(self, request: httpx.Request) -> httpx.Response:
            host = request.url.host
            port = request.url.port or (443 if request.url.scheme == "https" else 80)
            try:
                addresses = checked(host, port, allow_private=allow_private, resolver=resolver)
            except OSError as e:
                raise httpx.ConnectError(
                    f"the name {host} is not known here: {e.strerror or e}", request=request
                ) from e
            refused: httpx.ConnectError | httpx.ConnectTimeout | None = None
            for address in addresses:
                try:
                    return self._inner.handle_request(self._to(request, address))
                except (httpx.ConnectError, httpx.ConnectTimeout) as e:
                    refused = e
            raise refused or httpx.ConnectError(f"the name {host} has no address", request=request)

        @staticmethod
        def _to(request: httpx.Request, address: str) -> httpx.Request:
            # The Host header was set from the name when the request was made; TLS gets the name here.
            extensions: dict[str, Any] = {**request.extensions, "sni_hostname": request.url.host}
            url = request.url.copy_with(host=address)
            return httpx.Request(
                request.method, url, headers=request.headers, stream=request.stream, extensions=extensions
            )

        def close(self) -> None:
            self._inner.close()

    return Guarded()
