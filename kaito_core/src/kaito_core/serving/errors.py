"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

TYPES: Final = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class HttpError(Exception):
    """A request that is answered with an error: ``message`` is for people, ``param`` the field of the request that is meant."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def parse_json(body: bytes) -> Any:
    """The JSON of a request body. Raises `HttpError` 400 for whatever is not strict JSON in UTF-8."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as e:
        raise HttpError(400, "the body is not UTF-8", code="invalid_json") from e
    except RecursionError as e:
        raise HttpError(400, "the body is nested too deeply", code="invalid_json") from e
    except ValueError as e:
        raise HttpError(400, f"the body is not JSON: {e}"[:200], code="invalid_json") from e


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def read_object(body: bytes) -> dict[str, Any]:
    """Like `parse_json`, and it must be an object."""
    value = parse_json(body)
    if not isinstance(value, dict):
        raise HttpError(400, "the body must be a JSON object", code="invalid_json")
    return value
