"""The grammars of Kubernetes' names and of addresses: each function says what is wrong with a text, or nothing."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Final
from urllib.parse import SplitResult, urlsplit

URL_SCHEMES: Final = ("https", "http", "hf", "file")

_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")
_LABEL_VALUE: Final = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?\Z")
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?")
_HERE: Final = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*_HERE\b|\bYOUR_[A-Z0-9_]+\b")
_ANGLED: Final = re.compile(r"<[A-Za-z][^<>]*>")


def placeholders(text: str, *, angled: bool = True) -> list[str]:
    """The placeholders of examples that stand in a text: ``IMAGE_NAME_HERE``, ``YOUR_REGISTRY``, ``<registry>``."""
    return [*_HERE.findall(text), *(_ANGLED.findall(text) if angled else ())]


def label_trouble(name: str) -> str:
    """Of a DNS-1123 label (RFC 1123): what a Workspace or namespace may be called."""
    if len(name) > 63:
        return f"is {len(name)} characters long; 63 is the most"
    return "" if _LABEL.match(name) else _characters(name, "'-'")


def subdomain_trouble(name: str) -> str:
    """Of a DNS-1123 subdomain: what a Secret, a ConfigMap or an adapter may be called."""
    if len(name) > 253:
        return f"is {len(name)} characters long; 253 is the most"
    return "" if all(_LABEL.match(part) for part in name.split(".")) else _characters(name, "'-' and '.'")


def _characters(name: str, more: str) -> str:
    return f"{name!r} is not a Kubernetes name: only a–z, 0–9, {more}, beginning and ending with a letter or digit"


def label_key_trouble(key: str) -> str:
    """Of a label's or annotation's key: ``[prefix/]name``."""
    prefix, slash, name = key.rpartition("/")
    if slash and subdomain_trouble(prefix):
        return f"the part before '/' in {key!r} is not a DNS name"
    if not name or len(name) > 63 or not _LABEL_VALUE.match(name):
        return f"{key!r} is not a label key: letters, digits, '-', '_' and '.', 63 at most"
    return ""


def label_value_trouble(value: str) -> str:
    """Of a label's value."""
    if len(value) > 63 or not _LABEL_VALUE.match(value):
        return f"{value[:80]!r} is not a label value: letters, digits, '-', '_' and '.', 63 at most"
    return ""


def url_trouble(url: str, *, public_only: bool) -> tuple[str, str]:
    """(what is wrong, remedy) of a URL or plain path; two empty strings when it is fine.

    ``public_only``: hosts that are inside some network are refused too, by what the URL says; no name is looked up.
    The text of the URL is not repeated, because it may hold a token."""
    if not url.strip():
        return "is empty", "write a URL or a path, or remove the item"
    match = _SCHEME.match(url)
    if not match:
        return "", ""  # a plain path
    scheme, slashes = match.group(1).lower(), match.group(2)
    if scheme not in URL_SCHEMES:
        if not slashes:
            return "", ""  # "notes:2024.jsonl" is a file's name
        schemes = ", ".join(f"{s}://" for s in URL_SCHEMES)
        return f"the scheme '{scheme}' is not supported", f"use {schemes}, a path, a volume or an image"
    if not slashes:
        return f"is not a URL: '{scheme}:' must be followed by '//'", f"write {scheme}://…"
    if re.search(r"[\s\x00-\x1f\x7f]", url) and scheme != "file":
        return "is not a URL: it holds white space", "write %20 for a space, or remove it"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as e:
        return f"is not a URL: {e}", "check the host and the port"
    if scheme in ("http", "https"):
        return _host_trouble(host, public_only)
    return ("names no file", _needs_path(scheme)) if not _names_a_file(scheme, parts) else ("", "")


def _names_a_file(scheme: str, parts: SplitResult) -> bool:
    return bool(parts.path.strip("/")) and (scheme == "file" or bool(parts.netloc))


def _needs_path(scheme: str) -> str:
    return "write hf://datasets/ORG/NAME/FILE" if scheme == "hf" else "write file:///folder/file"


def _host_trouble(host: str, public_only: bool) -> tuple[str, str]:
    if not host:
        return "is not a URL: it names no host", "write https://host/path"
    if public_only and _inside(host):
        return (f"the host {host} is inside a network: a cluster must not be made to read its own inner addresses",
                "use a public URL, a volume or an image; KAITO_ALLOW_PRIVATE_ADDRESSES=1 allows it")  # fmt: skip
    return "", ""


def _inside(host: str) -> bool:
    """Whether a host, by its text alone, is this machine, a private network or a cloud's metadata service."""
    name = host.rstrip(".").lower()
    if name in ("localhost", "metadata", "metadata.google.internal") or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        # What C libraries also take for an address: 127.1, 0x7f.1, 2130706433 (inet_aton looks nothing up).
        if not re.fullmatch(r"[0-9a-fx.]*[0-9][0-9a-fx.]*", name):
            return False
        try:
            address = ipaddress.ip_address(socket.inet_aton(name))
        except (OSError, ValueError):
            return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return not address.is_global


def listed(words: Iterable[str], last: str = "and") -> str:
    """``a, b and c``."""
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else end
