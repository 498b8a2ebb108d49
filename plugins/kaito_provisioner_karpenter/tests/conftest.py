"""What is needed of the machine: programs and definitions, which an environment variable names."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

CRDS = "KAITO_TEST_KARPENTER_CRDS"


@pytest.fixture(scope="session")
def crds() -> Path:
    """The folder with the definitions of Karpenter and its providers."""
    named = os.environ.get(CRDS)
    if not named:
        pytest.skip(f"{CRDS} is not set: it names a folder with the CRDs of karpenter and its providers")
    folder = Path(named).resolve()
    if not list(folder.glob("karpenter.sh_nodeclaims.yaml")):
        pytest.skip(f"the folder {folder} of {CRDS} has no karpenter.sh_nodeclaims.yaml")
    return folder
