"""Which AKS cluster the agent pools belong to, and what they are like; from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "subscription": ("KAITO_AKS_SUBSCRIPTION", "AZURE_SUBSCRIPTION_ID", "ARM_SUBSCRIPTION_ID"),
    "resource_group": ("KAITO_AKS_RESOURCE_GROUP", "AZURE_RESOURCE_GROUP", "ARM_RESOURCE_GROUP"),
    "cluster": ("KAITO_AKS_CLUSTER", "AZURE_CLUSTER_NAME"),
}
"""What has to be set, by the first name that is; the later ones are those of Azure's tools and of gpu-provisioner."""

DRIVERS: Final = ("Install", "None")
OS_DISK_GB: Final = 256
"""For images (a tuner's is 8 GB), weights (Phi-4: 30 GB), and checkpoints."""

SMALLEST_DISK_GB: Final = 30
"""AKS takes no less."""

TEST_TOKEN: Final = "kaito-test"  # noqa: S105 – for a server of a test, which knows nobody


@dataclass(frozen=True)
class Settings:
    """See `read`, which fills it in."""

    subscription: str
    resource_group: str
    cluster: str
    location: str = ""
    """Empty: read from the managed cluster."""
    endpoint: str = ""
    """Another base URL than Azure's own, for tests: it gets the static ``token``, never a real one."""
    token: str = TEST_TOKEN
    gpu_driver: str = "Install"
    """``Install``: AKS puts NVIDIA's driver on GPU machines; ``None``: somebody else does, as the GPU operator can."""
    os_disk_gb: int = OS_DISK_GB
    os_sku: str = "Ubuntu"
    subnet: str = ""
    """Resource id of a subnet for the machines; empty: AKS chooses."""


def read(environ: Mapping[str, str] = os.environ) -> tuple[Settings | None, str]:
    """The settings; None, and what has to be set, when something is missing or wrong."""
    found = {field: next((environ[n] for n in names if environ.get(n)), "") for field, names in NAMES.items()}
    missing = [NAMES[field][0] for field, value in found.items() if not value]
    if missing:
        return None, f"set {' and '.join(missing)}"
    driver = environ.get("KAITO_AKS_GPU_DRIVER") or DRIVERS[0]
    if driver not in DRIVERS:
        return None, f"KAITO_AKS_GPU_DRIVER is {driver!r}: set it to Install or None"
    disk = environ.get("KAITO_AKS_OS_DISK_GB") or str(OS_DISK_GB)
    if not disk.isdecimal() or int(disk) < SMALLEST_DISK_GB:
        return None, f"KAITO_AKS_OS_DISK_GB is {disk!r}: set it to a number of GB, {SMALLEST_DISK_GB} or more"
    settings = Settings(
        **found,
        location=plain(environ.get("KAITO_AKS_LOCATION") or environ.get("LOCATION") or ""),
        endpoint=(environ.get("KAITO_ARM_ENDPOINT") or "").rstrip("/"),
        token=environ.get("KAITO_ARM_TOKEN") or TEST_TOKEN,
        gpu_driver=driver,
        os_disk_gb=int(disk),
        os_sku=environ.get("KAITO_AKS_OS_SKU") or "Ubuntu",
        subnet=environ.get("KAITO_AKS_SUBNET_ID") or "",
    )
    return settings, ""


def plain(location: str) -> str:
    """A location as resources name it: ``East US`` is eastus."""
    return location.replace(" ", "").lower()
