"""A fault in the middle of a step that many requests share: the thread that batches them dies, and the endpoint with it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from kaito_core.cli.status import command as status
from kaito_core.local.run import run
from kaito_core.local.state import RunFolder
from kaito_core.problems import Failure
from kaito_preset_demo import MODEL_DIR

from .conftest import RUNTIME, lay_out

pytestmark = pytest.mark.slow
pytest.importorskip("torch")
pytest.importorskip("uvicorn")

REASON = "RuntimeError: value cannot be converted to type int32 without overflow"

FAULT = """
import os
from transformers.generation.continuous_batching import cb_logits_processors

warper = cb_logits_processors.ContinuousBatchingTemperatureLogitsWarper
prepare = warper.prepare_tensor_args


def overflows(self, requests):
    if os.path.exists(os.environ["KAITO_TEST_FAULT"]):
        import torch

        torch.tensor([2**31], dtype=torch.int32)
    return prepare(self, requests)


warper.prepare_tensor_args = overflows
"""
"""Where the settings of requests become tensors, once a file is there."""


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Servers that are started from now on die in their next step once this is called."""
    place = tmp_path / "fault"
    place.mkdir()
    (place / "sitecustomize.py").write_text(FAULT)
    monkeypatch.setenv("PYTHONPATH", str(place))
    monkeypatch.setenv("KAITO_TEST_FAULT", str(place / "now"))
    return (place / "now").touch


def crowd(url: str, at: Callable[[], None]) -> list[httpx.Response]:
    """Requests that are being answered when ``at`` is called, two of them in one piece and one as a stream, and one that waits for its
    turn, since it is answered alone."""

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:

            async def post(**way: Any) -> httpx.Response:
                body = {"prompt": "What", "ignore_eos": True, "max_tokens": 900, **way}
                return await client.post("/v1/completions", json=body)

            async def in_flight(count: int) -> None:
                name = "\nkaito_requests_in_flight "
                while float((await client.get("/metrics")).text.split(name)[1].split()[0]) < count:
                    await asyncio.sleep(0.01)

            asked = [asyncio.ensure_future(post(**way)) for way in ({}, {}, {"stream": True})]
            await in_flight(3)
            asked.append(asyncio.ensure_future(post(seed=1)))
            await in_flight(4)
            at()
            return await asyncio.gather(*asked)

    return asyncio.run(ask())


def test_a_dead_engine_ends_the_endpoint_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None]
) -> None:
    """Every request hears of it, `kaito run` says why, and `kaito status` does not say Serving."""
    monkeypatch.setenv("KAITO_HOME", str(tmp_path))
    job = lay_out(tmp_path / "job")
    workload = RUNTIME.workload(job)
    folder = RunFolder.of("demo")
    folder.path.mkdir(parents=True)
    (folder.path / "weights").symlink_to(MODEL_DIR)
    before: list[str] = []
    answers: list[httpx.Response] = []

    def ask(url: str) -> None:
        try:
            answers.extend(crowd(url, fault))
        finally:
            fault()

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "answers":
            before.append(CliRunner().invoke(status, ["--local"]).output)
            asking.append(threading.Thread(target=ask, args=(event["url"],)))
            asking[0].start()

    asking: list[threading.Thread] = []
    with pytest.raises(Failure) as e:
        run(folder, replace(workload, stages=workload.stages[-1:]), job, {}, on_event, port=0)
    asking[0].join(60)
    one, other, stream, waited = answers
    assert [a.status_code for a in (one, other, waited)] == [503, 503, 503]
    errors = [a.json()["error"] for a in (one, other, waited)]
    last = stream.text if stream.status_code == 503 else stream.text.split("data: ")[-2]
    errors.append(json.loads(last)["error"])
    assert {e["code"] for e in errors} == {"engine_died"}
    assert "to type int32 without overflow" in errors[0]["message"]

    assert e.value.exit_code == 1
    assert e.value.problems[0].message == f"the engine has ended: {REASON}"
    assert f"error: the engine has ended: {REASON}" in folder.log("serve").read_text()
    assert "Serving" in before[0]
    after = CliRunner().invoke(status, ["demo", "--local"]).output
    assert "Serving" not in after
    assert "Failed" in after
    assert REASON in after
