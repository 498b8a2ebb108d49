"""``python -m kaito_runtime_transformers``: serves the endpoint of ``$KAITO_JOB`` until SIGTERM.

The port is taken first and answers health checks while the model is loaded. SIGTERM lets streams in progress come to their end, for
`GRACE` seconds at most. When the engine dies the process ends too, with the reason; in a cluster the kubelet starts it again. Exit codes:
0 ended as asked, 1 failed, 2 the input is wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kaito_core.problems import Failure, KaitoError, UserError
from kaito_core.progress import FILE_NAME, Progress
from kaito_core.serving.activity import STAGE
from kaito_core.serving.face import Face
from kaito_core.serving.open_files import allow_many
from kaito_core.serving.settings import Settings
from kaito_core.workloads.serving import ServingJob
from kaito_runtime_transformers.plugin import TransformersRuntime

if TYPE_CHECKING:
    from kaito_runtime_transformers.app import App
    from kaito_runtime_transformers.engine import Engine

GRACE: Final = 25
"""Seconds: Kubernetes kills a container 30 seconds after SIGTERM unless told otherwise."""


ALIVE_CHECK_SECONDS: Final = 0.5
"""Between two looks whether the engine is alive; once more as long is waited for the reason of its death."""

DEAD_ENGINE_DRAIN_SECONDS: Final = 10
"""In which the requests that a dead engine has left get their error; each gets it within 5 s."""


def main() -> int:
    # Everything was fetched; nothing that a library wants to look up is worth waiting for.
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        job = ServingJob.load()
        if remedy := TransformersRuntime().missing():
            raise UserError("the serving libraries are not installed", remedy)
        from kaito_runtime_transformers.app import App

        app = App()
        face = Face(app, Settings.from_env())
        allow_many()
        with _listening() as s:
            return asyncio.run(_serve(job, app, face, s))
    except KaitoError as e:
        return _failed(e)


def _failed(error: KaitoError) -> int:
    """Says it, also in the progress file for whoever follows the workload; the exit code."""
    print(error, file=sys.stderr, flush=True)
    if results := os.environ.get("KAITO_RESULTS"):
        first = error.problems[0]
        fields = {"message": first.message, "remedy": first.remedy, "exit_code": error.exit_code}
        with suppress(OSError):
            events = Progress(Path(results) / FILE_NAME, STAGE)
            events.emit("failed", **fields, problems=[p.to_json() for p in error.problems])
    return error.exit_code


@contextmanager
def _listening() -> Iterator[socket.socket]:
    host, port = os.environ.get("KAITO_HOST", "127.0.0.1"), os.environ.get("KAITO_PORT", "5000")
    try:
        s = socket.create_server(
            (host, int(port)), backlog=2048, family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except (OSError, ValueError, OverflowError) as e:
        words = e.strerror if isinstance(e, OSError) else str(e)
        raise UserError(
            f"cannot listen on {host} port {port}: {words}", "choose another port, or end what uses it"
        ) from e
    with s:
        yield s


async def _serve(job: ServingJob, app: App, face: Face, s: socket.socket) -> int:
    import uvicorn

    from kaito_runtime_transformers.connection import Connection

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:  # uvicorn's own would end the process by the signal, not with 0
            yield

    config = uvicorn.Config(
        face,
        http=Connection,
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
        server_header=False,
    )
    server = Server(config)
    loop = asyncio.get_running_loop()

    def end() -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    loading: asyncio.Future[Engine] = loop.create_future()

    def load() -> None:
        found: Any
        try:
            found = _engine(job)
        except KaitoError as e:
            found = e
        except Exception as e:
            traceback.print_exc()
            text = next(iter(f"{type(e).__name__}: {e}".splitlines()), "")
            found = Failure(f"the model cannot be served: {text}", "this is a bug; the log has the traceback")
        try:
            loop.call_soon_threadsafe(_hand_over, loading, found)
        except RuntimeError:  # the loop has ended meanwhile
            if not isinstance(found, KaitoError):
                found.stop()

    # A daemon: loading cannot be interrupted, and whoever wants the process to end does not wait for it.
    threading.Thread(target=load, name="load", daemon=True).start()
    serving = asyncio.ensure_future(server.serve(sockets=[s]))
    first: list[asyncio.Future[Any]] = [serving, loading]
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    engine: Engine | None = None
    error: KaitoError | None = None
    if loading.done():
        try:
            engine = loading.result()
        except KaitoError as e:
            error = e
            end()
        else:
            app.ready(engine)
            names = ", ".join(dict.fromkeys(v.name for v in engine.loaded.voices.values()))
            together = "together" if engine.batches else "one at a time"
            print(
                f"serving {names} on port {s.getsockname()[1]}: {engine.context} tokens, requests {together}",
                flush=True,
            )
            dead = asyncio.ensure_future(_until_dead(engine))
            await asyncio.wait([serving, dead], return_when=asyncio.FIRST_COMPLETED)
            if dead.done():
                error = Failure(f"the engine has ended: {dead.result()}", "start the endpoint again; its log has more")
                config.timeout_graceful_shutdown = DEAD_ENGINE_DRAIN_SECONDS
                end()
            dead.cancel()
    await serving
    if engine is not None:
        await asyncio.to_thread(engine.stop)
    if error is not None:
        raise error
    return 0


async def _until_dead(engine: Engine) -> str:
    """Returns when the engine cannot answer any more: why."""
    while engine.alive:
        await asyncio.sleep(ALIVE_CHECK_SECONDS)
    await asyncio.sleep(ALIVE_CHECK_SECONDS)
    return engine.fault


def _hand_over(loading: asyncio.Future[Engine], found: Any) -> None:
    if not loading.done():
        if isinstance(found, KaitoError):
            loading.set_exception(found)
        else:
            loading.set_result(found)


def _engine(job: ServingJob) -> Engine:
    from kaito_runtime_transformers.engine import Engine, Layout
    from kaito_runtime_transformers.estimate import cache_tokens
    from kaito_runtime_transformers.model import device_memory, load

    weights, adapters = (Path(os.environ.get(v, "")) for v in ("KAITO_WEIGHTS", "KAITO_ADAPTERS"))
    if not os.environ.get("KAITO_WEIGHTS") or not (weights / "config.json").is_file():
        raise UserError(f"there is no model in {weights}: no config.json", "the stage `fetch` puts it there")
    loaded = load(job, weights, adapters)
    tokens = cache_tokens(
        job.preset, job.config, job.configuration, job.adapters, device_memory(job.configuration.device)
    )
    layout = Layout.of(job.configuration, job.config, tokens)
    engine = Engine(loaded, layout, say=lambda text: print(text, flush=True))
    engine.start()
    return engine


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a library that still load or compute are no reason to stay
