"""The server speaks as Azure does: Microsoft's packages, with all their polling and paging, understand it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from azure.core import MatchConditions
from azure.core.exceptions import HttpResponseError, ResourceExistsError, ResourceModifiedError, ResourceNotFoundError
from azure.mgmt.compute import ComputeManagementClient
from azure.mgmt.containerservice import ContainerServiceClient

from kaito_provisioner_aks import settings
from kaito_provisioner_aks.arm import Arm, _static
from kaito_provisioner_aks.provisioner import AksNodes
from kaito_provisioner_aks.testing.arm_server import CLUSTER, GROUP, LOCATION, ArmServer

from .world import ID, request

PLACE = (GROUP, CLUSTER)


@pytest.fixture
def azure() -> Iterator[ArmServer]:
    with ArmServer(create_seconds=0.1, delete_seconds=0.1, page=2) as azure:
        yield azure


def given(azure: ArmServer) -> dict[str, Any]:
    found, _ = settings.read(azure.environment)
    assert found is not None
    return {**_static(found), "subscription_id": found.subscription, "retry_total": 0, "polling_interval": 0.05}


@pytest.fixture
def aks(azure: ArmServer) -> ContainerServiceClient:
    return ContainerServiceClient(**given(azure))


def body(count: int = 1) -> Any:
    return {"properties": {"vmSize": "Standard_NC4as_T4_v3", "count": count, "mode": "User"}}


def test_the_package_polls_a_pool_to_its_end(azure: ArmServer, aks: ContainerServiceClient) -> None:
    made = aks.agent_pools.begin_create_or_update(*PLACE, ID, body()).result()
    assert made.as_dict()["properties"]["provisioningState"] == "Succeeded"
    assert "/resourcegroups/" in str(made.id)
    scaled = aks.agent_pools.begin_create_or_update(*PLACE, ID, body(2)).result()
    assert scaled.as_dict()["properties"]["count"] == 2
    aks.agent_pools.begin_delete(*PLACE, ID).result()
    with pytest.raises(ResourceNotFoundError) as caught:
        aks.agent_pools.get(*PLACE, ID)
    assert caught.value.error is not None
    assert caught.value.error.code == "NotFound"
    aks.agent_pools.begin_delete(*PLACE, ID).result()
    states = [c[2] for c in azure.cloud.calls if c[0] in ("put", "delete")]
    assert states == [201, 200, 202, 204]
    assert [c[0] for c in azure.cloud.calls].count("operation") >= 3


def test_the_package_hears_why_an_operation_failed(azure: ArmServer, aks: ContainerServiceClient) -> None:
    azure.cloud.fail("put", "broken")
    with pytest.raises(HttpResponseError) as caught:
        aks.agent_pools.begin_create_or_update(*PLACE, ID, body()).result()
    assert caught.value.status_code == 200
    assert caught.value.error is not None
    assert caught.value.error.code == "ResourceOperationFailure"
    assert [d.code for d in caught.value.error.details] == ["AllocationFailed"]
    failed = aks.agent_pools.get(*PLACE, ID).as_dict()["properties"]
    assert failed["provisioningState"] == "Failed"
    assert failed["status"]["provisioningError"]["code"] == "AllocationFailed"


def test_conditions(aks: ContainerServiceClient) -> None:
    made = aks.agent_pools.begin_create_or_update(
        *PLACE, ID, body(), match_condition=MatchConditions.IfMissing
    ).result()
    with pytest.raises(ResourceExistsError):
        aks.agent_pools.begin_create_or_update(*PLACE, ID, body(), match_condition=MatchConditions.IfMissing)
    with pytest.raises(ResourceModifiedError):
        aks.agent_pools.begin_create_or_update(
            *PLACE, ID, body(), etag="old", match_condition=MatchConditions.IfNotModified
        )
    etag = made.as_dict()["properties"]["eTag"]
    aks.agent_pools.begin_create_or_update(
        *PLACE, ID, body(2), etag=etag, match_condition=MatchConditions.IfNotModified
    ).result()
    with pytest.raises(ResourceNotFoundError):
        aks.agent_pools.begin_create_or_update(*PLACE, "other", body(), match_condition=MatchConditions.IfPresent)


def test_while_it_works_it_is_busy(aks: ContainerServiceClient) -> None:
    poller = aks.agent_pools.begin_create_or_update(*PLACE, ID, body())
    with pytest.raises(ResourceExistsError) as caught:
        aks.agent_pools.begin_create_or_update(*PLACE, ID, body())
    assert caught.value.error is not None
    assert caught.value.error.code == "OperationNotAllowed"
    aks.agent_pools.begin_delete(*PLACE, ID, polling=False)
    with pytest.raises(HttpResponseError) as caught_too:
        poller.result()
    assert "preempted" in str(caught_too.value) or "Canceled" in str(caught_too.value)


def test_pages(azure: ArmServer, aks: ContainerServiceClient) -> None:
    for name in ("a", "b", "c", "d", "e"):
        aks.agent_pools.begin_create_or_update(*PLACE, name, body(), polling=False)
    assert [p.name for p in aks.agent_pools.list(*PLACE)] == ["a", "b", "c", "d", "e"]
    compute = ComputeManagementClient(**given(azure))
    used = {u.as_dict()["name"]["value"]: u.as_dict()["currentValue"] for u in compute.usage.list(LOCATION)}
    assert used["Standard NCASv3_T4 Family"] == 20
    assert used["cores"] == 20
    sizes = [s.name for s in compute.resource_skus.list(filter=f"location eq '{LOCATION}'")]
    assert "Standard_NC24ads_A100_v4" in sizes


def test_what_azure_does_not_take(azure: ArmServer, aks: ContainerServiceClient) -> None:
    for wrong in (
        {"nodeLabels": {"kubernetes.azure.com/x": "y"}},
        {"tags": {"kaito.sh/x": "y"}},
        {"vmSize": ""},
        {"count": 1001},
    ):
        with pytest.raises(HttpResponseError) as caught:
            aks.agent_pools.begin_create_or_update(*PLACE, ID, {"properties": {**body()["properties"], **wrong}})  # type: ignore[call-overload]
        assert caught.value.status_code == 400
    with pytest.raises(HttpResponseError):
        aks.agent_pools.begin_create_or_update(*PLACE, "Not-a-pool", body())


def test_the_operation_is_asked_for_by_its_signed_address(azure: ArmServer) -> None:
    found, _ = settings.read(azure.environment)
    assert found is not None
    edge = Arm(found)
    azure.cloud.fail("put", "silent", code="ZonalAllocationFailed")
    edge.put(ID, body())
    assert edge.why_failed(ID) is None
    end = time.monotonic() + 10
    while edge.why_failed(ID) is None and time.monotonic() < end:
        time.sleep(0.05)
    said = edge.why_failed(ID)
    assert said is not None
    assert "zonalallocationfailed" in said.codes
    assert edge.why_failed("never") is None


def test_as_a_program(tmp_path: Any) -> None:
    command = [sys.executable, "-m", "kaito_provisioner_aks.testing.arm_server", "--create-seconds", "0.1", "--delete-seconds", "0.1",
               "--on-created", f"cat > {tmp_path}/joined", "--on-deleted", f"cat > {tmp_path}/left",
               "--fault", json.dumps({"call": "put", "kind": "busy"})]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        try:
            assert process.stdout is not None
            environment = dict(process.stdout.readline().strip().split("=", 1) for _ in range(5))
            url = environment["KAITO_ARM_ENDPOINT"]
            aks = AksNodes(environment)
            with pytest.raises(Exception, match="Another operation"):
                aks.ensure(request())
            _until(lambda: aks.ensure(request()).phase == "ready")
            joined = json.loads((tmp_path / "joined").read_text())
            assert joined["nodes"] == [f"aks-{ID}-10000000-vmss000000"]
            assert joined["labels"]["agentpool"] == ID
            assert joined["taints"] == ["sku=gpu:NoSchedule"]
            _ask(f"{url}/_test/faults", {"call": "delete", "kind": "throttled"})
            with pytest.raises(Exception, match="please retry again in 17 seconds"):
                aks.release(ID)
            _until(lambda: aks.release(ID).phase == "absent")
            assert json.loads((tmp_path / "left").read_text()) == {"name": ID}
            assert _ask(f"{url}/_test/calls")["created"] == [ID]
            assert _ask(f"{url}/_test/pools") == {}
            with pytest.raises(urllib.error.HTTPError):
                _ask(f"{url}/_test/nothing")
        finally:
            process.terminate()


def _ask(url: str, body: Any = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=10) as answer:
        return json.loads(answer.read())


def _until(true: Any) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
