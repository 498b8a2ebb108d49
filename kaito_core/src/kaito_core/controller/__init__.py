"""The Workspace controller: from a Workspace on a cluster to a pushed adapter, and nothing left behind."""
