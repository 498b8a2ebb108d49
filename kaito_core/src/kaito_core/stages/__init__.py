"""The commands that a workload runs around the training, ``python -m kaito_core.stages fetch|check|push``, and before the serving,
``fetch-model|check-model``.

They read the job, do one thing, and say how it went in the progress file; on a laptop they are processes, in a cluster
containers, and they do not know which.
"""
