"""What is handed to plugins is a copy, and what they hand over is what it says."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kaito_core.kube.kinds import NODES
from kaito_core.plugins.records import flaw, own_copy
from kaito_core.plugins.types import NodeStatus, Offer, Preset, Transient, Watched
from kaito_core.testing.planning import PRESET
from kaito_core.workloads.workload import Mount, Stage, Workload

LEAVES = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
PLAIN = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.lists(inner).map(tuple)
)


def spoil(value: Any) -> None:
    """Change everything in it that can be changed."""
    if isinstance(value, dict):
        for inner in [*value.values()]:
            spoil(inner)
        value["spoilt"] = True
    elif isinstance(value, list | tuple):
        for inner in value:
            spoil(inner)
        if isinstance(value, list):
            value.append("spoilt")


@given(PLAIN)
def test_nothing_that_is_done_to_a_copy_reaches_the_original(value: Any) -> None:
    before = copy.deepcopy(value)
    copied = own_copy(value)
    assert (copied, type(copied)) == (value, type(value))
    spoil(copied)
    assert value == before


def test_records_are_copied_where_something_in_them_can_be_changed() -> None:
    workload = Workload("w", "", (Stage("s", ("a",), "k"),), (Mount("m", "/m", "M", {"hostPath": {}}),), env={"A": "1"})
    copied = own_copy(workload)
    assert copied == workload
    copied.env["A"] = "2"  # type: ignore[index]
    copied.mounts[0].source["hostPath"]["path"] = "/"  # type: ignore[index]
    assert (workload.env, workload.mounts[0].source) == ({"A": "1"}, {"hostPath": {}})
    offer = Offer("m", 1, 1)
    assert own_copy(offer) is offer  # nothing in it can be


def test_records_that_are_as_they_say_have_no_flaw() -> None:
    assert flaw(PRESET, Preset) == ""
    assert flaw(NodeStatus("r", "failed", failure=Transient("no"), selector={"a": "b"}), NodeStatus) == ""
    assert flaw(Watched(NODES), Watched) == ""
    assert flaw(Offer("m", 1, 1), Offer) == ""


def test_a_flaw_names_the_field_wherever_it_is() -> None:
    shape = replace(PRESET.architecture, linears={"q_proj": (8, "8")})  # type: ignore[dict-item]
    wrong = flaw(replace(PRESET, architecture=shape), Preset)
    assert wrong == "architecture.linears['q_proj'][1] is '8' (str), not a whole number"
    assert flaw(replace(PRESET, gated=1), Preset) == "gated is 1 (int), not a bool"  # type: ignore[arg-type]
    assert flaw(Watched("Node"), Watched) == "kind is 'Node' (str), not a Kind"  # type: ignore[arg-type]
    assert flaw(NodeStatus("r", "ready", nodes="ab"), NodeStatus).startswith("nodes is 'ab'")  # type: ignore[arg-type]
