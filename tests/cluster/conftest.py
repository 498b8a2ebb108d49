"""One system for all end-to-end tests: its images take minutes to build, and a machine carries the nodes of one cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.system import System, running_system


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running_system(tmp_path_factory.mktemp("user")) as found:
        yield found
