"""GPU machines from Azure: agent pools of the AKS cluster that kaito runs in."""

__version__ = "0.1.0"
