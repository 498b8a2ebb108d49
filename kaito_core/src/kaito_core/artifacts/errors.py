"""What a registry says when it refuses, in words for people.

The distribution specification's errors are ``{"errors": [{"code", "message", "detail"}]}``; token servers write
``{"details"}`` (Docker) or ``{"error", "error_description"}`` (OAuth 2).
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from kaito_core.oci_reference import Reference
from kaito_core.problems import Failure

Reason = Literal["unreachable", "credentials", "denied", "not-found", "other"]

MAX_ERROR_BYTES = 64 << 10
_MAX_QUOTE = 300


class RegistryError(Failure):
    """A registry did not do what was asked. ``status`` is its HTTP status, 0 if it did not answer.

    What the person can mend (credentials, rights, a missing repository) has the exit code of the user's mistakes."""

    def __init__(self, message: str, remedy: str, reason: Reason, status: int = 0) -> None:
        super().__init__(message, remedy)
        self.exit_code = 2 if reason in ("credentials", "denied", "not-found") else 1
        self.reason: Reason = reason
        self.status = status


def unreachable(reference: Reference, who: str, cause: str, remedy: str = "") -> RegistryError:
    """``who`` did not answer, or the connection broke, as often as it was tried."""
    return RegistryError(
        f"{reference}: {who} cannot be reached: {cause}",
        remedy or "check the host name and the network; what is done so far is kept, so try again later",
        "unreachable",
    )


def wrong_credentials(reference: Reference, username: str, status: int, body: bytes) -> RegistryError:
    """The user name and password are wrong, or none were given and the registry wants some."""
    if not username:
        message = (
            f"{reference}: the registry {reference.registry} wants a user name and password, and there are none for it"
        )
    else:
        message = f"{reference}: the registry refused the user name or password (user {username!r})"
    return RegistryError(message + _quoted(status, body), _log_in(reference), "credentials", status)


def refused(reference: Reference, doing: str, status: int, body: bytes) -> RegistryError:
    """Any other answer that is not a success."""
    codes = error_codes(body)
    if status in (401, 403) or codes & {"DENIED", "UNAUTHORIZED"}:
        message = f"{reference}: the log-in is not allowed to {doing}"
        return RegistryError(message + _quoted(status, body), _allow(reference, doing), "denied", status)
    if status == 404:
        message = f"{reference}: the registry does not find it (to {doing})"
        remedy = "check the name and the tag; some registries want the repository or project to be created first"
        return RegistryError(message + _quoted(status, body), remedy, "not-found", status)
    remedy = "try again later; if it stays so, ask those who run the registry"
    return RegistryError(
        f"{reference}: the registry refused to {doing}{_quoted(status, body)}", remedy, "other", status
    )


def error_codes(body: bytes) -> set[str]:
    """The specification's codes in an error body, such as ``DENIED``."""
    document = _document(body)
    errors = document.get("errors")
    return (
        {str(e["code"]) for e in errors if isinstance(e, dict) and "code" in e} if isinstance(errors, list) else set()
    )


def error_text(body: bytes) -> str:
    """The registry's own words on one line, bounded and without control characters; empty if it said nothing."""
    document = _document(body)
    parts: list[str] = []
    errors = document.get("errors")
    for error in errors if isinstance(errors, list) else []:
        if isinstance(error, dict):
            detail = error.get("detail")
            text = ": ".join(str(error[k]) for k in ("code", "message") if error.get(k))
            parts.append(f"{text} ({detail})" if isinstance(detail, str) and detail else text)
    if not parts:
        parts = [str(document[k]) for k in ("error", "error_description", "details", "message") if document.get(k)]
    if not document and not body.lstrip().startswith(b"<"):  # an HTML page of some proxy says nothing worth quoting
        parts = [body.decode(errors="replace")]
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", "; ".join(parts)).strip()[:_MAX_QUOTE]


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _quoted(status: int, body: bytes) -> str:
    text = error_text(body)
    return f"; it says: {status} {text}" if text else f" (HTTP {status})"


def _log_in(reference: Reference) -> str:
    return f"run `docker login {reference.registry}`, or mend the Secret named by imagePushSecret or imagePullSecrets"


def _allow(reference: Reference, doing: str) -> str:
    right = "push" if doing.startswith("push") else "pull"
    return f"ask for the right to {right} in {reference.name}, or log in as someone who has it: {_log_in(reference)}"
