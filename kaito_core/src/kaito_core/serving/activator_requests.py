"""What the activator does with a request: probes are answered at once, the rest waits for the endpoint and is handed on."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, Final

import h11

from kaito_core.serving.activator_client import LINGER, Body, Client, Held
from kaito_core.serving.activator_endpoint import AGAIN, SOON, Endpoint, Unserved
from kaito_core.serving.activator_http import (
    PIECE,
    BrokenOff,
    ClientGone,
    CutOff,
    Headers,
    Limits,
    Malformed,
    NoAnswer,
    Unreachable,
    end_to_end,
    host_and_port,
    path_of,
)
from kaito_core.serving.activator_server import Server
from kaito_core.serving.errors import HttpError

RESENT: Final = 2
"""How often a request that a server got and did not answer is sent again. It may be what killed the server."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
"""Seconds between tries to reach an endpoint that is marked ready."""

STREAMS: Final = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Where ``"stream": true`` in the body asks for server-sent events."""

HEALTH: Final = frozenset({"/", "/health", "/healthz"})
PROBES: Final = HEALTH | {"/metrics", "/v1/models"}
"""What is asked for all day by load balancers, monitoring and user interfaces, and must not buy a GPU."""

JSON: Final = "application/json"

log = logging.getLogger("kaito_core.serving.activator")


async def converse(client: Client, endpoint: Endpoint, patience: float, held: Held, limits: Limits) -> None:
    """Everything on one connection, request after request."""
    try:
        while not endpoint.closing and (request := await client.request()) is not None:
            if not await _one(client, request, endpoint, patience, held, limits):
                return
    except Malformed as e:
        await _try_to_answer(client, Unserved(e.status, e.message, "malformed_request"))
    except ClientGone:
        client.abort()
    except CutOff:
        client.cut_off()
    except Exception:
        log.exception("a request to %s failed", endpoint)
        await _try_to_answer(client, Unserved(500, "the activator failed; its log says more", "activator_failed"))
    finally:
        await client.close()


async def _one(
    client: Client, request: h11.Request, endpoint: Endpoint, patience: float, held: Held, limits: Limits
) -> bool:
    """One request; whether another may follow."""
    body = Body(held, limits.body)
    exchange = Exchange(client, request, body, endpoint, patience, limits)
    answering = asyncio.create_task(exchange.run())
    listening = asyncio.create_task(_listen(client, exchange, body))
    try:
        await asyncio.wait({answering, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            listening.result()
            raise ClientGone
        answering.result()
        exchange.admitted.set()
        if client.http.our_state is h11.DONE and not body.complete:
            rest = asyncio.create_task(body.rest())
            await asyncio.wait({rest, listening}, timeout=LINGER, return_when=asyncio.FIRST_COMPLETED)
            await _end(rest)
        return client.reusable
    finally:
        await _end(answering)
        await _end(listening)
        body.close()


async def _listen(client: Client, exchange: Exchange, body: Body) -> None:
    """Nobody is told to go on with a body before it is known that he may come in."""
    await exchange.admitted.wait()
    await client.take_in(body)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def _try_to_answer(client: Client, e: Unserved) -> None:
    if client.began or client.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        client.cut_off()
        return
    try:
        await _answer(client, e, close=True)
    except ClientGone:
        client.abort()


async def _answer(client: Client, e: Unserved, *, close: bool) -> None:
    more: Headers = [(b"Retry-After", str(e.again).encode())] if e.again is not None else []
    if e.status == 401:
        more.append((b"WWW-Authenticate", b"Bearer"))
    await client.answer(e.status, _json(e.body), JSON, more, close=close)


class Exchange:
    """One request and its answer."""

    def __init__(
        self, client: Client, request: h11.Request, body: Body, endpoint: Endpoint, patience: float, limits: Limits
    ) -> None:
        self._client, self._request, self._body, self._endpoint = client, request, body, endpoint
        self._limits, self._patience = limits, patience
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + patience
        self._target = path_of(request.target) or b"/"
        self._path = self._target.partition(b"?")[0].decode("latin-1")
        self.admitted = asyncio.Event()
        """Set when the request may wait, or is handed on."""
        self._let_in = False
        self._waited = False
        self._failed = ""
        """The address where the last try failed."""
        self._why = ""
        self._next_try = 0.0
        self._streams: bool | None = None
        self._said: str | None = None
        """The last words to a client that streams; None before the first."""
        self._say_at = 0.0

    async def run(self) -> None:
        """Answer the request. Raises `ClientGone` and `CutOff`."""
        try:
            if self._via in (v.strip() for n, v in self._request.headers if n == b"via" for v in v.split(b",")):
                raise Unserved(508, f"the address of the endpoint {self._endpoint} leads back here", "loop_detected")
            if self._probe and not self._endpoint.address:
                await self._answer_probe()
            else:
                await self._serve()
        except Unserved as e:
            if self._said is not None:
                await self._end_stream(e.body)
            elif self._probe and self._path in HEALTH:
                await self._answer_probe()
            else:
                await _answer(self._client, e, close=bool(self._endpoint.closing))

    async def _serve(self) -> None:
        if not self._endpoint.address:
            await self._check_key()
            if gone := self._endpoint.gone():
                raise gone
        self.admitted.set()
        lost, pause = 0, FIRST_PAUSE
        while True:
            address = await self._until_ready()
            status, wait = 503, pause
            try:
                after = await self._hand_on(address)
                if after is None:
                    return
                self._why, wait = "it is full", max(pause, after)
            except Unreachable as e:
                self._why = str(e)
            except BrokenOff as e:
                self._why, status, lost = str(e), 502, lost + 1
            except NoAnswer as e:
                self._why, status, lost = str(e), 502, RESENT + 1
            if self._probe or lost > RESENT or not self._body.whole:
                raise Unserved(status, f"the endpoint {self._endpoint} failed: {self._why}", "endpoint_failed", SOON)
            self._failed, self._next_try = address, self._loop.time() + wait
            pause = min(2 * pause, LONGEST_PAUSE)

    # Waiting

    async def _until_ready(self) -> str:
        """The address to send the request to. Raises `Unserved` and `ClientGone`."""
        endpoint = self._endpoint
        if endpoint.address and not self._failed:
            return endpoint.address
        await self._check_key()
        if not self._waited:
            endpoint.check_room()
            await self._take_in()
        with endpoint.waiting(again=self._waited) as waiter:
            self._waited = True
            self._body.at_end = waiter.changed.set
            while True:
                waiter.changed.clear()
                now = self._loop.time()
                if waiter.refusal is not None:
                    raise waiter.refusal
                if endpoint.address and (endpoint.address != self._failed or now >= self._next_try):
                    return endpoint.address
                if now >= self._deadline:
                    message = f"the endpoint {endpoint} was not there within {self._patience:g} s: {self._words}"
                    raise Unserved(503, message, "endpoint_asleep", AGAIN)
                until = min(self._deadline, self._next_try) if endpoint.address else self._deadline
                if self._is_stream():
                    until = min(until, await self._say(now))
                try:
                    async with asyncio.timeout_at(until):
                        await waiter.changed.wait()
                except TimeoutError:
                    pass

    async def _check_key(self) -> None:
        """Who has no key wakes nobody. Where there is a pod, it is the pod that asks for it."""
        if not self._let_in:
            await self._endpoint.gate.let_in(self._request.headers)
            self._let_in = True

    async def _take_in(self) -> None:
        """A request takes a place among those that wait, and wakes the endpoint, once it is here. Raises `Malformed`."""
        seconds = self._limits.body_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._body.enough.wait()
        except TimeoutError:
            raise Malformed(408, f"the body of the request did not come within {seconds:g} s") from None

    @property
    def _words(self) -> str:
        """What is being waited for, in one line."""
        if self._endpoint.address:
            words = f"waiting for the endpoint to answer: {self._why}"
        else:
            words = self._endpoint.words or "waiting for the endpoint to start"
        return " ".join(words.split())

    def _is_stream(self) -> bool:
        """Whether the client asked for events, and can therefore be told what goes on."""
        if self._streams is None and self._body.complete:
            self._streams = (
                self._request.method == b"POST"
                and self._path in STREAMS
                and self._body.whole
                and _asks_for_events(self._body.data)
            )
        return bool(self._streams)

    async def _say(self, now: float) -> float:
        """A sign of life for a client that streams, if it is time; when the next is due."""
        words = self._words
        events: list[h11.Event] = []
        if self._said is None:
            head: Headers = [
                (b"Content-Type", b"text/event-stream; charset=utf-8"),
                (b"Cache-Control", b"no-cache"),
                (b"Connection", b"close"),
            ]
            events.append(h11.Response(status_code=200, headers=head))
        if words != self._said or now >= self._say_at:
            events.append(h11.Data(data=f": {words}\n\n".encode("utf-8", "replace")))
            self._said, self._say_at = words, now + self._limits.comment
            await self._client.send(*events)
        return self._say_at

    # Handing on

    async def _hand_on(self, address: str) -> float | None:
        """Send the request there and its answer back. None when that is done; seconds to wait where a request that has waited meets
        a server that is full. Raises `Unreachable`, and `BrokenOff` or `NoAnswer` before anything was answered."""
        request = self._for_server(address)
        server = await Server.connect(address, self._limits.connect)
        self._body.rewind()
        upload = asyncio.create_task(server.upload(request, self._body.piece))
        try:
            answer = await server.head()
            if answer.status_code == 429 and self._waited and self._body.whole and self._loop.time() < self._deadline:
                return _retry_after(answer)
            self._body.sent_for_good()
            if self._said is not None:
                await self._relay_events(answer, server)
            else:
                await self._relay(answer, server)
            return None
        finally:
            server.close()
            await _end(upload)

    async def _relay(self, answer: h11.Response, server: Server) -> None:
        # The next request of this client shall go to the endpoint itself.
        headers = [*end_to_end(answer.headers.raw_items()), (b"Connection", b"close")]
        response = h11.Response(status_code=answer.status_code, headers=headers, reason=answer.reason)
        await self._client.send(response)
        try:
            while piece := await server.piece():
                await self._client.send(h11.Data(data=piece))
        except BrokenOff as e:
            log.warning("an answer of %s was cut off: %s", self._endpoint, e)
            raise CutOff from None
        await self._client.send(h11.EndOfMessage())

    async def _relay_events(self, answer: h11.Response, server: Server) -> None:
        kind = next((v for n, v in answer.headers if n == b"content-type"), b"").partition(b";")[0].strip().lower()
        try:
            if answer.status_code == 200 and kind == b"text/event-stream":
                while piece := await server.piece():
                    await self._client.send(h11.Data(data=piece))
                await self._client.send(h11.EndOfMessage())
                return
            content = bytearray()
            while piece := await server.piece():
                content += piece
                if len(content) > PIECE:
                    break
            await self._end_stream(_error_of(answer.status_code, bytes(content)))
        except BrokenOff as e:
            error = HttpError(502, f"the endpoint {self._endpoint} failed: {e}", code="endpoint_failed")
            await self._end_stream(error.body())

    async def _end_stream(self, error: dict[str, Any]) -> None:
        """The end of a stream that began with 200 and came to nothing, as OpenAI's clients understand it."""
        # The empty line ends an event that was cut off.
        data = b"\n\ndata: " + _json(error) + b"\n\ndata: [DONE]\n\n"
        await self._client.send(h11.Data(data=data), h11.EndOfMessage())

    @property
    def _via(self) -> bytes:
        name = ".".join(reversed(self._endpoint.key))
        return f"1.1 kaito-activator.{name}".encode("ascii", "replace")

    def _for_server(self, address: str) -> h11.Request:
        """The head of the request as the endpoint's server gets it."""
        names = {name for name, _ in self._request.headers}
        # The head of a stream that has begun says that it is not compressed.
        without = [b"accept-encoding"] if self._said is not None else []
        expects = [v.strip().lower() for n, v in self._request.headers if n == b"expect"]
        headers = end_to_end(
            self._request.headers.raw_items(), [*without, *([b"expect"] if b"100-continue" in expects else [])]
        )
        if not any(name.lower() == b"host" for name, _ in headers):
            host, port = host_and_port(address)
            headers.insert(0, (b"Host", (f"[{host}]:{port}" if ":" in host else f"{host}:{port}").encode()))
        if b"transfer-encoding" in names:
            headers.append((b"Transfer-Encoding", b"chunked"))
        headers += [(b"Via", self._via), (b"Connection", b"close")]
        return h11.Request(method=self._request.method, target=self._target, headers=headers)

    # Probes

    @property
    def _probe(self) -> bool:
        return self._request.method in (b"GET", b"HEAD") and self._path in PROBES

    async def _answer_probe(self) -> None:
        """Health is 200 while the endpoint sleeps: it would answer a request. A load balancer that took a 503 for an answer would
        send it none, and then nothing would ever wake it; the same for a script that waits for health before it asks."""
        endpoint = self._endpoint
        close = bool(endpoint.closing)
        if self._path in HEALTH:
            wrong = endpoint.refused or endpoint.closing or (self._why if endpoint.address else "")
            state = {"status": "failed" if wrong else "asleep", "message": wrong or endpoint.words}
            await self._client.answer(503 if wrong else 200, _json(state), JSON, close=close)
        elif self._path == "/metrics":
            text = (
                "# HELP kaito_endpoint_waiting_requests Requests that wait for the endpoint to come up.\n"
                "# TYPE kaito_endpoint_waiting_requests gauge\n"
                f"kaito_endpoint_waiting_requests {len(endpoint.waiters)}\n"
            )
            await self._client.answer(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8", close=close)
        else:
            message = f"the endpoint {endpoint} is asleep; a request to one of its models wakes it"
            if endpoint.refused:
                message = f"the endpoint {endpoint} does not come up: {endpoint.refused}"
            await _answer(self._client, Unserved(503, message, "endpoint_asleep", AGAIN), close=close)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def _asks_for_events(body: bytes) -> bool:
    if b'"stream"' not in body:
        return False
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.get("stream") is True


def _error_of(status: int, content: bytes) -> dict[str, Any]:
    """The error in a server's answer, in OpenAI's form."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and isinstance(value.get("error"), dict):
        return {"error": value["error"]}
    if status == 200:
        return HttpError(502, "the endpoint did not answer with a stream", code="endpoint_failed").body()
    said = value.get("message") or value.get("detail") if isinstance(value, dict) else None
    message = said if isinstance(said, str) else content.decode("utf-8", "replace").strip()[:500]
    return HttpError(status, message or f"the endpoint answered HTTP {status}").body()


def _retry_after(answer: h11.Response) -> float:
    value = next((v for n, v in answer.headers if n == b"retry-after"), b"")
    return float(min(int(value), AGAIN)) if value.isdigit() and len(value) < 6 else 1.0
