"""The CustomResourceDefinitions of the Workspace and the InferenceSet, generated from the models.

Their rules (CEL) are those of `kaito_core.api.validation` and `kaito_core.api.updates` that an API server can check by
itself, so that a mistake is refused at ``kubectl apply`` even when no controller is running. What they cannot see is
left to the controller: image references, URLs, annotations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

from kaito_core.api.inference_set import ALWAYS, LONGEST_NAME, PERCENT, SET_NAME, InferenceSet
from kaito_core.api.labels import GROUP
from kaito_core.api.resource import DURATION, PLACE, QUANTITY
from kaito_core.api.workspace import V1BETA1, VERSIONS, Workspace


def crd() -> dict[str, Any]:
    """The CRD of the Workspace as an object."""
    names = {
        "plural": "workspaces",
        "singular": "workspace",
        "kind": "Workspace",
        "listKind": "WorkspaceList",
        "shortNames": ["wk", "wks"],
        "categories": ["workspace"],
    }
    return _definition(names, workspace_schema(), _columns(), {"status": {}})


def inference_set_crd() -> dict[str, Any]:
    """The CRD of the InferenceSet as an object; ``kubectl scale`` and autoscalers use its scale subresource."""
    names = {
        "plural": "inferencesets",
        "singular": "inferenceset",
        "kind": "InferenceSet",
        "listKind": "InferenceSetList",
        "shortNames": ["is", "isets"],
        "categories": ["inferenceset"],
    }
    scale = {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    columns = {
        "Replicas": ("integer", ".spec.replicas"),
        "ReadyReplicas": ("integer", ".status.readyReplicas"),
        "UpdatedReplicas": ("integer", ".status.updatedReplicas"),
        "Age": ("date", ".metadata.creationTimestamp"),
    }
    shown: list[dict[str, Any]] = [{"name": n, "type": k, "jsonPath": p} for n, (k, p) in columns.items()]
    message = '.status.conditions[?(@.type=="InferenceSetReady")].message'
    shown.append({"name": "Message", "type": "string", "jsonPath": message, "priority": 1})
    return _definition(names, inference_set_schema(), shown, {"status": {}, "scale": scale})


def _definition(
    names: Mapping[str, Any], schema: Mapping[str, Any], columns: list[dict[str, Any]], subresources: Mapping[str, Any]
) -> dict[str, Any]:
    # Beta first: that is the order in which kubectl prefers them.
    versions = [
        {
            "name": version.removeprefix(f"{GROUP}/"),
            "served": True,
            "storage": version == V1BETA1,
            "subresources": dict(subresources),
            "additionalPrinterColumns": columns,
            "schema": {"openAPIV3Schema": schema},
        }
        for version in reversed(VERSIONS)
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names['plural']}.{GROUP}"},
        "spec": {"group": GROUP, "names": dict(names), "scope": "Namespaced", "versions": versions},
    }


def crd_yaml(definition: Mapping[str, Any] | None = None) -> str:
    """A CRD as YAML, ready for ``kubectl apply -f -``: the Workspace's, unless another is given."""
    import yaml

    class Plain(yaml.SafeDumper):
        """Writes equal parts out instead of pointing from one to the other."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    head = "# Generated from kaito_core.api by `kaito crd`; do not edit.\n"
    given = crd() if definition is None else definition
    return head + yaml.dump(given, Dumper=Plain, sort_keys=False, width=120, allow_unicode=True)


def workspace_schema() -> dict[str, Any]:
    """The structural schema of a Workspace, with its rules."""
    schema = _schema(Workspace)
    schema["properties"]["resource"]["default"] = {}  # so that its own defaults and rules always apply
    _rule(schema, _RULES)
    return schema


def inference_set_schema() -> dict[str, Any]:
    """The structural schema of an InferenceSet, with its rules. In its template are the Workspace's own parts, with those of
    their rules that are about one state: a template may change in every way, as its Workspaces are made anew where they must."""
    schema = _schema(InferenceSet)
    template = schema["properties"]["spec"]["properties"]["template"]["properties"]
    template["resource"]["default"] = {}
    _rule(schema, _SET_RULES)
    for path, rules in _RULES.items():
        part, _, _ = path.partition(".")
        if part in ("resource", "inference"):
            of_a_state = {m: r for m, r in rules.items() if "oldSelf" not in r}
            more = _OF_A_SET if path == "inference" else {}
            _rule(template[part], {path.removeprefix(part).lstrip("."): of_a_state | more})
    return schema


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    described = model.model_json_schema(mode="validation")
    schema = _structural(described, described["$defs"])
    # The API server sees to these three.
    schema["required"] = [f for f in schema["required"] if f not in ("apiVersion", "kind", "metadata")]
    if not schema["required"]:
        del schema["required"]
    properties = schema["properties"]
    properties["apiVersion"] = {"type": "string", "description": properties["apiVersion"]["description"]}
    properties["kind"] = {"type": "string", "description": properties["kind"]["description"]}
    properties["metadata"] = {"type": "object"}
    conditions = properties["status"]["properties"]["conditions"]
    conditions |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    return schema


def _rule(schema: dict[str, Any], rules: Mapping[str, Mapping[str, str]]) -> None:
    """Put these rules at their paths."""
    for path, said in rules.items():
        if said:
            _at(schema, path)["x-kubernetes-validations"] = [
                {"rule": " ".join(rule.split()), "message": message} for message, rule in said.items()
            ]


# --- from pydantic's JSON schema to Kubernetes' structural one

_KEPT = (
    "description",
    "type",
    "format",
    "enum",
    "minimum",
    "maximum",
    "maxLength",
    "maxItems",
    "maxProperties",
    "required",
)


def _structural(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """No references, no null, no titles; and the defaults that mean something to a person."""
    if "$ref" in node:
        referred = definitions[node["$ref"].rpartition("/")[2]]
        return _structural({**referred, **{k: v for k, v in node.items() if k != "$ref"}}, definitions)
    if "anyOf" in node:
        (only,) = (option for option in node["anyOf"] if option.get("type") != "null")
        return _structural({**only, **{k: v for k, v in node.items() if k != "anyOf"}}, definitions)
    result = {k: node[k] for k in _KEPT if k in node}
    if isinstance(node.get("description"), str):
        result["description"] = " ".join(node["description"].split())
    if "x-kubernetes-int-or-string" in node:
        del result["type"]
        result["x-kubernetes-int-or-string"] = True
        node = {**node, "type": ""}
    if node.get("default") not in (None, "", [], {}):
        result["default"] = node["default"]
    if node.get("type") == "integer":
        result["format"] = "int64" if node.get("maximum", 2**63) > 2**31 else "int32"
    if "properties" in node:
        result["properties"] = {k: _structural(v, definitions) for k, v in node["properties"].items()}
    elif node.get("type") == "object":
        values = node.get("additionalProperties")
        if isinstance(values, Mapping) and values:
            result["additionalProperties"] = _structural(values, definitions)
        else:
            result["x-kubernetes-preserve-unknown-fields"] = True
    if "items" in node:
        result["items"] = _structural(node["items"], definitions)
    return result


def _at(schema: dict[str, Any], path: str) -> dict[str, Any]:
    for step in path.split(".") if path else ():
        schema = schema["items"] if step == "[]" else schema["properties"][step]
    return schema


# --- columns and rules


def _columns() -> list[dict[str, Any]]:
    def condition(kind: str) -> str:
        return f'.status.conditions[?(@.type=="{kind}")].status'

    # With priority 1 a column is shown by `kubectl get -o wide` only.
    wide = {
        "Stage": ("string", ".status.progress.stage"),
        "Step": ("integer", ".status.progress.step"),
        "Of": ("integer", ".status.progress.steps"),
        "Loss": ("number", ".status.progress.loss"),
        "Tokens/s": ("number", ".status.progress.tokensPerSecond"),
        "Seconds-Left": ("number", ".status.progress.secondsLeft"),
        "Cost": ("number", ".status.progress.costSoFar"),
        "Image": ("string", ".status.adapter.image"),
    }
    columns = {
        "Instance": ("string", ".resource.instanceType"),
        "ResourceReady": ("string", condition("ResourceReady")),
        "InferenceReady": ("string", condition("InferenceReady")),
        "JobStarted": ("string", condition("JobStarted")),
        "WorkspaceReady": ("string", condition("WorkspaceSucceeded")),
        "State": ("string", ".status.state"),
        "Age": ("date", ".metadata.creationTimestamp"),
    }
    shown = [{"name": name, "type": kind, "jsonPath": path} for name, (kind, path) in columns.items()]
    return [*shown, *({"name": n, "type": k, "jsonPath": p, "priority": 1} for n, (k, p) in wide.items())]


def _same(field: str) -> str:
    """Absent before and after, or equal before and after."""
    return f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"


def _given(field: str) -> str:
    return f"(has(self.{field}) && self.{field} != '')"


def _one_of(*conditions: str) -> str:
    return f"[{', '.join(conditions)}].filter(given, given).size() == 1"


_URLS = "(has(self.urls) && size(self.urls) > 0)"
_FILLED = "!has(self.{0}) || !self.{0}.matches('[A-Z0-9]_HERE')"

_RULES: Final[dict[str, dict[str, str]]] = {
    "": {
        "metadata.name must be a DNS-1123 label: lower case letters, digits and '-', 63 at most": """
            self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 63""",
        "either tuning or inference must be specified": "has(self.tuning) || has(self.inference)",
        "tuning cannot be set or removed later": "has(self.tuning) == has(oldSelf.tuning)",
        "inference cannot be set or removed later": """
            has(self.tuning) || has(oldSelf.tuning) || has(self.inference) == has(oldSelf.inference)""",
        "inference.preset cannot be changed": """
            has(self.tuning) || !has(self.inference) || !has(oldSelf.inference)
            || (has(self.inference.preset) == has(oldSelf.inference.preset)
                && (!has(self.inference.preset) || self.inference.preset == oldSelf.inference.preset))""",
        "inference.template cannot be set or removed later": """
            has(self.tuning) || !has(self.inference) || !has(oldSelf.inference)
            || has(self.inference.template) == has(oldSelf.inference.template)""",
        "preset or template must be specified for inference": """
            has(self.tuning) || !has(self.inference) || has(self.inference.preset) || has(self.inference.template)""",
        "tuning runs on one machine: resource.count must be 1": """
            !has(self.tuning) || !has(self.resource) || !has(self.resource.count) || self.resource.count == 1""",
        "a part of a GPU cannot be used for tuning: remove resource.partition": """
            !has(self.tuning) || !has(self.resource) || !has(self.resource.partition)""",
        "inference.template cannot serve what is tuned beside it": """
            !has(self.tuning) || !has(self.inference) || !has(self.inference.template)""",
    },
    "resource": {
        "count cannot be changed": _same("count"),
        "instanceType cannot be changed": f"""
            !{_given("instanceType")} || (has(oldSelf.instanceType) && self.instanceType == oldSelf.instanceType)""",
        "labelSelector cannot be changed": _same("labelSelector"),
        "partition cannot be changed": _same("partition"),
        "instanceType and instanceTypes cannot be set at the same time": f"""
            !{_given("instanceType")} || !has(self.instanceTypes) || size(self.instanceTypes) == 0""",
        "instanceTypes must not hold an empty name": "!has(self.instanceTypes) || self.instanceTypes.all(t, t != '')",
        "regions must be names like eastus": f"!has(self.regions) || self.regions.all(r, r.matches('{PLACE}'))",
        "zones must be names like us-east-1a": f"!has(self.zones) || self.zones.all(z, z.matches('{PLACE}'))",
        "maxPricePerHour must be more than 0": "!has(self.maxPricePerHour) || self.maxPricePerHour > 0.0",
        "maxCost must be more than 0": "!has(self.maxCost) || self.maxCost > 0.0",
        "keep must be a duration like 10m or 1h30m": f"!has(self.keep) || self.keep.matches('{DURATION}')",
    },
    "resource.gpu": {
        "memory must be a size like 40Gi": f"!{_given('memory')} || self.memory.matches('{QUANTITY}')",
    },
    "resource.labelSelector": {
        "only matchLabels and the operator In are supported, because new nodes get these labels": """
            !has(self.matchExpressions)
            || self.matchExpressions.all(e, e.operator == 'In' && has(e.values) && size(e.values) > 0)""",
    },
    "resource.partition": {
        "mode mig needs a profile, and no count": f"""
            self.mode != 'mig' || ({_given("profile")} && !has(self.count))""",
        "mode accelerator needs a count, and no profile": f"""
            self.mode != 'accelerator' || (has(self.count) && !{_given("profile")})""",
    },
    "tuning": {
        "preset cannot be changed": "self.preset == oldSelf.preset",
        "method cannot be changed": "self.method.lowerAscii() == oldSelf.method.lowerAscii()",
        "method must be specified, for example qlora or lora": "self.method != ''",
    },
    "tuning.input": {
        "exactly one of urls, volumeSource and image must be specified": _one_of(
            _URLS, "has(self.volumeSource)", _given("image")
        ),
        "name cannot be changed once set": "!has(oldSelf.name) || oldSelf.name == '' || " + _same("name"),
    },
    "tuning.output": {
        "exactly one of volumeSource and image must be specified": _one_of("has(self.volumeSource)", _given("image")),
        "imagePushSecret must be specified with image": f"!{_given('image')} || {_given('imagePushSecret')}",
        "image still holds a placeholder (…_HERE): put your registry and repository there, in lower case": (
            _FILLED.format("image")
        ),
        "imagePushSecret still holds a placeholder (…_HERE): put the name of your Secret there": (
            _FILLED.format("imagePushSecret")
        ),
    },
    "inference": {
        "preset and template cannot be set at the same time": "!has(self.preset) || !has(self.template)",
        "idleAfter must be a duration like 5m or 1h30m": f"""
            !has(self.idleAfter) || self.idleAfter.matches('{DURATION}')""",
        "each adapter must have its own name": """
            !has(self.adapters) || self.adapters.all(a, !has(a.source.name)
            || self.adapters.exists_one(b, has(b.source.name) && b.source.name == a.source.name))""",
    },
    "inference.adapters.[]": {
        "an adapter needs a name, and image or volumeSource; URLs are not supported": """
            has(self.source.name) && self.source.name != '' && !(has(self.source.urls) && size(self.source.urls) > 0)
            && has(self.source.volumeSource) != (has(self.source.image) && self.source.image != '')""",
        "strength must be a number from 0 to 1, in quotes": """
            !has(self.strength) || (self.strength.matches('^[0-9]*[.]?[0-9]+$')
            && double(self.strength) >= 0.0 && double(self.strength) <= 1.0)""",
    },
}
"""What an API server checks: path → message → rule. A rule with ``oldSelf`` applies to updates only."""

_OF_A_SET: Final = {
    "preset or template must be specified for inference": "has(self.preset) || has(self.template)",
    ALWAYS: "!has(self.policy) || self.policy == 'always'",
}

_SET_RULES: Final[dict[str, dict[str, str]]] = {
    "": {
        f"metadata.name must begin with a letter and have lower case letters, digits and '-' only, {LONGEST_NAME} at most": f"""
            self.metadata.name.matches('{SET_NAME}') && size(self.metadata.name) <= {LONGEST_NAME}""",
    },
    "spec": {
        "labelSelector cannot be given both in spec and in template.resource": """
            !has(self.labelSelector) || !has(self.template.resource) || !has(self.template.resource.labelSelector)""",
    },
    "spec.updateStrategy.rollingUpdate": {
        "maxUnavailable must be a number from 1 on, or a share like 25%": f"""
            !has(self.maxUnavailable) || (type(self.maxUnavailable) == int ? self.maxUnavailable >= 1
            : self.maxUnavailable.matches('{PERCENT}'))""",
    },
}
"""The same for an InferenceSet, beside those of the parts that it shares with a Workspace."""
