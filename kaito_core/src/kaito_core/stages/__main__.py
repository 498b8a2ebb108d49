"""``python -m kaito_core.stages NAME``."""

from __future__ import annotations

import importlib
import sys

from kaito_core.stages.process import SERVING, TUNING, run_stage

NAMES = ("fetch", "check", "push", "fetch-model", "check-model")
_OF_SERVING = "-model"
"""Ends the names of an endpoint's stages; in its workload, and in its events, they are called ``fetch`` and ``check`` as well."""


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in NAMES:
        print(f"usage: python -m kaito_core.stages {'|'.join(NAMES)}", file=sys.stderr)
        return 2
    name = arguments[0]
    body = importlib.import_module(f"kaito_core.stages.{name.replace('-', '_')}").body
    if name.endswith(_OF_SERVING):
        return run_stage(name.removesuffix(_OF_SERVING), body, SERVING)
    return run_stage(name, body, TUNING)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
