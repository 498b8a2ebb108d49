"""Imported first of all: the folder ``kaito_core/`` must not be taken for the package of that name, which is in its ``src``."""

from hypothesis import settings

import kaito_core.problems  # noqa: F401

# How long an example takes says something of the machine, and nothing of kaito: benchmarks measure that.
settings.register_profile("kaito", deadline=None)
settings.load_profile("kaito")
