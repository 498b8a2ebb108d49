"""GPU machines from Karpenter, as standalone NodeClaims."""

__version__ = "0.1.0"
