"""``kaito aks-provisioner``: fulfils NodeClaims with AKS agent pools until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import uuid
from typing import TYPE_CHECKING

import click

from kaito_core.problems import Failure, UserError

if TYPE_CHECKING:
    from kaito_core.kube.client import Client

LEASE_NAME = "kaito-aks-provisioner"
DRAIN = 30.0
"""Seconds that reconciles have to end after SIGTERM."""
AWAY = 5.0
"""Seconds between two tries to reach an API server at the start."""

log = logging.getLogger("kaito_provisioner_aks")


@click.command(
    "aks-provisioner",
    help="Fulfil NodeClaims (karpenter.sh/v1) of the class kaito.sh/KaitoNodeClass with AKS agent pools, in the place of "
    "gpu-provisioner. KAITO_AKS_SUBSCRIPTION, KAITO_AKS_RESOURCE_GROUP and KAITO_AKS_CLUSTER say which AKS cluster.",
)
@click.option("--context", default="", help="Context of the kubeconfig; in a pod: the pod's own cluster.")
@click.option("--kubeconfig", default="", help="Path of the kubeconfig.")
@click.option("--workers", default=4, show_default=True, envvar="KAITO_WORKERS", type=click.IntRange(1, 64),
              help="NodeClaims that are reconciled at the same time.")  # fmt: skip
@click.option("--no-leader-election", is_flag=True, envvar="KAITO_NO_LEADER_ELECTION",
              help="Begin at once; only where no other can run.")  # fmt: skip
@click.option("--lease-namespace", default="", envvar="KAITO_LEASE_NAMESPACE",
              help="Where the Lease is; default: the pod's namespace, or the context's.")  # fmt: skip
@click.option("--health-address", default=":8081", show_default=True, envvar="KAITO_HEALTH_ADDRESS",
              help="Where /healthz and /readyz are.")  # fmt: skip
@click.option("--log-level", default="info", show_default=True, envvar="KAITO_LOG_LEVEL",
              type=click.Choice(["debug", "info", "warning", "error"]), help="What is logged.")  # fmt: skip
def command(
    context: str,
    kubeconfig: str,
    workers: int,
    no_leader_election: bool,
    lease_namespace: str,
    health_address: str,
    log_level: str,
) -> int:
    from kaito_core.controller.health import address, healthz, readyz, serve
    from kaito_core.controller.json_log import to_stderr
    from kaito_core.kube.client import connect
    from kaito_core.kube.leader import Election
    from kaito_provisioner_aks import settings
    from kaito_provisioner_aks.arm import Arm
    from kaito_provisioner_aks.claims.controller import ClaimController

    given, missing = settings.read()
    if given is None:
        raise UserError(f"the AKS cluster is not known: {missing}", "docs/aks.md says which variables there are")
    at_health = address(health_address, "--health-address")
    client = connect(context, kubeconfig, user_agent="aks-provisioner")
    to_stderr(log_level)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    controller = ClaimController(client, Arm(given), given)
    pages = {"/healthz": healthz(controller.reflectors), "/readyz": readyz(controller.reflectors)}
    log.info("serving health on port %d", serve(at_health, pages).server_port)
    if not _wait_until_usable(client, stop):
        return 0
    controller.start_watching()

    def lead() -> None:
        controller.start_workers(workers)

    def lost() -> None:
        # Somebody else leads now; what is still going on here must not go on beside it.
        log.error("the lease is lost; ending at once")
        os._exit(1)

    election = None
    if no_leader_election:
        lead()
    else:
        identity = f"{os.environ.get('HOSTNAME') or socket.gethostname()}_{uuid.uuid4()}"
        namespace = lease_namespace or client.namespace
        election = Election(client, LEASE_NAME, namespace, identity, started=lead, lost=lost)
        election.start()
    stop.wait()
    log.info("draining")
    controller.stop(DRAIN)
    if election is not None:
        election.stop()
    log.info("stopped")
    return 0


def _wait_until_usable(client: Client, stop: threading.Event) -> bool:
    """Until the API server answers; False when told to stop before. Says what the cluster or the credentials lack."""
    from kaito_core.kube.errors import ApiError, Forbidden
    from kaito_core.kube.kinds import NODES
    from kaito_provisioner_aks.claims.claim import NODE_CLAIMS

    needed = [(verb, kind, "") for kind in (NODE_CLAIMS, NODES) for verb in ("list", "watch", "patch", "delete")]
    needed.append(("patch", NODE_CLAIMS, "status"))
    while not stop.is_set():
        try:
            if not client.serves(NODE_CLAIMS):
                raise UserError(
                    "the cluster does not know NodeClaims (karpenter.sh/v1)",
                    "install Karpenter's CRD; KAITO's gpu-provisioner chart brings it, too",
                )
            missing = [(v, k, s) for v, k, s in needed if not client.allowed(v, k, "", s)]
        except Forbidden:
            raise
        except ApiError as e:
            log.warning("%s; trying again in %.0f s", e.problems[0].message, AWAY)
            stop.wait(AWAY)
            continue
        if missing:
            words = "; ".join(f"{verb} {kind}{f'/{part}' if part else ''}" for verb, kind, part in missing)
            raise Failure(f"these credentials may not: {words}", "docs/aks.md lists the rights that are needed")
        return True
    return False
