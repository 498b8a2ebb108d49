"""gpu-provisioner's part: NodeClaims (karpenter.sh/v1) are fulfilled with agent pools, one pool for each claim.

`claim` reads a claim, `decide` says what follows from one (pure), and `controller` looks and does it."""
