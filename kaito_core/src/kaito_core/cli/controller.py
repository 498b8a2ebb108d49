"""``kaito controller``: reconciles the Workspaces of a cluster until it is told to stop."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from kaito_core.problems import Failure, UserError

if TYPE_CHECKING:
    from kaito_core.controller.inference_sets import InferenceSetController
    from kaito_core.controller.metrics import Metrics
    from kaito_core.kube.client import Client
    from kaito_core.kube.kinds import Kind

LEASE_NAME = "kaito-controller"
DRAIN = 30.0
"""Seconds that reconciles have to end after SIGTERM (controller-runtime's grace)."""
AWAY = 5.0
"""Seconds between two tries to reach an API server at the start."""

QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([kMGTPE]|[KMGTPE]i)?")
"""A size as Kubernetes writes it."""

log = logging.getLogger("kaito_core.controller")


def _pod_env(pairs: tuple[str, ...]) -> dict[str, str]:
    given = os.environ.get("KAITO_POD_ENV", "")
    try:
        env = json.loads(given) if given else {}
        if not isinstance(env, dict) or not all(isinstance(v, str) for v in env.values()):
            raise ValueError
    except ValueError:
        raise UserError("KAITO_POD_ENV must be a JSON object of texts", 'write {"NAME": "value"}') from None
    return {**env, **_pairs("--pod-env", pairs)}


def _pairs(option: str, pairs: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise UserError(f"{option} {pair!r} is not NAME=VALUE", f"write {option} NAME=VALUE")
        found[name] = value
    return found


def _volume_source(text: str) -> dict[str, object]:
    """A Kubernetes volume source, or nothing."""
    try:
        source = json.loads(text) if text else {}
    except ValueError:
        source = None
    if not isinstance(source, dict) or len(source) > 1:
        example = '{"persistentVolumeClaim": {"claimName": "models"}}'
        raise UserError(f"--model-cache: {text!r} is not a volume source", f"write for example {example}")
    return source


@click.command(
    "controller", help="Reconcile the Workspaces of a cluster. Runs in the cluster, or anywhere with a kubeconfig."
)
@click.option("--context", default="", help="Context of the kubeconfig; in a pod: the pod's own cluster.")
@click.option("--kubeconfig", default="", help="Path of the kubeconfig.")
@click.option("--namespace", default="", envvar="KAITO_NAMESPACE", help="Only this namespace; all when absent.")
@click.option("--tuner-image", default="", envvar="KAITO_TUNER_IMAGE", help="Image of the pods that tune.")
@click.option("--image-pull-secret", "pull_secrets", multiple=True, envvar="KAITO_IMAGE_PULL_SECRET",
              help="Secret, in the Workspace's namespace, that images are pulled with; may be repeated.")  # fmt: skip
@click.option("--checkpoint-storage-class", default="", envvar="KAITO_CHECKPOINT_STORAGE_CLASS",
              help="Give every tuning a volume of this class, so that checkpoints outlive its pod.")  # fmt: skip
@click.option("--checkpoint-size", default="20Gi", show_default=True, envvar="KAITO_CHECKPOINT_SIZE",
              help="Size of that volume.")  # fmt: skip
@click.option("--serve-after-tuning", default="onDemand", show_default=True, envvar="KAITO_SERVE_AFTER_TUNING",
              type=click.Choice(["onDemand", "always", "never"]),
              help="What becomes of a tuned model where its Workspace does not say.")  # fmt: skip
@click.option("--runtime-image", "runtime_images", multiple=True, metavar="RUNTIME=IMAGE", envvar="KAITO_RUNTIME_IMAGE",
              help="Image of the pods that serve with this runtime (transformers is in the one that tunes); may be repeated.")  # fmt: skip
@click.option("--compute-capability", "capabilities", multiple=True, metavar="IMAGE=MAJOR.MINOR", envvar="KAITO_COMPUTE_CAPABILITY",
              help="Lowest compute capability of NVIDIA's GPUs that an image of your own can use: tuner=7.5, or a runtime's "
              "name; may be repeated.")  # fmt: skip
@click.option("--model-cache", default="", metavar="JSON", envvar="KAITO_MODEL_CACHE",
              help="A Kubernetes volume source that keeps the files of models for all endpoints.")  # fmt: skip
@click.option("--allow-volume", "allowed_volumes", multiple=True, metavar="KIND", envvar="KAITO_ALLOW_VOLUME",
              help="Let Workspaces name volumes of this kind too (hostPath, projected, secret, downwardAPI …); may be repeated.")  # fmt: skip
@click.option("--allow-any-template", is_flag=True, envvar="KAITO_ALLOW_ANY_TEMPLATE",
              help="Run pod templates that do not pass Pod Security baseline, under any service account.")  # fmt: skip
@click.option("--no-image-volumes", is_flag=True, envvar="KAITO_NO_IMAGE_VOLUMES",
              help="Fetch adapters in an init container also where the cluster could mount their images.")  # fmt: skip
@click.option("--pod-ip", default="", envvar="POD_IP",
              help="Where the pods of the cluster reach this process, which then holds requests to endpoints that are "
              "asleep; without it none falls asleep.")  # fmt: skip
@click.option("--pod-env", multiple=True, metavar="NAME=VALUE", help="Environment of every pod; may be repeated.")
@click.option("--workers", default=4, show_default=True, envvar="KAITO_WORKERS", type=click.IntRange(1, 64),
              help="Workspaces that are reconciled at the same time.")  # fmt: skip
@click.option("--no-leader-election", is_flag=True, envvar="KAITO_NO_LEADER_ELECTION",
              help="Begin at once; only where no other controller can run.")  # fmt: skip
@click.option("--lease-namespace", default="", envvar="KAITO_LEASE_NAMESPACE",
              help="Where the Lease is; default: the pod's namespace, or the context's.")  # fmt: skip
@click.option("--lease-name", default=LEASE_NAME, show_default=True, envvar="KAITO_LEASE_NAME", help="The Lease.")
@click.option("--metrics-address", default=":8080", show_default=True, envvar="KAITO_METRICS_ADDRESS",
              help="Where /metrics is.")  # fmt: skip
@click.option("--health-address", default=":8081", show_default=True, envvar="KAITO_HEALTH_ADDRESS",
              help="Where /healthz and /readyz are.")  # fmt: skip
@click.option("--log-level", default="info", show_default=True, envvar="KAITO_LOG_LEVEL",
              type=click.Choice(["debug", "info", "warning", "error"]), help="What is logged.")  # fmt: skip
def command(
    context: str,
    kubeconfig: str,
    namespace: str,
    tuner_image: str,
    pull_secrets: tuple[str, ...],
    checkpoint_storage_class: str,
    checkpoint_size: str,
    serve_after_tuning: str,
    runtime_images: tuple[str, ...],
    capabilities: tuple[str, ...],
    model_cache: str,
    allowed_volumes: tuple[str, ...],
    allow_any_template: bool,
    no_image_volumes: bool,
    pod_ip: str,
    pod_env: tuple[str, ...],
    workers: int,
    no_leader_election: bool,
    lease_namespace: str,
    lease_name: str,
    metrics_address: str,
    health_address: str,
    log_level: str,
) -> int:
    if not tuner_image:
        raise UserError("there is no image for the pods that tune", "give --tuner-image, or set KAITO_TUNER_IMAGE")
    if not QUANTITY.fullmatch(checkpoint_size):
        raise UserError(f"--checkpoint-size: {checkpoint_size!r} is not a size", "write it as Kubernetes does: 20Gi")
    from kaito_core.api.pod_security import PodSecurity
    from kaito_core.controller.health import address, healthz, metrics_page, readyz, serve
    from kaito_core.controller.json_log import to_stderr
    from kaito_core.controller.metrics import Metrics
    from kaito_core.controller.settings import Settings
    from kaito_core.controller.workspaces import WorkspaceController
    from kaito_core.kube.client import connect
    from kaito_core.kube.leader import Election
    from kaito_core.planning.images import declared
    from kaito_core.plugins.manager import load_plugins

    settings = Settings(
        tuner_image=tuner_image,
        image_pull_secrets=pull_secrets,
        checkpoint_storage_class=checkpoint_storage_class,
        checkpoint_size=checkpoint_size,
        pod_env=_pod_env(pod_env),
        serve_after_tuning=serve_after_tuning,
        runtime_images=_pairs("--runtime-image", runtime_images),
        images=declared(_pairs("--compute-capability", capabilities)),
        model_cache=_volume_source(model_cache),
        pod_security=PodSecurity(frozenset(allowed_volumes), allow_any_template),
        image_volumes=not no_image_volumes,
    )
    at_metrics, at_health = address(metrics_address, "--metrics-address"), address(health_address, "--health-address")
    client = connect(context, kubeconfig, user_agent="controller")
    to_stderr(log_level)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    plugins = load_plugins()
    for problem in plugins.problems():
        log.warning("%s; %s", problem.message, problem.remedy)
    metrics = Metrics()
    controller = WorkspaceController(client, plugins, settings, namespace=namespace, metrics=metrics, pod_ip=pod_ip)
    metrics.count_workspaces(controller.count_by_state)
    # Before anything is asked of the API server: while it is away, the kubelet shall see that we wait, and not kill us.
    watched = list(controller.reflectors)
    servers = [
        serve(at_metrics, {"/metrics": metrics_page(metrics)}),
        serve(at_health, {"/healthz": healthz(watched), "/readyz": readyz(watched)}),
    ]
    log.info("serving metrics on port %d and health on port %d", *(s.server_port for s in servers))
    lease = None if no_leader_election else (lease_namespace or client.namespace, lease_name)
    if not _wait_until_usable(client, [r.kind for r in controller.reflectors], namespace, lease, stop):
        return 0
    sets = _inference_sets(client, namespace, metrics)
    if sets is not None:
        watched += sets.reflectors
        sets.start_watching()
    controller.start_watching()

    def lead() -> None:
        metrics.leads(lease_name, True)
        controller.start_workers(workers)
        if sets is not None:
            sets.start_workers(workers)

    def lost() -> None:
        # Somebody else leads now; what is still going on here, were it only the draining, must not go on beside it.
        log.error("the lease is lost; ending at once")
        os._exit(1)

    election = None
    if lease is None:
        lead()
    else:
        metrics.leads(lease_name, False)
        identity = f"{os.environ.get('HOSTNAME') or socket.gethostname()}_{uuid.uuid4()}"
        election = Election(client, lease_name, lease[0], identity, started=lead, lost=lost)
        election.start()
    stop.wait()
    log.info("draining")
    if sets is not None:
        sets.stop(DRAIN)
    controller.stop(DRAIN)
    if election is not None:
        election.stop()
    log.info("stopped")
    return 0


def _wait_until_usable(
    client: Client, watched: Iterable[Kind], namespace: str, lease: tuple[str, str] | None, stop: threading.Event
) -> bool:
    """Until the API server answers; False when told to stop before. UserError when it does not know Workspaces, Failure when it
    knows us and does not let us."""
    from kaito_core.kube.errors import ApiError, Forbidden
    from kaito_core.kube.kinds import WORKSPACES

    while not stop.is_set():
        try:
            if not client.serves(WORKSPACES):
                raise UserError("the cluster does not know Workspaces", "kaito crd | kubectl apply --server-side -f -")
            missing = _missing_rights(client, watched, namespace, lease)
        except Forbidden:
            raise
        except ApiError as e:
            log.warning("%s; trying again in %.0f s", e.problems[0].message, AWAY)
            stop.wait(AWAY)
            continue
        if missing:
            raise _powerless(missing)
        return True
    return False


def _powerless(missing: Iterable[str]) -> Failure:
    return Failure(
        f"these credentials may not: {'; '.join(missing)}",
        "the chart and `kaito install` give the controller these rights; `kubectl auth can-i --list` shows what it has",
    )


def _inference_sets(client: Client, namespace: str, metrics: Metrics) -> InferenceSetController | None:
    """The controller of InferenceSets; None where the cluster does not know them. Failure when it may not do its work."""
    from kaito_core.controller.inference_sets import InferenceSetController
    from kaito_core.kube.kinds import INFERENCE_SETS, SERVICES, WORKSPACES

    if not client.serves(INFERENCE_SETS):
        log.warning(
            "the cluster does not know InferenceSets: nobody looks after them; add their definition and start again"
        )
        return None
    sets = InferenceSetController(client, namespace=namespace, metrics=metrics)
    needed = [(verb, r.kind, namespace, "", "") for r in sets.reflectors for verb in ("list", "watch")]
    needed += [(verb, WORKSPACES, namespace, "", "") for verb in ("create", "patch", "delete")]
    needed += [("create", SERVICES, namespace, "", ""), ("patch", INFERENCE_SETS, namespace, "status", "")]
    if missing := _not_allowed(client, needed):
        raise _powerless(missing)
    return sets


def _missing_rights(
    client: Client, watched: Iterable[Kind], namespace: str, lease: tuple[str, str] | None
) -> list[str]:
    """What the controller cannot work without and may not do, in words. Not all it ever does: what comes later says so then."""
    from kaito_core.kube.kinds import CONFIG_MAPS, JOBS, LEASES, WORKSPACES

    needed = [
        (verb, kind, namespace if kind.namespaced else "", "", "") for kind in watched for verb in ("list", "watch")
    ]
    needed += [
        ("patch", WORKSPACES, namespace, "", ""),
        ("patch", WORKSPACES, namespace, "status", ""),
        ("create", JOBS, namespace, "", ""),
        ("create", CONFIG_MAPS, namespace, "", ""),
    ]
    if lease is not None:
        where, name = lease
        needed += [
            ("create", LEASES, where, "", ""),
            ("get", LEASES, where, "", name),
            ("update", LEASES, where, "", name),
        ]
    return _not_allowed(client, needed)


def _not_allowed(client: Client, needed: Iterable[tuple[str, Kind, str, str, str]]) -> list[str]:
    """Which of these (verb, kind, namespace, subresource, name) are not permitted, in words."""
    return [
        f"{verb} {kind}{'/' * bool(part)}{part}{f' in {where}' if where else ''}"
        for verb, kind, where, part, name in needed
        if not client.allowed(verb, kind, where, part, name)
    ]
