"""`Face`: one ASGI middleware around any engine that speaks OpenAI's protocol.

    vllm serve … --middleware kaito_core.serving.face.Face
    app = Face(app)

It adds ``POST /chat`` (`kaito_core.serving.chat`), ``GET /`` and ``GET /healthz`` as KAITO has them, its own figures to
``GET /metrics``, the API key, limits, and the events by which an idle GPU is noticed (`kaito_core.serving.activity`).

What it has nothing to do with it hands to the engine as it is: ``receive`` untouched, ``send`` behind one small object that looks at
the type of each message. Nothing is buffered and nothing is parsed. Standard library only, so that it can be loaded into the
environment of any engine."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from kaito_core.serving import asgi, chat
from kaito_core.serving.activity import Activity
from kaito_core.serving.api_key import CODE, REFUSAL, ApiKey
from kaito_core.serving.asgi import Answer, App, Message, Receive, Scope, Send, Watched
from kaito_core.serving.errors import HttpError, read_object
from kaito_core.serving.metrics import CONTENT_TYPE, Metrics
from kaito_core.serving.settings import Settings

OPEN: Final = frozenset({"/", "/health", "/healthz", "/metrics"})
"""What is answered without the API key: probes and scrapers have none, and nothing there is secret."""

NOT_READY: Final = "Model not initialized"
"""KAITO's words."""

LONGEST_RETRY: Final = 60
"""Seconds that a client is told to wait at most."""

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
        """A request to the model."""
        self._check_key(scope, "POST", path)
        length = _content_length(scope)
        if length is not None and length > self._settings.max_body:
            raise self._too_large()
        if self._most and self.metrics.in_flight >= self._most:
            self.metrics.rejected += 1
            raise self._overloaded()
        route = self._routes.get(("POST", path), self._app)
        started = time.monotonic()
        self._activity.began()
        try:
            if length is None:
                await self._limited(route, scope, receive, send)
            else:
                await route(scope, receive, send)
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

    def _too_large(self) -> HttpError:
        return HttpError(
            413, f"a request may have {self._settings.max_body:,} bytes and not more", code="request_too_large"
        )

    async def _limited(self, route: _Route, scope: Scope, receive: Receive, send: Watched) -> None:
        """A body whose length nobody has said is counted while it comes. Past the limit, whatever the application makes of the
        error in its ``receive``, the client gets a 413."""
        seen, too_large = 0, False

        async def counted() -> Message:
            nonlocal seen, too_large
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._settings.max_body:
                    too_large = True
                    raise self._too_large()
            return message

        async def unless_too_large(message: Message) -> None:
            if not too_large or send.status:
                await send(message)

        try:
            await route(scope, counted, unless_too_large)
        except Exception:
            if not too_large:
                raise
        if too_large and not send.status:
            raise self._too_large()

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
        body = await _body(receive)
        if body is None:
            return
        asked = chat.read(read_object(body), self._settings)
        model = await self._chat_model(scope, receive)
        tokens = await self._prompt_tokens(scope, receive, model, asked) if asked.counts_prompt else None
        request = chat.engine_request(asked, model, tokens)
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


def _content_length(scope: Scope) -> int | None:
    """What the client says; None when it says nothing that is a number, and then the body is counted."""
    value = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
    return int(value[:20]) if value.isdigit() else None


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None when the client went away first."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


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
    body = error.body()
    if path == "/chat":
        body["detail"] = error.message
    await asgi.respond_json(send, error.status, body, error.headers)
