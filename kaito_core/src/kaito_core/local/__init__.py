"""Runs a `Workload` as processes on this machine: no cluster, no container engine, no account."""
