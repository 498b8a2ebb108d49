"""An inference runtime as small as it can be: its server repeats what it is told, and fails as it is told.

``python -m kaito_core.testing.serving`` is the server. Its configuration is the job's:

``gib``     memory that it needs, in GiB
``die``     it ends with exit code 3: ``start`` at once, ``later`` after the first answer
``slow``    seconds between the words of an answer, and before it answers at all
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from kaito_core.plugins.types import (
    InferenceRuntime,
    MemoryEstimate,
    MemoryItem,
    Offer,
    Preset,
    ServedAdapter,
    ServingConfiguration,
    ServingFit,
)
from kaito_core.problems import Problem, UserError
from kaito_core.progress import FILE_NAME, Progress
from kaito_core.workloads.serving import ServingJob, serving_workload
from kaito_core.workloads.workload import Workload

GIB = 1 << 30


class Echo(InferenceRuntime):
    """Needs as many GiB as its configuration says, on all machines together. Serves on CPUs and GPUs; adapters whole or not at all."""

    name: ClassVar[str] = "echo"
    priority: ClassVar[int] = 5
    stages: ClassVar[bool] = True
    """Whether its workload has the stages before the server too."""

    def serves(self, preset: Preset) -> Problem | None:
        return Problem("it only repeats") if preset.architecture.name == "Silent" else None

    def resolve(
        self, preset: Preset, user: Mapping[str, Any] | None, adapters: tuple[ServedAdapter, ...]
    ) -> Mapping[str, Any]:
        problems = [
            Problem("strength is not possible here", 'write "1.0"', f"inference.adapters[{i}].strength")
            for i, a in enumerate(adapters)
            if a.strength != 1
        ]
        config = {"gib": 8, "die": "", "slow": 0, **((user or {}).get("echo") or {})}
        problems += [Problem(f"there is no setting {k}", field=f"echo.{k}") for k in config if k == "bad"]
        if problems:
            raise UserError(problems)
        return config

    def fit(
        self,
        preset: Preset,
        config: Mapping[str, Any],
        offer: Offer,
        machines: int,
        adapters: tuple[ServedAdapter, ...],
    ) -> ServingFit:
        memory = MemoryEstimate((MemoryItem("weights", int(config["gib"] * GIB / machines)),))
        device = "cuda" if offer.gpu and offer.gpus else "cpu"
        configuration = ServingConfiguration(device, "bfloat16", 4096, 8, pipeline=machines)  # type: ignore[arg-type]
        return ServingFit(configuration, memory, offer.device_memory, 32_768)

    def workload(self, job: ServingJob) -> Workload:
        made = serving_workload(job, serve=("python", "-m", "kaito_core.testing.serving"))
        return made if self.stages else replace(made, stages=made.stages[-1:])


# --- the server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    job: ClassVar[ServingJob]

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json(200, {"status": "ok"})
        elif self.path == "/v1/models":
            base, adapters = self.job.preset.name, [a.name for a in self.job.adapters]
            entries = [{"id": base}, *({"id": a, "parent": base} for a in adapters)]
            self._json(200, {"object": "list", "data": entries})
        else:
            self._json(404, {"error": {"message": f"there is no {self.path}"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", "0"))))
        known = [self.job.preset.name, *(a.name for a in self.job.adapters)]
        if body["model"] not in known:
            self._json(
                404, {"error": {"message": f"the model {body['model']!r} is not served", "code": "model_not_found"}}
            )
            return
        said, told = body["messages"], body["messages"][-1]["content"]
        words = f"{body['model']} hears {told!r} as {len(said)}. message".split(" ")
        if not body.get("stream"):
            message = {"role": "assistant", "content": " ".join(words)}
            self._json(200, {"choices": [{"message": message, "finish_reason": "stop"}]})
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for number, word in enumerate(words):
            time.sleep(float(self.job.config["slow"]))
            self._event({"choices": [{"delta": {"content": word if number == 0 else f" {word}"}}]})
        self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self.wfile.write(b"data: [DONE]\n\n")
        if self.job.config["die"] == "later":
            threading.Timer(0.1, os._exit, (3,)).start()

    def _event(self, value: Any) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def _json(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        print(format % arguments, flush=True)


def main() -> int:
    """Serve the job of this process until SIGTERM."""
    job = _Handler.job = ServingJob.load()
    if job.config["die"] == "start":
        print("the last words of the server", flush=True)
        return 3
    time.sleep(float(job.config["slow"]))
    Progress(Path(os.environ["KAITO_RESULTS"]) / FILE_NAME, "serve").emit("serving", requests=0)  # as kaito's face does
    server = ThreadingHTTPServer((os.environ["KAITO_HOST"], int(os.environ["KAITO_PORT"])), _Handler)
    server.daemon_threads = True
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(0.05)
    print("ended well", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
