"""``python -m kaito_core.stages NAME``."""

from __future__ import annotations

import importlib
import sys

from kaito_core.stages.process import run_stage

NAMES = ("fetch", "check", "push")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in NAMES:
        print(f"usage: python -m kaito_core.stages {'|'.join(NAMES)}", file=sys.stderr)
        return 2
    name = arguments[0]
    return run_stage(name, importlib.import_module(f"kaito_core.stages.{name}").body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
