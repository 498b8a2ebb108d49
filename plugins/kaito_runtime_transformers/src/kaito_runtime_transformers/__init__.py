"""Serving with transformers. The planner's half imports no torch; the server's half is behind the extra ``[serve]``."""

__version__ = "0.1.0"
