"""Asks an OpenAI-compatible endpoint and hands on what it answers, piece by piece.

What an endpoint says is hostile: it is bounded, and never reaches a terminal with control characters in it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from kaito_core.problems import Failure, KaitoError, UserError

if TYPE_CHECKING:
    import httpx

Message = Mapping[str, str]

KEY: Final = "KAITO_API_KEY"

PATIENCE: Final = 900.0
"""Seconds for the next piece of an answer: a machine may have to be found, and a large model loaded, for the first one."""

MOST_LINE: Final = 1 << 20
MOST: Final = 64 << 20
"""Bytes of one line and of one answer; a real one has a few hundred bytes a token."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    kind: Literal["answer", "thought", "status", "end"]
    """``thought`` is what the model thinks before it answers, ``status`` what the endpoint says of itself, ``end`` the reason why an
    answer ends (``stop``, ``length``)."""
    text: str


@dataclass(frozen=True)
class Models:
    """What an endpoint serves."""

    base: str
    """The model without any adapter."""
    adapters: tuple[str, ...]
    """Everything else that it answers as."""


def plain(text: str) -> str:
    """The text without what a terminal would take for a command."""
    return _CONTROL.sub("", text)


class Asking:
    """One endpoint, with the API key of ``$KAITO_API_KEY`` where that is set."""

    def __init__(self, url: str, *, name: str = "", via: httpx.BaseTransport | None = None) -> None:
        """``url`` is without ``/v1``, ``name`` what people call it when that is not its URL, ``via`` another way to it than the network.
        UserError when the key cannot be sent."""
        import httpx

        self.url = url
        self.name = name or url
        key = os.environ.get(KEY, "").strip()
        if not key.isascii() or not key.isprintable():
            raise UserError(
                f"{KEY} holds characters that no API key has", "set it to the key alone, without line breaks"
            )
        host = httpx.URL(url).host
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(PATIENCE, connect=10.0),
            transport=via,
            # A proxy of the company does not lead to this machine.
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),
        )

    def close(self) -> None:
        self._client.close()

    def models(self) -> Models:
        """What the endpoint serves. Raises `KaitoError` in words."""
        with self._words(), self._client.stream("GET", f"{self.url}/v1/models") as answer:
            content = _all(answer)
            if answer.status_code != 200:
                raise _refused(answer, content, self.name)
            listed = _object(content).get("data")
        entries = (
            [e for e in listed if isinstance(e, dict) and isinstance(e.get("id"), str)]
            if isinstance(listed, list)
            else []
        )
        if not entries:
            raise Failure(
                f"{self.name} does not say which models it serves", "is it the URL of an OpenAI-compatible endpoint?"
            )
        # vLLM says of an adapter which model is its parent; elsewhere the first one is the base.
        bases = [e["id"] for e in entries if not e.get("parent")] or [entries[0]["id"]]
        return Models(bases[0], tuple(e["id"] for e in entries if e["id"] != bases[0]))

    def answer(
        self,
        model: str,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> Iterator[Piece]:
        """The answer to a conversation, as it comes. Raises `KaitoError` in words, also in the middle."""
        limits = {"max_tokens": max_tokens, "temperature": temperature}
        body = {"model": model, "messages": [dict(m) for m in messages], "stream": True}
        body |= {k: v for k, v in limits.items() if v is not None}
        with self._words(), self._client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise _refused(answer, _all(answer), self.name)
            if "text/event-stream" not in answer.headers.get("content-type", ""):
                yield from _whole(_object(_all(answer)))
            else:
                yield from pieces(
                    answer.iter_raw() if not answer.headers.get("content-encoding") else answer.iter_bytes()
                )

    @contextmanager
    def _words(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.ConnectError as e:
            raise Failure(
                f"nothing answers at {self.name}: {brief(str(e))}", "is it running? `kaito status` shows what is"
            ) from None
        except httpx.TimeoutException:
            raise Failure(
                f"{self.name} has not answered in time", "try again; `kaito status` shows whether it runs"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as e:
            raise Failure(
                f"the connection to {self.name} broke: {brief(str(e)) or type(e).__name__}", "ask again"
            ) from None


# --- what comes


def pieces(chunks: Iterable[bytes]) -> Iterator[Piece]:
    """The pieces of a stream of server-sent events, cut into chunks anywhere. `Failure` when it breaks off, holds an error, or is too
    much."""
    ended = False
    for line in _lines(chunks):
        if line.startswith(b":"):
            if text := plain(line[1:].decode("utf-8", "replace")).strip():
                yield Piece("status", text)
            continue
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = _object(data)
        if "error" in event:
            raise Failure(f"the endpoint gave up: {_message(event)}", "ask again")
        choices = event.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        yield from _delta(choice.get("delta"))
        if isinstance(reason := choice.get("finish_reason"), str):
            ended = True
            yield Piece("end", plain(reason))
    if not ended:
        raise Failure(
            "the endpoint broke off in the middle of the answer", "ask again; its log says why: kaito logs NAME"
        )


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest, total = b"", 0
    for chunk in chunks:
        total += len(chunk)
        rest += chunk
        *lines, rest = rest.split(b"\n")
        if len(rest) > MOST_LINE or total > MOST:
            raise Failure(
                "the endpoint sends more than any answer is long", "is it the URL of an OpenAI-compatible endpoint?"
            )
        yield from (line.rstrip(b"\r") for line in lines)
    if rest:
        yield rest


def _delta(delta: Any) -> Iterator[Piece]:
    if not isinstance(delta, dict):
        return
    for name in ("reasoning_content", "reasoning"):  # vLLM's older and newer name
        if isinstance(thought := delta.get(name), str) and thought:
            yield Piece("thought", plain(thought))
            break
    if isinstance(text := delta.get("content"), str) and text:
        yield Piece("answer", plain(text))


def _whole(body: dict[str, Any]) -> Iterator[Piece]:
    """An answer that came in one, from an endpoint that does not stream."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    if choice is None:
        raise Failure(
            "the endpoint's answer is none that kaito can read", "is it the URL of an OpenAI-compatible endpoint?"
        )
    yield from _delta(choice.get("message"))
    yield Piece("end", plain(str(choice.get("finish_reason") or "stop")))


def _all(answer: httpx.Response) -> bytes:
    content = b""
    for chunk in answer.iter_bytes():
        content += chunk
        if len(content) > MOST_LINE:
            break
    return content


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# --- what went wrong


def _refused(answer: httpx.Response, content: bytes, name: str) -> KaitoError:
    """What the endpoint says against a request."""
    status, said = answer.status_code, _message(_object(content)) or brief(content.decode("utf-8", "replace"))
    because = f": {said}" if said else ""
    if status in (401, 403):
        which = "does not accept the API key" if os.environ.get(KEY) else "wants an API key"
        return UserError(f"{name} {which}{because}", f"set {KEY} to it")
    if status == 404:
        return UserError(
            f"{name} does not have that{because}", "--adapter names another model; is the URL that of the endpoint?"
        )
    if status == 429:
        wait = answer.headers.get("retry-after", "")
        seconds = f"in {wait} s" if wait.isascii() and wait.isdigit() and len(wait) < 6 else "in a moment"
        return Failure(f"{name} is busy{because}", f"ask again {seconds}")
    if status in (400, 413, 422):
        return UserError(
            f"{name} refuses the request{because}", "a shorter conversation (/reset) or other options may do"
        )
    if status in (301, 302, 303, 307, 308):
        return UserError(f"{name} sends us elsewhere", "name the URL that it leads to; an API key is not sent on")
    if status == 503:
        return Failure(f"{name} is not ready{because}", "ask again in a moment")
    return Failure(f"{name} failed with {status}{because}", "its log says why: kaito logs NAME")


def _message(body: Mapping[str, Any]) -> str:
    """The words in an error body: OpenAI's form, vLLM's older one, and FastAPI's."""
    error = body.get("error", body)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or ""
    return brief(error if isinstance(error, str) else json.dumps(error))


def brief(text: str) -> str:
    """The text on one line, without control characters, 300 characters at most."""
    flat = " ".join(plain(text.replace("\n", " ")).split())
    return flat if len(flat) <= 300 else flat[:299] + "…"
