"""How long the command line takes to start, from the shell: ``python benchmarks/cli.py [RUNS]``.

Prints the median and the range of wall-clock seconds over RUNS (default 15) runs after two that are not counted. Measure on
an idle machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KAITO = Path(sys.executable).with_name("kaito")

COMMANDS = {
    "kaito --help": ["--help"],
    "kaito plan (KAITO's quick start)": ["plan", str(ROOT / "examples" / "kaito-quickstart.yaml")],
    "kaito validate (KAITO's quick start)": ["validate", str(ROOT / "examples" / "kaito-quickstart.yaml")],
    "kaito plan (local data, tokenised)": ["plan", "--local", str(ROOT / "examples" / "quickstart.yaml")],
}


def seconds(arguments: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([KAITO, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - begin


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    print("| command | median s | min – max |\n|---|---|---|")
    for name, arguments in COMMANDS.items():
        taken = sorted([seconds(arguments) for _ in range(runs + 2)][2:])
        print(f"| `{name}` | {statistics.median(taken):.3f} | {taken[0]:.3f} – {taken[-1]:.3f} |")


if __name__ == "__main__":
    main()
