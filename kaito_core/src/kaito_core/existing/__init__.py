"""Bring your own nodes: a node provisioner that buys nothing and finds what is there."""
