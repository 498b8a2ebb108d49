"""What a tenant's Workspace may put into a pod of a cluster: kinds of volumes, and pod templates under Pod Security *baseline*.

Only what a person wrote is looked at. What the controller mounts itself (local weights, the cache of models, the Secrets that a field
names) is not in the Workspace. A local run has the rights of the person who starts it, and is not asked.

The controls of `template_problems` are those of the Kubernetes Pod Security Standards, policy *baseline*, of Kubernetes 1.34:
https://kubernetes.io/docs/concepts/security/pod-security-standards/#baseline
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kaito_core.problems import Problem

VOLUME_KINDS: Final = frozenset(
    {
        "persistentVolumeClaim", "ephemeral", "csi", "nfs", "azureFile", "azureDisk", "awsElasticBlockStore",
        "gcePersistentDisk", "configMap", "emptyDir", "image",
    }
)  # fmt: skip
"""Kinds of volumes that a Workspace may always name: they show nothing of the node, and no Secret or token."""

CAPABILITIES: Final = frozenset(
    {
        "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "SETFCAP",
        "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
    }
)  # fmt: skip
SELINUX_TYPES: Final = frozenset({"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"})
SYSCTLS: Final = frozenset(
    {
        "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range", "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl", "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_rmem", "net.ipv4.tcp_syncookies", "net.ipv4.tcp_wmem",
    }
)  # fmt: skip
PROFILES: Final = frozenset({"RuntimeDefault", "Localhost"})
"""Types of seccomp and AppArmor profiles; ``Unconfined`` is not among them."""
APPARMOR_ANNOTATION: Final = "container.apparmor.security.beta.kubernetes.io/"

_CONTAINERS = ("initContainers", "containers", "ephemeralContainers")
_HANDLERS = (
    ("livenessProbe",), ("readinessProbe",), ("startupProbe",), ("lifecycle", "postStart"), ("lifecycle", "preStop"),
)  # fmt: skip
_REMEDY = "remove it: a pod template must pass Pod Security baseline here; the platform may open it with the chart value tenants.templates"


@dataclass(frozen=True)
class PodSecurity:
    """What the platform opens for all tenants beyond the default."""

    volume_kinds: frozenset[str] = frozenset()
    """More kinds of volumes, as ``hostPath`` or ``secret``."""
    any_template: bool = False
    """Whether pod templates are passed on whatever is in them."""


def forbidden(workspace: Mapping[str, Any], opened: PodSecurity) -> list[Problem]:
    """What is in a Workspace, as an API server holds it, that a tenant may not have here; each with its field."""
    found: list[Problem] = []
    for part in ("tuning", "inference"):
        for source, path in _volume_sources(workspace.get(part), part):
            found += volume_problems(source, path, opened.volume_kinds)
    inference = workspace.get("inference")
    template = inference.get("template") if isinstance(inference, Mapping) else None
    if template is not None and not opened.any_template:
        found += template_problems(template, "inference.template", opened.volume_kinds)
    return found


def volume_problems(source: object, path: str, opened: Collection[str] = ()) -> Iterator[Problem]:
    """The kinds of a volume source that are neither in `VOLUME_KINDS` nor in ``opened``; ``path`` is the field's."""
    for kind in _mapping(source):
        if kind not in VOLUME_KINDS and kind not in opened:
            yield Problem(
                f"a volume of the kind {kind!r} is not allowed in this cluster",
                "use a persistentVolumeClaim or another of: " + ", ".join(sorted({*VOLUME_KINDS, *opened}))
                + "; the platform may open more with the chart value tenants.volumes",
                f"{path}.{kind}",
            )  # fmt: skip


def _volume_sources(part: object, path: str) -> Iterator[tuple[object, str]]:
    """Every ``volumeSource`` in a part of a Workspace, whichever field holds it; the pod template has volumes of its own."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            if key == "volumeSource":
                yield value, f"{path}.{key}"
            elif key != "template":
                yield from _volume_sources(value, f"{path}.{key}")
    elif isinstance(part, list):
        for i, item in enumerate(part):
            yield from _volume_sources(item, f"{path}[{i}]")


def template_problems(template: object, path: str, opened: Collection[str] = ()) -> list[Problem]:
    """Where a pod template leaves Pod Security baseline, names a service account or has a volume of a kind that is not allowed.

    What has not the form that Kubernetes knows is a problem too: nothing passes because it could not be read."""
    if isinstance(template, Mapping):
        return [*_annotations(template, path), *_pod(_Field(template, path).at("spec"), opened)]
    return [_not_a("mapping", path)]


@dataclass(frozen=True)
class _Field:
    """A value in a template, and where it is."""

    value: object
    path: str

    def at(self, *names: str) -> _Field:
        value, path = self.value, self.path
        for name in names:
            value, path = (value.get(name) if isinstance(value, Mapping) else None), f"{path}.{name}"
        return _Field(value, path)

    @property
    def items(self) -> list[_Field]:
        found = self.value if isinstance(self.value, list) else []
        return [_Field(v, f"{self.path}[{i}]") for i, v in enumerate(found)]

    def one_of(self, allowed: Collection[object], why: str) -> Iterator[Problem]:
        """A problem when there is a value that is none of these."""
        known = isinstance(self.value, (str, bool, int)) and any(
            self.value == a and type(self.value) is type(a) for a in allowed
        )
        if self.value is not None and not known:
            yield Problem(f"{self.value!r:.80} {why}", _REMEDY, self.path)


def _not_a(form: str, path: str) -> Problem:
    return Problem(f"is not a {form}", "write it as in a Pod", path)


def _malformed(field: _Field, form: type) -> Iterator[Problem]:
    if field.value is not None and not isinstance(field.value, form):
        yield _not_a("mapping" if form is Mapping else "list", field.path)


def _annotations(template: Mapping[str, Any], path: str) -> Iterator[Problem]:
    metadata = _Field(template, path).at("metadata")
    yield from _malformed(metadata, Mapping)
    for name in ("labels", "annotations"):
        yield from _malformed(metadata.at(name), Mapping)
    for key, value in _mapping(metadata.at("annotations").value).items():
        if str(key).startswith(APPARMOR_ANNOTATION):
            allowed = value in ("", "runtime/default") or str(value).startswith("localhost/")
            if not allowed:
                yield Problem(f"{value!r:.80} is no AppArmor profile that baseline allows", _REMEDY,
                              f"{metadata.path}.annotations[{key}]")  # fmt: skip


def _pod(spec: _Field, opened: Collection[str]) -> Iterator[Problem]:
    yield from _malformed(spec, Mapping)
    for name in ("serviceAccountName", "serviceAccount"):
        account = spec.at(name)
        if account.value not in (None, "", "default"):
            yield Problem(
                f"{account.value!r:.80} is not the namespace's default service account", _REMEDY, account.path
            )
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        yield from spec.at(name).one_of((False,), "shares a namespace of the node")
    yield from _volumes(spec.at("volumes"), opened)
    security = spec.at("securityContext")
    yield from _security(security)
    yield from _malformed(security.at("sysctls"), list)
    for item in security.at("sysctls").items:
        yield from _malformed(item, Mapping)
        yield from item.at("name").one_of(SYSCTLS, "is no sysctl that baseline allows")
    for name in _CONTAINERS:
        yield from _malformed(spec.at(name), list)
        for container in spec.at(name).items:
            yield from _container(container)


def _volumes(volumes: _Field, opened: Collection[str]) -> Iterator[Problem]:
    yield from _malformed(volumes, list)
    for volume in volumes.items:
        yield from _malformed(volume, Mapping)
        kinds = {k: v for k, v in _mapping(volume.value).items() if k != "name" and v is not None}
        # Baseline knows no host path, whatever kinds are open for the fields of a Workspace.
        yield from volume_problems(kinds, volume.path, [k for k in opened if k != "hostPath"])


def _container(container: _Field) -> Iterator[Problem]:
    yield from _malformed(container, Mapping)
    security = container.at("securityContext")
    yield from _security(security)
    yield from security.at("privileged").one_of((False,), "gives the container the rights of the node")
    yield from security.at("procMount").one_of(("", "Default"), "shows the container more of /proc")
    added = security.at("capabilities", "add")
    yield from _malformed(security.at("capabilities"), Mapping)
    yield from _malformed(added, list)
    for capability in added.items:
        yield from capability.one_of(CAPABILITIES, "is no capability that baseline allows")
    yield from _malformed(container.at("ports"), list)
    for port in container.at("ports").items:
        yield from _malformed(port, Mapping)
        yield from port.at("hostPort").one_of((0,), "opens a port of the node")
    for names in _HANDLERS:
        for number in range(1, len(names) + 1):
            yield from _malformed(container.at(*names[:number]), Mapping)
        for asks in ("httpGet", "tcpSocket"):
            yield from _malformed(container.at(*names, asks), Mapping)
            yield from container.at(*names, asks, "host").one_of(
                ("",), "makes the kubelet ask another host than the pod"
            )


def _security(security: _Field) -> Iterator[Problem]:
    """What the security contexts of a pod and of a container have in common."""
    yield from _malformed(security, Mapping)
    for name in ("windowsOptions", "seLinuxOptions", "seccompProfile", "appArmorProfile"):
        yield from _malformed(security.at(name), Mapping)
    yield from security.at("windowsOptions", "hostProcess").one_of(
        (False,), "gives the container the rights of the node"
    )
    yield from security.at("seLinuxOptions", "type").one_of(SELINUX_TYPES, "is no SELinux type that baseline allows")
    for name in ("user", "role"):
        yield from security.at("seLinuxOptions", name).one_of(("",), f"sets the SELinux {name}")
    yield from security.at("seccompProfile", "type").one_of(PROFILES, "is no seccomp profile that baseline allows")
    yield from security.at("appArmorProfile", "type").one_of(PROFILES, "is no AppArmor profile that baseline allows")


def _mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}
