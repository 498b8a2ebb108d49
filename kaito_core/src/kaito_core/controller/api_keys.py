"""The API key that an endpoint asks for, as far as the controller may look at it."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from kaito_core.api import labels
from kaito_core.kube.errors import Forbidden
from kaito_core.kube.kinds import SECRETS, Object
from kaito_core.serving.activator_gate import Lock
from kaito_core.workloads.endpoint import API_KEY

if TYPE_CHECKING:
    from kaito_core.kube.client import Client


def lock_of(client: Client, workspace: Object | None) -> Lock:
    """What a request has to bring that wakes this Workspace's endpoint. Raises `ApiError` when the API server does not answer."""
    metadata = (workspace or {}).get("metadata") or {}
    name = str((metadata.get("annotations") or {}).get(labels.API_KEY_SECRET) or "")
    if not name:
        return Lock()
    try:
        secret = client.get(SECRETS, name, metadata["namespace"]) or {}
        key = base64.b64decode((secret.get("data") or {}).get(API_KEY) or "").strip()
    except (Forbidden, ValueError):  # the chart's `secretNamespaces` says where it may look
        return Lock(closed=True)
    return Lock(closed=True, key=key)
