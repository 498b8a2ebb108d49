"""How a registry wants to be logged in to: reading its challenge, and trading a log-in for an access token.

The token protocol is Docker's (https://distribution.github.io/distribution/spec/auth/token/, and /oauth/ for identity
tokens, as Azure's registry hands out).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from kaito_core.artifacts.credentials import Credentials

CLIENT_ID = "kaito"

_SCHEME = re.compile(r"\s*,?\s*([A-Za-z][A-Za-z0-9._-]*)(?:\s+|$)")
_PARAMETER = re.compile(r'\s*,?\s*([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to log in that a ``WWW-Authenticate`` header offers; ``scheme`` in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def parse_challenges(header: str) -> list[Challenge]:
    """All challenges of a ``WWW-Authenticate`` header (RFC 9110, 11.6.1); reading stops where it makes no sense."""
    challenges: list[Challenge] = []
    position = 0
    while match := _SCHEME.match(header, position):
        position = match.end()
        parameters: dict[str, str] = {}
        while parameter := _PARAMETER.match(header, position):
            position = parameter.end()
            name, quoted, plain = parameter.groups()
            parameters[name.lower()] = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        challenges.append(Challenge(match[1].lower(), parameters))
    return challenges


def choose(header: str) -> Challenge | None:
    """The challenge to answer: Bearer before Basic, because then the password goes to the token server only."""
    offered = {c.scheme: c for c in reversed(parse_challenges(header))}
    bearer = offered.get("bearer")
    return bearer if bearer and bearer.parameters.get("realm") else offered.get("basic")


def basic(credentials: Credentials) -> str:
    """The value of an ``Authorization`` header."""
    return "Basic " + base64.b64encode(f"{credentials.username}:{credentials.password}".encode()).decode()


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What to send to a token server. ``form`` makes it a POST; ``headers`` may hold the password."""

    url: str
    query: Mapping[str, str]
    form: Mapping[str, str] = field(default_factory=dict, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def token_request(challenge: Challenge, scope: str, credentials: Credentials | None) -> TokenRequest:
    """The request that trades the credentials, or nothing, for a token with ``scope``."""
    realm = challenge.parameters["realm"]
    asked = {"scope": scope}
    if service := challenge.parameters.get("service"):
        asked["service"] = service
    if credentials and credentials.identity_token:
        grant = {"grant_type": "refresh_token", "refresh_token": credentials.identity_token, "client_id": CLIENT_ID}
        return TokenRequest(realm, {}, form={**asked, **grant})
    if credentials:
        return TokenRequest(realm, asked, headers={"Authorization": basic(credentials)})
    return TokenRequest(realm, asked)


def read_token(body: bytes) -> str:
    """The token in a token server's answer; empty if there is none that could go into a header."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    token = (document.get("token") or document.get("access_token")) if isinstance(document, dict) else ""
    return token if isinstance(token, str) and re.fullmatch(r"[\x21-\x7e]+", token) else ""
