"""What a Workspace may not have in this cluster (`kaito_core.api.pod_security`), and from when on that counts.

A revision that was accepted once goes on, also when the platform has closed since then what it needs: it is neither stopped, nor rolled, nor
kept from another machine. Its next revision is refused."""

from __future__ import annotations

from kaito_core.api import conditions
from kaito_core.api.pod_security import forbidden
from kaito_core.controller.reconcile.case import Case, find, words
from kaito_core.problems import Problem

GOES_ON = "goes on as it is; its next revision is refused: "
"""Begins the message of ``Accepted``."""


def not_allowed(case: Case) -> list[Problem]:
    """Why the platform refuses to begin what the Workspace asks for now."""
    found = forbidden(case.workspace, case.world.settings.pod_security)
    if not case.history.recorded:
        return found
    # How a tuned model is served is no part of the revision: a change there is a new form, and is looked at by itself.
    return [p for p in found if case.serving and case.tunes and p.field.startswith("inference.")]


def warn_of_next_revision(case: Case) -> None:
    """Say in ``Accepted`` what goes on although it would not be accepted now."""
    accepted = find(case.status.get("conditions"), conditions.ACCEPTED)
    if accepted is None or accepted["status"] != "True":
        return
    found = forbidden(case.workspace, case.world.settings.pod_security)
    if found:
        case.set(conditions.ACCEPTED, "True", str(accepted["reason"]), f"{GOES_ON}{words(found)}")
    elif accepted.get("message", "").startswith(GOES_ON):
        case.set(conditions.ACCEPTED, "True", str(accepted["reason"]), "")
