"""How long a plan over the whole catalogue takes: ``python benchmarks/plan.py [RUNS]``.

The model is Phi-3-mini with the quick start's settings and data of known size. Every machine is offered in every region whose price
is known, on demand and as spot, by a provisioner that is not there. Prints medians over RUNS (default 15). Measure on an idle machine.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kaito_core.api import load_text
from kaito_core.planning import catalogue, prices
from kaito_core.planning.plan import Catalog, plan
from kaito_core.plugins.manager import load_plugins
from kaito_core.plugins.types import DataFacts, Offer

ROOT = Path(__file__).resolve().parent.parent
KAITO = Path(sys.executable).with_name("kaito")
QUICKSTART = ROOT / "examples" / "kaito-quickstart.yaml"
ANY_MACHINE = QUICKSTART.read_text(encoding="utf-8").replace('instanceType: "Standard_NC6s_v3"', "capacityType: auto")
DATA = DataFacts(rows=15_000, tokens=3_000_000, trained_tokens=1_500_000, longest=900, sequences=2_000)


def everything() -> tuple[Offer, ...]:
    """Every machine in every region that sells it, on demand and as spot."""
    table = prices.table()
    found: list[Offer] = []
    for cloud in catalogue.CLOUDS:
        types = [o for o in catalogue.instance_types().values() if o.cloud == cloud]
        regions = sorted({r for o in types for r in table.regions(o.instance_type)})
        found += catalogue.offers(cloud, regions, ("on-demand", "spot"))
    return tuple(replace(o, provisioner="benchmark") for o in found)


def timed(runs: int, act: Callable[[], object]) -> list[float]:
    act()
    taken = []
    for _ in range(runs):
        begin = time.perf_counter()
        act()
        taken.append(time.perf_counter() - begin)
    return sorted(taken)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    workspace = load_text(ANY_MACHINE).workspaces[0]
    here = tuple(o for c in catalogue.CLOUDS for o in catalogue.offers(c, (), ("on-demand", "spot")))
    plugins = load_plugins()
    rows = []
    for name, offers in (("at the reference regions", here), ("in every region", everything())):
        catalog = Catalog(plugins, offers, data=DATA)
        taken = timed(runs, lambda catalog=catalog: plan(workspace, catalog))  # type: ignore[misc]
        rows.append((f"`plan()` over {len(offers):,} offers {name}", taken, 1000, "ms"))

    def shell() -> None:
        command = [KAITO, "plan", "-"]
        subprocess.run(command, input=ANY_MACHINE, text=True, capture_output=True, check=True)

    rows.append(("`kaito plan` from the shell, any machine", timed(runs, shell), 1, "s"))
    print("| what | median | min – max |\n|---|---|---|")
    for name, taken, factor, unit in rows:
        low, middle, high = (factor * t for t in (taken[0], statistics.median(taken), taken[-1]))
        digits = 1 if unit == "ms" else 3
        print(f"| {name} | {middle:.{digits}f} {unit} | {low:.{digits}f} – {high:.{digits}f} {unit} |")


if __name__ == "__main__":
    main()
