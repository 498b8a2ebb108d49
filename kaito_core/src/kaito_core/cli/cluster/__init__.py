"""What the commands ``run``, ``status``, ``logs`` and ``delete`` do with Workspaces of a cluster."""
