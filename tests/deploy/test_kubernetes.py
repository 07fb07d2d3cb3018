"""The manifests: valid by Kubernetes' own schemas, complete, and in step with the service.

Custom resources (KEDA's and the Prometheus operator's) have no schema here: what matters in them is
asserted one by one.
"""

import ipaddress
import re
import subprocess
import sys
import urllib.parse
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from app.api.server import CLOSE_TIMEOUT_S
from app.keys.entries import NAME
from app.metrics import WorkerMetrics
from app.settings import ENV_PREFIX, Settings
from app.store.keys import RedisKeys
from app.worker.pool import STOP_MARGIN_S
from deploy.k8s.generate import OUTPUT, prometheus_rule
from tests.deploy.prometheus import DEPLOY

FOLDER = DEPLOY / "k8s"
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
CUSTOM_KINDS = {"ScaledObject", "TriggerAuthentication", "PodMonitor", "PrometheusRule"}
PART_OF = {"app.kubernetes.io/part-of": "dycoke"}
DEPLOYMENTS = ("dycoke-api", "dycoke-worker")


def resources() -> list[dict[str, Any]]:
    names = [name for name in KUSTOMIZATION["resources"] if name.endswith(".yaml")]
    return [r for name in names for r in yaml.safe_load_all((FOLDER / name).read_text())]


RESOURCES = resources()


def one(kind: str, name: str) -> dict[str, Any]:
    (found,) = [r for r in RESOURCES if (r["kind"], r["metadata"]["name"]) == (kind, name)]
    return found


def pod(deployment: str) -> dict[str, Any]:
    spec: dict[str, Any] = one("Deployment", deployment)["spec"]["template"]["spec"]
    return spec


def container(deployment: str) -> dict[str, Any]:
    (only,) = pod(deployment)["containers"]
    result: dict[str, Any] = only
    return result


def environment(deployment: str) -> dict[str, Any]:
    return {v["name"]: v.get("value") for v in container(deployment)["env"]}


@pytest.mark.parametrize(
    "resource", RESOURCES, ids=lambda r: f"{r['kind']}-{r['metadata']['name']}"
)
def test_resource_is_valid(resource: dict[str, Any]) -> None:
    if resource["kind"] in CUSTOM_KINDS:
        with pytest.raises(kubernetes_validate.SchemaNotFoundError):
            kubernetes_validate.validate(resource, "1.33", strict=True)
    else:
        kubernetes_validate.validate(resource, "1.33", strict=True)


def test_kustomization_names_every_manifest() -> None:
    manifests = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    assert manifests == {name for name in KUSTOMIZATION["resources"] if "/" not in name}
    folders = [name for name in KUSTOMIZATION["resources"] if "/" in name]
    for folder in folders:
        generators = yaml.safe_load((FOLDER / folder / "kustomization.yaml").read_text())
        for path in generators["configMapGenerator"][0]["files"]:
            assert (FOLDER / folder / path).is_file()


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_pod_is_confined(name: str) -> None:
    spec = pod(name)
    assert spec["enableServiceLinks"] is False
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    security = container(name)["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    mounted = {mount["mountPath"] for mount in container(name)["volumeMounts"]}
    assert {"/data", "/tmp"} <= mounted, "the two places that the images write to"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_pod_gets_only_settings_that_exist(name: str) -> None:
    known = {ENV_PREFIX + field.upper() for field in Settings.model_fields}
    given = {*environment(name), *one("ConfigMap", "dycoke")["data"]}
    assert {variable for variable in given if variable.startswith(ENV_PREFIX)} <= known


@pytest.mark.parametrize(
    ("name", "margin_s"), [("dycoke-api", CLOSE_TIMEOUT_S), ("dycoke-worker", STOP_MARGIN_S)]
)
def test_termination_leaves_time_for_the_drain(name: str, margin_s: float) -> None:
    hook = container(name).get("lifecycle", {}).get("preStop", {}).get("exec", {})
    before_s = float(hook["command"][1]) if hook else 0.0
    drain_s = float(environment(name)["DYCOKE_DRAIN_TIMEOUT_S"])
    assert pod(name)["terminationGracePeriodSeconds"] > before_s + drain_s + margin_s


@pytest.mark.parametrize("name", ["dycoke-videos", "dycoke-models"])
def test_claim_can_be_written_and_is_mounted_by_many(name: str) -> None:
    assert one("PersistentVolumeClaim", name)["spec"]["accessModes"] == ["ReadWriteMany"]


def test_worker_reads_models_and_cannot_write_them() -> None:
    (volume,) = [v for v in pod("dycoke-worker")["volumes"] if v["name"] == "models"]
    assert volume["persistentVolumeClaim"] == {"claimName": "dycoke-models", "readOnly": True}
    (mount,) = [m for m in container("dycoke-worker")["volumeMounts"] if m["name"] == "models"]
    assert mount["readOnly"] is True
    assert one("ConfigMap", "dycoke")["data"]["DYCOKE_MODEL"].startswith(mount["mountPath"] + "/")


def test_worker_has_one_gpu_and_one_engine() -> None:
    resources = container("dycoke-worker")["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "1"
    assert environment("dycoke-worker")["DYCOKE_WORKERS"] == "1"


def test_workers_scale_on_the_jobs_of_their_stream() -> None:
    spec = one("ScaledObject", "dycoke-worker")["spec"]
    data = one("ConfigMap", "dycoke")["data"]
    model = data["DYCOKE_MODEL"].rpartition("/")[2]  # the name of a model's directory
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "redis-streams"
    assert trigger["metadata"] == {
        "stream": RedisKeys().jobs(model),
        "streamLength": data["DYCOKE_MAX_RUNNING_JOBS"],
        "enableTLS": "true",
    }
    assert spec["scaleTargetRef"]["name"] == "dycoke-worker"
    assert spec["minReplicaCount"] >= 1
    assert (
        trigger["authenticationRef"]["name"]
        == one("TriggerAuthentication", "dycoke-redis")["metadata"]["name"]
    )


def example_secret(name: str) -> dict[str, str]:
    """As the kustomization's comment has it created."""
    text = (FOLDER / "kustomization.yaml").read_text()
    command = text.split(f"create secret generic {name} ")[1].split("\n#\n")[0]
    command = command.split("kubectl")[0]
    return dict(re.findall(r"--from-literal=(\w+)=(\S+)", command))


def test_example_secrets_and_trigger_tell_of_the_same_redis() -> None:
    """With TLS or without, each as its own user, and every key that it reads is in its secret."""
    url = urllib.parse.urlsplit(example_secret("dycoke-redis")["url"])
    of_keda = example_secret("dycoke-redis-keda")
    assert url.netloc.rpartition("@")[2] == of_keda["address"]
    users = {line.split()[1] for line in (DEPLOY / "redis" / "users.acl").read_text().splitlines()}
    assert users == {"default", url.username, of_keda["username"]}
    (trigger,) = one("ScaledObject", "dycoke-worker")["spec"]["triggers"]
    assert (url.scheme == "rediss") == (trigger["metadata"]["enableTLS"] == "true")
    targets = one("TriggerAuthentication", "dycoke-redis")["spec"]["secretTargetRef"]
    assert {t["name"] for t in targets} == {"dycoke-redis-keda"}
    assert {t["parameter"]: t["key"] for t in targets} == {name: name for name in of_keda}
    (to_redis,) = [
        rule
        for rule in one("NetworkPolicy", "dycoke-egress")["spec"]["egress"]
        if {"port": url.port} in rule["ports"]
    ]
    assert to_redis["ports"] == [{"port": url.port}]


def test_nothing_is_let_out_to_the_internet() -> None:
    for rule in one("NetworkPolicy", "dycoke-egress")["spec"]["egress"]:
        assert rule["to"], "everywhere"
        for peer in rule["to"]:
            cidr = peer.get("ipBlock", {}).get("cidr")
            assert cidr is None or ipaddress.ip_network(cidr).is_private


def test_api_does_not_start_without_keys_and_workers_get_none() -> None:
    (keys,) = [v for v in container("dycoke-api")["env"] if v["name"] == "DYCOKE_API_KEYS"]
    assert keys["valueFrom"] == {"secretKeyRef": {"name": "dycoke-api-keys", "key": "keys"}}
    given = {*environment("dycoke-api"), *one("ConfigMap", "dycoke")["data"]}
    assert "DYCOKE_ALLOW_ANONYMOUS" not in given
    assert "dycoke-api-keys" not in str(pod("dycoke-worker"))
    text = (FOLDER / "kustomization.yaml").read_text()
    example = re.search(r"secret generic dycoke-api-keys.*?--from-literal=keys=(\S+?):", text, re.S)
    assert example and NAME.fullmatch(example[1])


def test_api_goes_by_its_services_names() -> None:
    names = environment("dycoke-api")["DYCOKE_ALLOWED_HOSTS"]
    namespace, service = (
        KUSTOMIZATION["namespace"],
        one("Service", "dycoke-api")["metadata"]["name"],
    )
    assert Settings(allowed_hosts=names).allowed_hosts == [
        service,
        f"{service}.{namespace}",
        f"{service}.{namespace}.svc",
        f"{service}.{namespace}.svc.cluster.local",
    ]


def test_deployments_leave_their_size_to_the_autoscalers() -> None:
    assert all("replicas" not in one("Deployment", name)["spec"] for name in DEPLOYMENTS)
    target = one("HorizontalPodAutoscaler", "dycoke-api")["spec"]["scaleTargetRef"]
    assert target["name"] == "dycoke-api"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_pod_is_found_by_what_selects_it(name: str) -> None:
    labels = one("Deployment", name)["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"] for port in container(name)["ports"]}
    monitor = one("PodMonitor", name)["spec"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["jobLabel"]] == name, "the job that rules and dashboards select by"
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= ports
    assert PART_OF.items() <= labels.items()
    policy = one("NetworkPolicy", "dycoke-nothing-else")["spec"]
    assert policy["podSelector"]["matchLabels"] == PART_OF
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    budget = one("PodDisruptionBudget", name)["spec"]
    assert budget["selector"]["matchLabels"].items() <= labels.items()


def test_prometheus_may_reach_what_the_monitors_name() -> None:
    (rule,) = one("NetworkPolicy", "dycoke-prometheus")["spec"]["ingress"]
    served = {p["containerPort"] for name in DEPLOYMENTS for p in container(name)["ports"]}
    assert {port["port"] for port in rule["ports"]} == served
    assert served == {Settings().port, Settings().worker_metrics_port}


def test_worker_is_ready_when_it_has_places() -> None:
    """The probe's own program, against a page that a worker serves."""
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, model="m")
    server, _ = start_http_server(0, addr="127.0.0.1", registry=registry)
    *_, program = container("dycoke-worker")["readinessProbe"]["exec"]["command"]
    program = program.replace(":9400", f":{server.server_port}")

    def is_ready() -> bool:
        return subprocess.run([sys.executable, "-c", program]).returncode == 0

    try:
        assert not is_ready(), "it loads its model"
        metrics.set_capacity(running_jobs=4)
        assert is_ready()
        metrics.set_capacity(running_jobs=0)
        assert not is_ready(), "it drains"
    finally:
        server.shutdown()
        server.server_close()


def test_rules_are_those_that_prometheus_is_tested_with() -> None:
    assert OUTPUT.read_text() == prometheus_rule(), "run `make dashboards`"
