"""Names of OCI images: ``registry/repository:tag@digest``.

A leaf module without heavy imports, so that validation can tell a wrong name at once instead of after hours of training.
The grammar is that of the OCI distribution specification ("Pulling manifests") and, for hosts and for what Docker leaves
out, of github.com/distribution/reference.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

DOCKER_HUB = "docker.io"

_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HOST = re.compile(
    r"(?P<name>(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9A-Fa-f:.]+\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_MAX_REPOSITORY = 255
_MAX_LENGTH = 1000  # host, repository, tag and digest at their longest are shorter; bounds the work on hostile input


@dataclass(frozen=True, slots=True)
class Reference:
    """One image in one registry. ``tag`` or ``digest`` may be empty, never both.

    ``registry`` is the host with its port if it has one, ``docker.io`` for Docker Hub; ``repository`` the path below it.
    """

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference as people write it, with Docker's defaults: ``docker.io``, ``library/`` and ``latest``.

        Raises `ValueError`, whose text says everything that is wrong with it.
        """
        if not text:
            raise ValueError("it is empty; write registry/repository:tag")
        if text != text.strip() or any(c.isspace() for c in text):
            raise ValueError("it contains a space or a line break")
        if len(text) > _MAX_LENGTH:
            raise ValueError(f"it is {len(text)} characters long")
        if "://" in text:
            raise ValueError(f"leave out the scheme {text.split('://', 1)[0]}://")
        wrong: list[str] = []
        rest, at, digest = text.partition("@")
        if at and not _DIGEST.fullmatch(digest):
            wrong.append(f"the digest {digest!r} is not sha256: followed by 64 hexadecimal digits in lower case")
        name, colon, tag = rest.rpartition(":")
        if not colon or "/" in tag:  # a colon before a slash belongs to the port
            name, colon, tag = rest, "", ""
        if colon and not _TAG.fullmatch(tag):
            wrong.append(_wrong_tag(tag))
        first, slash, path = name.partition("/")
        if slash and _is_host(first):
            registry, repository = first.lower(), path
            if not _is_valid_host(first):
                wrong.append(f"the registry {first!r} is not a host name with an optional port")
        else:
            registry, repository = DOCKER_HUB, name
        wrong.extend(_wrong_repository(repository))
        if wrong:
            raise ValueError("; ".join(wrong))
        if registry == "index.docker.io":
            registry = DOCKER_HUB
        if registry == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        return cls(registry, repository, tag or ("" if digest else "latest"), digest)

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    def __str__(self) -> str:
        return self.name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def is_digest(text: str) -> bool:
    """Whether ``text`` is a sha256 digest as OCI writes it; the only algorithm that kaito reads and writes."""
    return _DIGEST.fullmatch(text) is not None


def _is_host(first: str) -> bool:
    """Docker's old rule for the part before the first slash.

    Its newer one takes any part with a capital for a host; then ``MyOrg/adapter`` would go to a host called ``myorg``
    instead of being told that repositories are lower case.
    """
    return "." in first or ":" in first or first == "localhost"


def _is_valid_host(host: str) -> bool:
    match = _HOST.fullmatch(host)
    if not match or int(match["port"] or 1) not in range(1, 65536):
        return False
    if match["name"].startswith("["):
        try:
            ipaddress.IPv6Address(match["name"][1:-1])
        except ValueError:
            return False
    return True


def _wrong_tag(tag: str) -> str:
    if not tag:
        return "the tag after the colon is empty"
    if len(tag) > 128:
        return f"the tag is {len(tag)} characters long, 128 are allowed"
    return f"the tag {tag!r} may hold letters, digits, '_', '.' and '-' only, and must not begin with '.' or '-'"


def _wrong_repository(repository: str) -> list[str]:
    if not repository:
        return ["the repository is missing; write registry/repository:tag"]
    if len(repository) > _MAX_REPOSITORY:
        return [f"the repository is {len(repository)} characters long, {_MAX_REPOSITORY} are allowed"]
    if repository != repository.lower() and all(_COMPONENT.fullmatch(c) for c in repository.lower().split("/")):
        return [f"the repository {repository!r} must be lower case"]
    wrong = []
    for component in repository.split("/"):
        if not component:
            wrong.append(f"the repository {repository!r} has an empty part between slashes")
        elif not _COMPONENT.fullmatch(component):
            wrong.append(
                f"{component!r} in the repository must be lower-case letters and digits, "
                "joined by single '.', '_' or by '__' or by dashes"
            )
    return wrong
