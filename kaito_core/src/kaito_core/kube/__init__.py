"""Kubernetes, as the rest of kaito sees it: objects are plain dicts, and everything goes through one `Client`.

Nobody else imports the ``kubernetes`` package.
"""
