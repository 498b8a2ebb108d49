"""OCI images for adapters and data: build, push, pull, credentials, model card. No container daemon is needed."""
