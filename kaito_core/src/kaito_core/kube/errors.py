"""What an API server, or the way to it, says no with. The words are the server's; the type is what a program goes by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kaito_core import foreign_json
from kaito_core.problems import Failure


class ApiError(Failure):
    """A request that did not work."""

    def __init__(self, message: str, *, status: int = 0, reason: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.status = status
        """The HTTP status; 0 when there was no answer."""
        self.reason = reason
        """Kubernetes' own word for it: ``AlreadyExists``."""


class NotFound(ApiError):
    """404: the object, or the kind of object, is not there."""


class Conflict(ApiError):
    """409: somebody else changed it in between."""


class AlreadyExists(ApiError):
    """409: an object of that name is there."""


class Forbidden(ApiError):
    """401 or 403: these credentials may not do that."""


class Gone(ApiError):
    """410: the version that a watch or a page began at is too old."""


class Invalid(ApiError):
    """400 or 422: the server does not accept the object."""


class TooManyRequests(ApiError):
    """429: the server asks to wait."""

    def __init__(self, message: str, *, retry_after: float = 1.0, **about: Any) -> None:
        super().__init__(message, **about)
        self.retry_after = retry_after
        """Seconds."""


class Unreachable(ApiError):
    """No answer: refused, timed out, cut off, or not to be trusted (TLS)."""


_TYPES: Mapping[int, type[ApiError]] = {
    400: Invalid,
    401: Forbidden,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
}


def error_of(status: int, body: bytes, what: str, *, retry_after: str = "") -> ApiError:
    """The error that an answer stands for; ``what`` was tried, in words (``create jobs.batch default/one``)."""
    try:
        said = foreign_json.loads(body)
    except ValueError:
        said = {}
    said = said if isinstance(said, dict) else {}
    reason = str(said.get("reason") or "")
    words = str(said.get("message") or body[:300].decode(errors="replace").strip() or f"HTTP {status}")
    message = f"{what}: {words}"
    if status == 429:
        return TooManyRequests(message, status=status, reason=reason, retry_after=_seconds(retry_after))
    kind = AlreadyExists if reason == "AlreadyExists" else _TYPES.get(status, ApiError)
    return kind(message, status=status, reason=reason)


def _seconds(text: str) -> float:
    try:
        return max(0.0, float(text))
    except ValueError:
        return 1.0
