"""The engine as an ASGI application: OpenAI's endpoints, and no framework for six of them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from jinja2 import TemplateError

from kaito_core.serving import metrics
from kaito_core.serving.asgi import Message, Receive, Scope, Send, respond, respond_json
from kaito_core.serving.errors import HttpError, read_object
from kaito_runtime_transformers import protocol
from kaito_runtime_transformers.protocol import EngineDied, Request, Sampling, Usage
from kaito_runtime_transformers.text import Text

if TYPE_CHECKING:  # they import torch, which takes seconds: health checks are answered before
    from kaito_runtime_transformers.engine import Engine
    from kaito_runtime_transformers.model import Voice

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]

RETRY_SECONDS: Final = 5


@dataclass
class _Answer:
    """One choice of an answer, as far as it is."""

    index: int
    prompt: list[int]
    pieces: list[str] = field(default_factory=list)
    tokens: int = 0
    reason: str = ""


class App:
    """``App()`` answers health checks; from ``ready(engine)`` on, requests."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._created = int(time.time())
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self._health},
            "/metrics": {"GET": self._metrics},
            "/v1/models": {"GET": self._models},
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._completions},
            "/tokenize": {"POST": self._tokenize},
        }

    def ready(self, engine: Engine) -> None:
        """From now on requests are answered."""
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            methods = self._routes.get(scope["path"])
            if methods is None:
                raise HttpError(404, f"there is no {scope['path'][:200]}", code="not_found")
            handler = methods.get("GET" if scope["method"] == "HEAD" else scope["method"])
            if handler is None:
                raise HttpError(405, f"{scope['path']} is asked with {', '.join(methods)}",
                                code="method_not_allowed", headers={"allow": ", ".join(methods)})  # fmt: skip
            await handler(scope, receive, watched)
        except HttpError as e:
            if not begun:
                await respond_json(send, e.status, e.body(), e.headers)

    # --- what is asked without a model

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        engine = self._engine
        if engine is None:
            await respond_json(send, 503, {"status": "loading"})
        elif not engine.alive:
            await respond_json(send, 503, {"status": "the engine has ended"})
        else:
            await respond_json(send, 200, {"status": "ok"})

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        lines = [
            "# HELP kaito_tokens_total Tokens by model and kind.",
            "# TYPE kaito_tokens_total counter",
            *(f'kaito_tokens_total{{model="{m}",kind="{k}"}} {n}' for (m, k), n in sorted(self._tokens.items())),
            "# HELP kaito_adapter_switches_total How often the model was switched to another adapter.",
            "# TYPE kaito_adapter_switches_total counter",
            f"kaito_adapter_switches_total {self._engine.switches if self._engine else 0}",
        ]
        await respond(send, 200, ("\n".join(lines) + "\n").encode(), {"content-type": metrics.CONTENT_TYPE})

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        engine = self._ready()
        voices = list(dict.fromkeys(engine.loaded.voices.values()))
        base = voices[0].name
        data = [
            {"id": v.name, "object": "model", "created": self._created, "owned_by": "kaito", "root": v.name,
             "parent": base if v.key else None, "max_model_len": engine.context}
            for v in voices
        ]  # fmt: skip
        await respond_json(send, 200, {"object": "list", "data": data})

    async def _tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        engine = self._ready()
        body = read_object(await _body(receive))
        chat = body.get("messages") is not None
        request = protocol.read({k: v for k, v in body.items() if k not in ("max_tokens", "stream")}, chat)
        ids = self._prompts(engine, request, self._voice(engine, request))[0]
        await respond_json(send, 200, {"count": len(ids), "max_model_len": engine.context, "tokens": ids})

    # --- answers

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(receive, send, chat=True)

    async def _completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(receive, send, chat=False)

    async def _answer(self, receive: Receive, send: Send, chat: bool) -> None:
        engine = self._ready()
        request = protocol.read(read_object(await _body(receive)), chat)
        voice = self._voice(engine, request)
        prompts = await asyncio.to_thread(self._prompts, engine, request, voice)
        answers = [_Answer(i, p) for i, p in enumerate(p for p in prompts for _ in range(request.n))]
        rooms = [self._room(engine, len(a.prompt), request.sampling) for a in answers]
        work = asyncio.ensure_future(self._all(engine, request, voice, answers, rooms, send, sum(map(len, prompts))))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (gone, work):
                task.cancel()
            with suppress(asyncio.CancelledError, HttpError):
                await work

    async def _all(
        self,
        engine: Engine,
        request: Request,
        voice: Voice,
        answers: list[_Answer],
        rooms: list[int],
        send: Send,
        read: int,
    ) -> None:
        ident = f"{'chatcmpl' if request.chat else 'cmpl'}-{uuid.uuid4().hex}"
        created = int(time.time())
        usage = Usage(prompt=read)
        try:
            if request.stream:
                await self._streamed(engine, request, voice, answers, rooms, send, ident, created, usage)
                return
            async with asyncio.TaskGroup() as group:
                for answer, room in zip(answers, rooms, strict=True):
                    group.create_task(_drained(self._pieces(engine, request, voice, answer, room)))
            usage.completion = sum(a.tokens for a in answers)
            texts, reasons = ["".join(a.pieces) for a in answers], [a.reason for a in answers]
            await respond_json(send, 200, protocol.whole(request, ident, created, voice.name, texts, reasons, usage))
        except BaseExceptionGroup as e:
            raise _error(e.exceptions[0]) from e
        except Exception as e:
            raise _error(e) from e
        finally:
            self._tokens[voice.name, "prompt"] += read
            self._tokens[voice.name, "generated"] += sum(a.tokens for a in answers)

    async def _streamed(
        self,
        engine: Engine,
        request: Request,
        voice: Voice,
        answers: list[_Answer],
        rooms: list[int],
        send: Send,
        ident: str,
        created: int,
        usage: Usage,
    ) -> None:
        """Server-sent events: a part at a time, then ``[DONE]``. What goes wrong after the first is a part with an error."""
        parts: asyncio.Queue[tuple[_Answer, str | None] | BaseException] = asyncio.Queue()

        async def one(answer: _Answer, room: int) -> None:
            try:
                async with aclosing(self._pieces(engine, request, voice, answer, room)) as pieces:
                    async for text in pieces:
                        parts.put_nowait((answer, text))
                parts.put_nowait((answer, None))
            except Exception as e:
                parts.put_nowait(e)

        tasks = [asyncio.ensure_future(one(a, r)) for a, r in zip(answers, rooms, strict=True)]
        begun = False

        async def event(value: Any) -> None:
            nonlocal begun
            if not begun:
                begun = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                if request.chat:
                    for a in answers:
                        await event(protocol.piece(request, ident, created, voice.name, a.index, None))
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            data = f"data: {text}\n\n".encode("utf-8", "replace")
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            open_ = len(answers)
            while open_:
                part = await parts.get()
                if isinstance(part, BaseException):
                    error = _error(part)
                    if not begun:
                        raise error
                    await event(error.body())
                    break
                answer, text = part
                reason = None if text is not None else answer.reason
                open_ -= text is None
                await event(protocol.piece(request, ident, created, voice.name, answer.index, text, reason))
            if request.include_usage and not open_:
                usage.completion = sum(a.tokens for a in answers)
                await event(protocol.usage_piece(request, ident, created, voice.name, usage))
            await event("[DONE]")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pieces(
        self, engine: Engine, request: Request, voice: Voice, answer: _Answer, room: int
    ) -> AsyncGenerator[str]:
        """The text of one answer in pieces; its reason is known in the end."""
        sampling = request.sampling
        text = Text(engine.loaded.tokenizer._tokenizer, sampling.stop)
        stops = engine.stops(voice, sampling)
        last = -1
        async with aclosing(engine.generate(voice, answer.prompt, sampling, room)) as generated:
            async for tokens in generated:
                answer.tokens += len(tokens)
                last = tokens[-1]
                if piece := text.feed(tokens[:-1] if last in stops else tokens):
                    answer.pieces.append(piece)
                    yield piece
                if text.stopped:
                    break
        if piece := text.end():
            answer.pieces.append(piece)
            yield piece
        answer.reason = "stop" if text.stopped or last in stops else "length"

    # --- what is asked for

    def _ready(self) -> Engine:
        if self._engine is None:
            raise HttpError(
                503, "the model is being loaded", code="loading", headers={"retry-after": str(RETRY_SECONDS)}
            )
        return self._engine

    def _voice(self, engine: Engine, request: Request) -> Voice:
        voices = engine.loaded.voices
        voice = voices.get(request.model or engine.loaded.default)
        if voice is None:
            names = ", ".join(dict.fromkeys(v.name for v in voices.values()))
            raise HttpError(404, f"there is no model {request.model[:200]!r} here: {names}", param="model",
                            code="model_not_found")  # fmt: skip
        return voice

    def _prompts(self, engine: Engine, request: Request, voice: Voice) -> list[list[int]]:
        tokenizer = engine.loaded.tokenizer
        if request.chat:
            return [self._conversation(tokenizer, request, voice)]
        special = True if request.add_special_tokens is None else request.add_special_tokens
        found = []
        size = engine.loaded.model.get_input_embeddings().weight.shape[0]
        for prompt in request.prompts:
            ids = tokenizer.encode(prompt, add_special_tokens=special) if isinstance(prompt, str) else list(prompt)
            if not ids:
                raise HttpError(400, "the prompt is empty", param="prompt")
            if max(ids) >= size:
                raise HttpError(400, f"prompt holds the token id {max(ids)}, and the model has {size}", param="prompt")
            found.append(ids)
        return found

    def _conversation(self, tokenizer: Any, request: Request, voice: Voice) -> list[int]:
        if voice.template is None and not tokenizer.chat_template:
            raise HttpError(400, "the model has no chat template: ask /v1/completions", param="messages")
        # What decides how a prompt is made is the endpoint's, not the request's.
        extra = {k: v for k, v in request.template_kwargs.items() if k not in _OURS}
        try:
            text = tokenizer.apply_chat_template(
                [dict(m) for m in request.messages],
                chat_template=voice.template,
                add_generation_prompt=True,
                tokenize=False,
                **extra,
            )
        except TemplateError as e:
            raise HttpError(400, f"the chat template refuses the conversation: {e.message or type(e).__name__}",
                            param="messages") from e  # fmt: skip
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as e:
            raise HttpError(400, f"the chat template breaks on the conversation: {e}"[:300], param="messages") from e
        ids: list[int] = tokenizer.encode(protocol.encodable("messages", text), add_special_tokens=False)
        if not ids:
            raise HttpError(400, "the conversation is empty", param="messages")
        return ids

    def _room(self, engine: Engine, prompt: int, sampling: Sampling) -> int:
        """Tokens that the answer may have. Raises `HttpError` when the request is longer than the context."""
        limit, why = engine.context, "the context of the endpoint is"
        if engine.alone(sampling):
            limit, why = engine.longest_alone, "requests with penalties, min_tokens, logit_bias or a seed may have"
        wanted = sampling.max_tokens
        if prompt + (wanted or 1) > limit:
            raise HttpError(
                400,
                f"{why} {limit} tokens, and the request has {prompt} in the prompt"
                + (f" and asks for {wanted}" if wanted else ""),
                param="messages" if wanted is None else "max_tokens",
                code="context_length_exceeded",
            )
        room = limit - prompt if wanted is None else wanted
        if sampling.min_tokens > room:
            words = f"min_tokens must be at most {room}, for which there is room behind the prompt"
            raise HttpError(400, words, param="min_tokens")
        return room


_OURS: Final = frozenset({
    "conversation", "chat_template", "add_generation_prompt", "tokenize", "return_tensors", "return_dict", "padding", "truncation",
    "max_length", "tokenizer_kwargs", "return_assistant_tokens_mask", "continue_final_message", "tools", "documents",
})  # fmt: skip


def _error(e: BaseException) -> HttpError:
    if isinstance(e, HttpError):
        return e
    words = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
    if isinstance(e, EngineDied):
        return HttpError(503, f"the engine has ended, and this server ends with it: {words}"[:300], code="engine_died")
    return HttpError(500, f"the model could not answer: {words}"[:300])


async def _drained(pieces: AsyncGenerator[str]) -> None:
    async with aclosing(pieces) as each:
        async for _ in each:
            pass


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise HttpError(400, "the request ended before its body did")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
