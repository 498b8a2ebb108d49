"""vLLM serving for kaito. This module imports nothing: the control side must stay light."""

__version__ = "0.1.0"
