"""GPU machines for kaito from machine-shop"""

__version__ = "0.1.0"
