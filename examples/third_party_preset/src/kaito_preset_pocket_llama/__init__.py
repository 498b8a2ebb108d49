"""The model pocket-llama for kaito"""

__version__ = "0.1.0"
