"""Several machines live and die together: real processes, with a sleeping program in the engine's place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

Start = Callable[..., "subprocess.Popen[bytes]"]

RUN = """
import sys
from kaito_runtime_vllm import group
engine = [sys.executable, "-c", "import time; print('engine', flush=True); time.sleep(60)"]
which, port, greeting = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if which == "lead":
    sys.exit(group.lead(engine, {}, greeting, port))
sys.exit(group.follow(engine, {}, greeting, "localhost", port, patience=20))
"""


@pytest.fixture
def start() -> Iterator[Start]:
    with socket.create_server(("", 0)) as s:
        port = s.getsockname()[1]
    started = []

    def run(which: str, greeting: str = "of one endpoint", wait: bool = True) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", RUN, which, str(port), greeting], stdout=subprocess.PIPE,
                                   env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})  # fmt: skip
        started.append(process)
        if wait:
            assert process.stdout
            assert process.stdout.readline() == b"engine\n"
        return process

    yield run
    for process in started:
        process.terminate()
        process.wait(20)
        assert process.stdout
        process.stdout.close()


def test_when_the_first_machine_is_gone_the_others_end(start: Start) -> None:
    leader, worker = start("lead"), start("follow")
    leader.kill()
    assert worker.wait(20) == 1


def test_when_another_machine_is_gone_all_end(start: Start) -> None:
    leader, gone, worker = start("lead"), start("follow"), start("follow")
    gone.kill()
    assert leader.wait(20) == 1
    assert worker.wait(20) == 1


def test_a_worker_waits_for_the_first_machine(start: Start) -> None:
    worker = start("follow", wait=False)
    time.sleep(0.5)
    start("lead")
    assert worker.stdout
    assert worker.stdout.readline() == b"engine\n"


def test_strangers_who_come_and_go_change_nothing(start: Start) -> None:
    leader = start("lead")
    stranger = start("follow", "of another endpoint", wait=False)
    assert stranger.wait(20) == 1  # it is not let in
    time.sleep(1.0)
    assert leader.poll() is None


def test_a_signal_reaches_the_engine_and_its_exit_code_comes_back(start: Start) -> None:
    leader = start("lead")
    leader.send_signal(signal.SIGTERM)
    assert leader.wait(20) == 128 + signal.SIGTERM
