"""`Face`: one ASGI middleware around any engine that speaks OpenAI's protocol.

    vllm serve … --middleware kaito_core.serving.face.Face
    app = Face(app)

It adds ``POST /chat`` (`kaito_core.serving.chat`), ``GET /`` and ``GET /healthz`` as KAITO has them, its own figures to
``GET /metrics``, the API key, limits, and the events by which an idle GPU is noticed (`kaito_core.serving.activity`).

A request to the model is read to its end before it takes a place (`kaito_core.serving.intake`), and its numbers are looked at
(`kaito_core.serving.sampling`): neither a client that stops in the middle nor a number that does not fit into a tensor reaches the engine.
Everything else is the engine's: it gets the very bytes, and answers through one small object that looks at the type of each
message. Standard library only, so that it can be loaded into the environment of any engine."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from kaito_core.serving import asgi, chat, sampling
from kaito_core.serving.activity import Activity
from kaito_core.serving.api_key import CODE, REFUSAL, ApiKey
from kaito_core.serving.asgi import Answer, App, Receive, Scope, Send, Watched
from kaito_core.serving.errors import HttpError, read_object
from kaito_core.serving.intake import Intake
from kaito_core.serving.metrics import CONTENT_TYPE, Metrics
from kaito_core.serving.settings import Settings

OPEN: Final = frozenset({"/", "/health", "/healthz", "/metrics"})
"""What is answered without the API key: probes and scrapers have none, and nothing there is secret."""

NOT_READY: Final = "Model not initialized"
"""KAITO's words."""

LONGEST_RETRY: Final = 60
"""Seconds that a client is told to wait at most."""

LINGER: Final = 2.0
"""Seconds for which what a refused client still sends is thrown away (RFC 9112 section 9.6)."""

_Route = Callable[[Scope, Receive, Send], Awaitable[None]]


class Face:
    """Wraps ``app``. Raises `UserError` when it is made with settings that cannot be: an API key that is not there."""

    def __init__(self, app: App, settings: Settings | None = None) -> None:
        self._app = app
        self._settings = settings or Settings.from_env()
        self._key = ApiKey(Path(self._settings.api_key_file)) if self._settings.api_key_file else None
        self._most = self._settings.most_in_flight
        self._model = self._settings.chat_model
        self._tokenizes = True
        self.metrics = Metrics()
        self._intake = Intake(self._settings.max_body, self._settings.body_seconds)
        self._activity = Activity(self.metrics, self._settings.results)
        self._routes: dict[tuple[str, str], _Route] = {
            ("GET", "/"): self._root,
            ("GET", "/healthz"): self._healthz,
            ("GET", "/metrics"): self._metrics,
            ("POST", "/chat"): self._chat,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "websocket" and self._key and not self._key.opens(scope["headers"]):
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the client sees a 403
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], _path(scope)
        watched = Watched(send)
        try:
            if method != "POST":
                self._check_key(scope, method, path)
                await self._routes.get((method, path), self._app)(scope, receive, watched)
            else:
                await self._post(scope, receive, watched, path)
        except HttpError as e:
            if watched.status:
                raise
            await _refuse(watched, e, path)
        finally:
            self.metrics.counted(path, watched.code)

    async def _post(self, scope: Scope, receive: Receive, send: Watched, path: str) -> None:
        """A request to the model. It takes a place among those that are answered once all of it is here."""
        try:
            self._check_key(scope, "POST", path)
            body = await self._intake.read(scope, receive)
        except HttpError as e:
            await _send_away(send, receive, e, path)
            return
        if body is None:
            return
        route = self._routes.get(("POST", path))
        if route is None:
            _check_numbers(body, self._settings.vocabulary)
            route = self._app
        if self._most and self.metrics.in_flight >= self._most:
            self.metrics.rejected += 1
            raise self._overloaded()
        started = time.monotonic()
        self._activity.began()
        try:
            await route(scope, asgi.once_more(body, receive), send)
        finally:
            self._activity.ended()
            self.metrics.worked(path, time.monotonic() - started)

    # --- who may, and how much

    def _check_key(self, scope: Scope, method: str, path: str) -> None:
        # A browser asks with OPTIONS, and without the key, whether it may ask.
        if self._key is None or path in OPEN or method == "OPTIONS" or self._key.opens(scope["headers"]):
            return
        raise HttpError(
            401,
            REFUSAL,
            code=CODE,
            headers={"www-authenticate": "Bearer"},
        )

    def _overloaded(self) -> HttpError:
        wait = min(max(1, math.ceil(self.metrics.usual_seconds)), LONGEST_RETRY)
        return HttpError(
            429,
            f"{self.metrics.in_flight} requests are being answered or wait, which is as many as there may be: "
            f"try again in {wait} s",
            code="rate_limit_exceeded",
            headers={"retry-after": str(wait)},
        )

    # --- what the engine does not have

    async def _root(self, scope: Scope, receive: Receive, send: Send) -> None:
        await asgi.respond_json(send, 200, {"message": "Server is running"})

    async def _healthz(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            ready = (await asgi.call(self._app, scope, receive, "GET", "/health")).status == 200
        except Exception:  # an engine that cannot say how it is
            ready = False
        if ready:
            await asgi.respond_json(send, 200, {"status": "Healthy"})
        else:
            await asgi.respond_json(send, 500, {"detail": NOT_READY})

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        engines = b""
        try:
            answer = await asgi.call(self._app, scope, receive, "GET", "/metrics")
            if answer.status == 200 and answer.headers.get("content-type", "").startswith("text/plain"):
                engines = answer.body.rstrip(b"\n") + b"\n"
        except Exception:  # noqa: S110 – our own figures are worth having when the engine's cannot be had
            pass
        await asgi.respond(send, 200, engines + self.metrics.text().encode(), {"content-type": CONTENT_TYPE})

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = chat.read(read_object((await receive())["body"]), self._settings)
        model = await self._chat_model(scope, receive)
        tokens = await self._prompt_tokens(scope, receive, model, asked) if asked.counts_prompt else None
        request = chat.engine_request(asked, model, tokens)
        sampling.check(request, self._settings.vocabulary)
        try:
            answer = await asgi.call(self._app, scope, receive, "POST", asked.path, request)
        except Exception:  # for the log; the client gets an answer that it can read
            await _refuse(send, HttpError(500, "the engine broke while it answered; its log says how"), "/chat")
            raise
        if not answer.status:  # the client is gone
            return
        if answer.status != 200:
            raise _engines_error(answer)
        try:
            said = chat.result(asked, answer.json())
        except ValueError as e:
            raise HttpError(500, str(e)) from e
        await asgi.respond_json(send, 200, said)

    async def _chat_model(self, scope: Scope, receive: Receive) -> str:
        if not self._model:
            answer = await asgi.call(self._app, scope, receive, "GET", "/v1/models")
            try:
                self._model = str(answer.json()["data"][0]["id"])
            except (LookupError, TypeError) as e:
                raise HttpError(500, "the engine does not say which models it has") from e
        return self._model

    async def _prompt_tokens(self, scope: Scope, receive: Receive, model: str, asked: chat.Chat) -> int | None:
        """How many tokens the prompt has, where the engine has vLLM's ``/tokenize``."""
        if not self._tokenizes:
            return None
        answer = await asgi.call(self._app, scope, receive, "POST", "/tokenize", {"model": model, **asked.asked})
        if answer.status == 404:
            self._tokenizes = False
        said = answer.json() if answer.status == 200 else None
        count = said.get("count") if isinstance(said, dict) else None
        return count if isinstance(count, int) else None


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    root = scope.get("root_path", "")
    return path.removeprefix(root) if root else path


def _check_numbers(body: bytes, vocabulary: int) -> None:
    """What is no JSON object is for the engine to judge; it reads with the same parser."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict):
        sampling.check(value, vocabulary)


def _engines_error(answer: Answer) -> HttpError:
    """The engine's own words, and its status: 400 for what the client can mend."""
    said: Any = answer.json()
    error = said.get("error", said) if isinstance(said, dict) else {}
    error = error if isinstance(error, dict) else {"message": error}
    message = error.get("message") or error.get("detail") or "the engine could not answer"
    status = answer.status if 400 <= answer.status < 600 else 500
    headers = {"retry-after": answer.headers["retry-after"]} if "retry-after" in answer.headers else {}
    return HttpError(status, str(message), param=error.get("param"), code=_code(error.get("code")), headers=headers)


def _code(value: Any) -> str | None:
    return value if isinstance(value, str) else None


async def _refuse(send: Send, error: HttpError, path: str) -> None:
    """OpenAI's form of an error; on ``/chat`` with KAITO's ``detail`` beside it."""
    await asgi.respond_json(send, error.status, _body_of(error, path), error.headers)


async def _send_away(send: Send, receive: Receive, error: HttpError, path: str) -> None:
    """The same to a client that may still be sending: its connection ends with the answer. What comes within `LINGER` is read and
    thrown away first, since a connection that is closed with unread bytes is reset, and a reset may overtake the answer. Who had the
    time for a whole body has had that time too."""
    body = json.dumps(_body_of(error, path), ensure_ascii=False).encode("utf-8", "replace")
    headers = {
        "content-type": "application/json",
        **error.headers,
        "connection": "close",
        "content-length": str(len(body)),
    }
    pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(0 if error.status == 408 else LINGER):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _body_of(error: HttpError, path: str) -> dict[str, Any]:
    body = error.body()
    if path == "/chat":
        body["detail"] = error.message
    return body
