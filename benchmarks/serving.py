"""Serving with vLLM: what the endpoint's face costs, what a start is made of, and the memory estimate against what is measured.

    KAITO_VLLM_PYTHON=…/bin/python python benchmarks/serving.py

On a CPU with the demonstration model, some ten minutes. One engine, started as the plan starts it; each round goes once through the face
and twice around it, in changing order, to the same engine: a header says which. Medians over the rounds of the ratios, and between which
values 95 % of the medians of resampled rounds lie (bootstrap). The second time around it is the control: what its ratio is away from 1 is
chance, and a cost of the face that is smaller cannot be seen here. So its own cost is measured apart: the processor time of a request
through the face, around an application that only sends a stream, less that without it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

MIB, GIB = 1 << 20, 1 << 30
HEADER = b"x-without-face"

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]


class Switch:
    """ASGI middleware, in the face's place inside vLLM: the face, or the engine as it is, as the request wishes."""

    def __init__(self, app: App) -> None:
        from kaito_core.serving.face import Face

        self.app, self.face = app, Face(app)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        bare = scope["type"] == "http" and any(name == HEADER for name, _ in scope["headers"])
        await (self.app if bare else self.face)(scope, receive, send)


# --- the server -------------------------------------------------------------------------------------------------------

MARKS = (
    ("launcher: the job, the folder, the command line", r"^\+ "),
    ("Python imports vLLM, reads its flags", r"non-default args"),
    ("model configuration, engine process", r"Initializing a V1 LLM engine"),
    ("worker process", r"Starting to load model"),
    ("weights", r"Loading weights took"),
    ("cache, compilation, warm-up", r"init engine \("),
    ("HTTP server", r"Application startup complete"),
)
"""The parts of a start, each up to the line of the log that ends it."""


class Server:
    """vLLM by its launcher, with the time of every line that it prints."""

    def __init__(self, folder: Path, tokens: int) -> None:
        from kaito_core.plugins import Offer
        from kaito_core.workloads.serving import ServingJob
        from kaito_preset_demo import MODEL_DIR
        from kaito_preset_demo.plugin import kaito_presets
        from kaito_runtime_vllm.plugin import VllmRuntime

        (self.preset,) = kaito_presets()
        runtime = VllmRuntime()
        machine = Offer("here", os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        config = runtime.resolve(self.preset, None, ())
        self.fit = runtime.fit(self.preset, config, machine, 1, ())
        job = ServingJob("benchmark", "default", self.preset, "vllm", config, self.fit.configuration)
        (folder / "job.json").write_text(job.to_json())
        with socket.create_server(("127.0.0.1", 0)) as s:
            self.port = s.getsockname()[1]
        python = os.environ.get("KAITO_VLLM_PYTHON", sys.executable)
        environment = {**os.environ, "KAITO_JOB": str(folder / "job.json"), "KAITO_WEIGHTS": str(MODEL_DIR), "KAITO_HOST": "127.0.0.1",
                       "KAITO_PORT": str(self.port), "KAITO_RESULTS": str(folder), "KAITO_MAX_REQUESTS": str(job.configuration.requests),
                       "PYTHONPATH": str(Path(__file__).parent)}  # fmt: skip
        # The launcher with the switch in the face's place, and nothing else changed.
        launch = "import kaito_runtime_vllm.arguments as a; a.FACE = 'serving.Switch'; from kaito_runtime_vllm.serve import main; main()"
        self.seen: list[tuple[float, str]] = []
        self.started = time.monotonic()
        self.process = subprocess.Popen([python, "-c", launch], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        start_new_session=True)  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()
        self.request = {"model": self.preset.name, "stream": True, "temperature": 0, "max_tokens": tokens, "ignore_eos": True,
                        "messages": [{"role": "user", "content": "What is the capital of France?"}]}  # fmt: skip

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.seen.append((time.monotonic(), line))

    def parts(self) -> Iterator[tuple[str, float]]:
        """The parts of the start, in seconds."""
        before = self.started
        for name, pattern in MARKS:
            at = next((t for t, line in self.seen if re.search(pattern, line)), None)
            if at is not None:
                yield name, at - before
                before = at

    async def ready(self) -> None:
        while True:
            if self.process.poll() is not None:
                raise SystemExit("".join(line for _, line in self.seen[-30:]))
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                ok = (await reader.readline()).split()[1:2] == [b"200"]
                writer.close()
                if ok:
                    return
            except OSError:
                pass
            await asyncio.sleep(0.05)

    def processes(self) -> list[int]:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid:  # the session
                found.append(int(stat.parent.name))
        return found

    def memory(self) -> int:
        """Bytes that its processes hold together; what they share is counted once."""
        texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self.processes()]
        return sum(int(m[1]) * 1024 for t in texts if (m := re.search(r"^Pss:\s+(\d+) kB", t, re.M)))

    def cpu(self) -> float:
        """Processor seconds of the process that has the HTTP server, all its threads."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(t.read_text().split()[0]) for t in tasks) / 1e9

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


# --- the clients ------------------------------------------------------------------------------------------------------


async def ask(server: Server, count: int, bare: bool, firsts: list[float]) -> None:
    """So many requests one after the other on one connection; the seconds to each first token."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = json.dumps(server.request).encode()
    extra = HEADER + b": 1\r\n" if bare else b""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + extra
    message = head + b"content-length: %d\r\n\r\n" % len(body) + body
    for _ in range(count):
        begun, first = time.perf_counter(), 0.0
        writer.write(message)
        status = await reader.readline()
        if b" 200 " not in status:
            raise SystemExit(f"the endpoint said {status!r}")
        # Chunks of HTTP: one event of the stream each, or several.
        await reader.readuntil(b"\r\n\r\n")
        while size := int(await reader.readline(), 16):
            chunk = await reader.readexactly(size + 2)
            if not first and b'"content":"' in chunk and b'"content":""' not in chunk:
                first = time.perf_counter() - begun
        await reader.readline()
        firsts.append(first)
    writer.close()


async def round_of(server: Server, clients: int, requests: int, bare: bool) -> dict[str, float]:
    firsts: list[float] = []
    cpu, begun = server.cpu(), time.perf_counter()
    await asyncio.gather(*(ask(server, requests // clients, bare, firsts) for _ in range(clients)))
    seconds = time.perf_counter() - begun
    return {
        "rate": len(firsts) / seconds,
        "first": 1000 * statistics.median(firsts),
        "cpu": 1000 * (server.cpu() - cpu) / len(firsts),
    }


ORDERS = tuple(itertools.permutations(("face", "bare", "control")))


def ratio_of(ratios: list[float]) -> str:
    """Their median, and where 95 % of the medians of resampled rounds lie."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
    return f"{statistics.median(ratios):.3f} ({medians[50]:.3f} – {medians[-51]:.3f})"


async def face_alone(tokens: int, requests: int = 20_000) -> float:
    """Microseconds of processor time that the face takes of a request whose answer is streamed in so many pieces."""
    from kaito_core.serving.face import Face

    async def app(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(tokens):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: object) -> None:
        pass

    headers = [(b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", b"2")]
    seconds = []
    for around in (app, Face(app)):
        begun = time.process_time()
        for _ in range(requests):
            scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
            await around(scope, receive, send)
        seconds.append(time.process_time() - begun)
    return 1e6 * (seconds[1] - seconds[0]) / requests


async def measure(server: Server, given: argparse.Namespace) -> None:
    await server.ready()
    ready = time.monotonic() - server.started
    firsts: list[float] = []
    await ask(server, 1, False, firsts)
    print("| a start | s |\n|---|---|")
    parts = list(server.parts())
    for name, seconds in parts:
        print(f"| {name} | {seconds:.2f} |")
    print(
        f"| `/health` answers 200, after the start | {ready:.2f} |\n| the first request's first token, after its request | {firsts[0]:.2f} |\n"
    )

    for clients in (1, given.clients):
        await round_of(server, clients, given.requests, False)
        found: dict[str, list[dict[str, float]]] = {"face": [], "bare": [], "control": []}
        for number in range(given.rounds):
            order = ORDERS[number % len(ORDERS)]
            for way in order:
                found[way].append(await round_of(server, clients, given.requests, way != "face"))
        print(
            f"| {clients} at once, {given.tokens} tokens each | bare engine | through the face | face / bare | control / bare |\n"
            "|---|---|---|---|---|"
        )
        for key, name in (("rate", "requests/s"), ("first", "ms to the first token, median"),
                          ("cpu", "ms of processor for a request, HTTP server")):  # fmt: skip
            a, b = (statistics.median(r[key] for r in found[way]) for way in ("bare", "face"))
            face, control = (
                ratio_of([x[key] / y[key] for x, y in zip(found[way], found["bare"], strict=True)])
                for way in ("face", "control")
            )
            print(f"| {name} | {a:.2f} | {b:.2f} | {face} | {control} |")
        print()

    print(f"The face alone: {await face_alone(given.tokens):.0f} µs of processor for a request.\n")
    measured, estimate = server.memory(), server.fit.memory
    print("| memory | MiB |\n|---|---|")
    for item in estimate.items:
        print(f"| {item.name}: {item.formula} | {item.bytes / MIB:,.0f} |")
    print(f"| estimated | {estimate.total / MIB:,.0f} |\n| measured, all processes | {measured / MIB:,.0f} |")
    print(f"| estimated / measured | {estimate.total / measured:.2f} |")


def main() -> None:
    p = argparse.ArgumentParser(description="vLLM through kaito's face and around it.")
    p.add_argument("--rounds", type=int, default=12, help="each once through the face and twice around it")
    p.add_argument("--requests", type=int, default=32, help="in each of them")
    p.add_argument("--clients", type=int, default=8, help="at once, in the second half; one at a time in the first")
    p.add_argument("--tokens", type=int, default=16, help="of each answer")
    given = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), given.tokens)
        try:
            asyncio.run(measure(server, given))
        finally:
            server.end()


if __name__ == "__main__":
    main()
