"""``python -m kaito_core`` is ``kaito``."""

from kaito_core.cli import main

main()
