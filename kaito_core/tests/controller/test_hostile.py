"""What strangers wrote, as it reaches the controller: one of them takes neither its memory, nor its workers, nor a place in its log."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kaito_core.controller.planner import Planner
from kaito_core.controller.reconcile.diagnosis import last_words
from kaito_core.kube.client import Client
from kaito_core.plugins.manager import PluginManager

from .simulation import workspace_object


class Nothing:
    """A cluster without any object."""

    def get(self, *_: Any) -> None:
        return None


def test_a_workspace_that_is_nested_too_deeply_is_refused_by_name() -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = {"a": deep}
    made = workspace_object(tuning=None, inference={"template": {"spec": deep}})
    planned = Planner(cast(Client, Nothing()), PluginManager(()), {})(made)
    assert planned.refusal == "InvalidWorkspace"
    assert [(p.field, p.message) for p in planned.problems] == [("inference", "is nested more than 64 deep")]


@pytest.mark.parametrize("message", ["[" * 4096, '{"a":' * 800, "9" * 4096, "\ud800", "null", "[]"])
def test_a_termination_message_of_a_pod_is_read_or_passed_over(message: str) -> None:
    assert last_words({"state": {"terminated": {"message": message}}}) == {}
