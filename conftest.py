"""Imported first of all: the folder ``kaito_core/`` must not be taken for the package of that name, which is in its ``src``."""

import kaito_core.problems  # noqa: F401
