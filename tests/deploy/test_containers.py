"""Dockerfile and compose file: linted, valid by the compose specification's schema, and in step
with the service. No image is built here.
"""

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from app.api.server import CLOSE_TIMEOUT_S
from app.keys.access import check_open_door
from app.settings import ENV_PREFIX, Settings
from app.worker.pool import STOP_MARGIN_S
from deploy.requirements.images import PYTHON
from deploy.resolve_digests import images
from tests.deploy.prometheus import CONFIG, DEPLOY

ROOT = DEPLOY.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("api", "worker", "worker-cpu")
TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT"  # not one of ours, but documented with them
# Settings that a container fixes: by its image, its ports, its grace period or its kind.
FIXED = {
    "api": {"HOST", "PORT", "DATA_DIR", "REDIS_URL", "DRAIN_TIMEOUT_S", "ALLOW_ANONYMOUS"},
    "worker": {"HOST", "WORKER_METRICS_PORT", "REDIS_URL", "DRAIN_TIMEOUT_S"},
    "worker-cpu": {"HOST", "WORKER_METRICS_PORT", "REDIS_URL", "DRAIN_TIMEOUT_S", "DEVICE"},
}


def settings_read_by(process: str) -> set[str]:
    """What a process's sources, and each for its log, take from `Settings`."""
    folders = {"api": ("api", "keys"), "worker": ("worker",)}[process]
    paths = [path for folder in folders for path in (ROOT / "app" / folder).rglob("*.py")]
    text = "".join(path.read_text() for path in paths)
    read = set(re.findall(r"\b_?settings\.(\w+)", text)) | {"log_level"}
    names = {"model" if name == "model_name" else name for name in read}
    return {name.upper() for name in names & set(Settings.model_fields)}


def test_dockerfile_passes_hadolint() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_file_is_valid() -> None:
    path = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = yaml.safe_load(path.read_text())
    jsonschema.Draft7Validator(schema).validate(COMPOSE)


def test_all_that_images_install_is_checked_by_hash() -> None:
    """`pip install` of anything but our own wheel, built from the source that was copied."""
    assert "PIP_REQUIRE_HASHES=1" in DOCKERFILE and "PIP_ONLY_BINARY=:all:" in DOCKERFILE
    commands = re.findall(r"^RUN (.*pip (?:install|wheel).*)$", DOCKERFILE, re.MULTILINE)
    checked = [command for command in commands if "PIP_REQUIRE_HASHES=0" not in command]
    files = [re.findall(r"requirements/([\w-]+(?:\$DEVICE)?)\.txt", command) for command in checked]
    assert files == [["build"], ["api"], ["worker-$DEVICE"]]
    for command in set(commands) - set(checked):
        assert "--no-deps --no-index" in command


def test_images_are_named_by_exact_tags_and_take_a_digest() -> None:
    bases = re.findall(r"^FROM (python\S+)", DOCKERFILE, re.MULTILINE)
    assert set(bases) == {"python:${PYTHON_TAG}${PYTHON_DIGEST}"}
    found = {image.variable: image for image in images()}
    others = set(SERVICES) - set(OURS)
    assert set(found) == {"PYTHON_DIGEST", *(f"{name.upper()}_DIGEST" for name in others)}
    assert all(re.match(r"v?\d+\.\d+\.\d+", image.tag) for image in found.values())
    assert found["PYTHON_DIGEST"].tag.startswith(f"{PYTHON}."), "whose wheels are hashed"
    for name in OURS:
        assert SERVICES[name]["build"]["args"]["PYTHON_DIGEST"] == "${PYTHON_DIGEST:-}"


def test_images_run_as_nobody_in_particular() -> None:
    runtime = DOCKERFILE.split("AS runtime")[1]
    assert "\nUSER 10001:10001\n" in runtime and "USER root" not in DOCKERFILE


def test_build_context_has_what_the_dockerfile_copies() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("name", OURS)
def test_service_gets_only_settings_that_exist(name: str) -> None:
    known = {ENV_PREFIX + field.upper() for field in Settings.model_fields}
    given = {v for v in SERVICES[name]["environment"] if v.startswith(ENV_PREFIX)}
    assert given and given <= known


def test_every_setting_concerns_a_service() -> None:
    known = {field.upper() for field in Settings.model_fields}
    assert settings_read_by("api") | settings_read_by("worker") == known


@pytest.mark.parametrize("name", OURS)
def test_documented_settings_reach_the_service_unless_it_fixes_them(name: str) -> None:
    environment = SERVICES[name]["environment"]
    passed_on = {
        variable
        for variable, value in environment.items()
        if value is None or str(value).startswith(f"${{{variable}:-")
    }
    concerned = settings_read_by("api" if name == "api" else "worker")
    assert FIXED[name] <= concerned
    expected = {ENV_PREFIX + setting for setting in concerned - FIXED[name]}
    assert passed_on == expected | {TRACES}


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_confined_bounded_and_restarted(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "privileged" not in service
    # Nothing else: Docker's default seccomp profile stays, which lets the readers use Landlock.
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert {"memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
    assert service["logging"]["options"]["max-size"]


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_this_machine_only_and_redis_not_at_all(name: str) -> None:
    ports = SERVICES[name].get("ports", [])
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert bool(ports) == (name in ("api", "prometheus", "grafana"))


def test_api_lets_everybody_in_where_only_this_machine_reaches_it_and_keys_go_first() -> None:
    """These two belong together: an anonymous API and a port on loopback alone."""
    environment = SERVICES["api"]["environment"]
    assert environment["DYCOKE_ALLOW_ANONYMOUS"] == "true"
    assert SERVICES["api"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "DYCOKE_API_KEYS" in environment
    _, _, names = environment["DYCOKE_ALLOWED_HOSTS"].rstrip("}").partition(":-")
    settings = Settings(allow_anonymous=True, allowed_hosts=names, host="0.0.0.0")
    check_open_door(settings, has_keys=False)
    assert settings.allowed_hosts == ["localhost", "127.0.0.1", "[::1]", "api"]


@pytest.mark.parametrize("name", SERVICES)
def test_keys_are_given_to_the_api_alone(name: str) -> None:
    has_keys = "DYCOKE_API_KEYS" in SERVICES[name].get("environment", {})
    assert has_keys == (name == "api")


def test_redis_keeps_what_it_has_and_is_reached_from_inside_only() -> None:
    redis = SERVICES["redis"]
    words = redis["command"]
    assert words[words.index("--maxmemory-policy") + 1] == "noeviction"
    assert words[words.index("--appendonly") + 1] == "yes"
    assert redis["networks"] == ["store"] and COMPOSE["networks"]["store"]["internal"]
    assert all(name == "redis" or name in OURS for name in services_on("store"))
    assert any(volume.endswith(":/data") for volume in redis["volumes"])
    limit_gb = int(words[words.index("--maxmemory") + 1].removesuffix("gb"))
    assert int(redis["deploy"]["resources"]["limits"]["memory"].removesuffix("g")) > limit_gb


def services_on(network: str) -> list[str]:
    return [name for name, service in SERVICES.items() if network in service["networks"]]


def test_no_container_has_a_way_out_unless_one_is_opened() -> None:
    networks = COMPOSE["networks"]
    for name, network in networks.items():
        options = network.get("driver_opts", {})
        is_cut = options.get("com.docker.network.bridge.enable_ip_masquerade") == "false"
        assert network.get("internal") or is_cut, name
    published = {name for name, service in SERVICES.items() if service.get("ports")}
    outer = [name for name, network in networks.items() if not network.get("internal")]
    for name in published:
        assert len(set(SERVICES[name]["networks"]) & set(outer)) == 1, (
            "for the ports, and one route"
        )
    assert {name for network in outer for name in services_on(network)} == published


def test_a_way_out_is_opened_for_the_api_and_workers_alone() -> None:
    opened = yaml.safe_load((DEPLOY / "compose.outbound.yml").read_text())
    assert set(opened["networks"]) == {"edge"} and set(opened["services"]) <= set(OURS)
    assert all(set(service["networks"]) == {"edge"} for service in opened["services"].values())
    assert services_on("edge") == ["api"]
    assert {"api", *opened["services"]} == set(OURS)


def test_every_process_of_ours_has_redis_password_and_no_other_service_has() -> None:
    """What the user of that name may do: tests/deploy/test_redis_users.py."""
    for name in OURS:
        url = SERVICES[name]["environment"]["DYCOKE_REDIS_URL"]
        assert re.fullmatch(r"redis://dycoke:\$\{REDIS_PASSWORD:\?[^}]+\}@redis:6379/0", url)
    has_password = [name for name, service in SERVICES.items() if "REDIS_PASSWORD" in str(service)]
    assert has_password == ["redis", *OURS]


@pytest.mark.parametrize("name", OURS)
def test_service_waits_for_redis_and_is_given_time_to_drain(name: str) -> None:
    service = SERVICES[name]
    assert service["depends_on"]["redis"] == {"condition": "service_healthy"}
    drain_s = float(service["environment"]["DYCOKE_DRAIN_TIMEOUT_S"])
    margin_s = CLOSE_TIMEOUT_S if name == "api" else STOP_MARGIN_S
    assert float(service["stop_grace_period"].removesuffix("s")) > drain_s + margin_s


def test_one_kind_of_worker_runs_by_default_and_the_other_by_its_profile() -> None:
    assert (ROOT / ".env").read_text().splitlines()[-1] == "COMPOSE_PROFILES=gpu"
    assert SERVICES["worker"]["profiles"] == ["gpu"]
    (device,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert SERVICES["worker-cpu"]["profiles"] == ["cpu"]
    assert SERVICES["worker-cpu"]["build"]["args"]["DEVICE"] == "cpu"
    assert "DEVICE" not in SERVICES["worker"]["build"]["args"]
    assert "devices" not in str(SERVICES["worker-cpu"]["deploy"])


def test_prometheus_asks_services_that_exist_on_ports_that_they_serve() -> None:
    scrape = {job["job_name"]: job for job in yaml.safe_load(CONFIG.read_text())["scrape_configs"]}
    (api,) = scrape["dycoke-api"]["dns_sd_configs"]
    assert api["names"] == ["api"] and api["port"] == Settings().port
    for number, worker in enumerate(scrape["dycoke-worker"]["dns_sd_configs"]):
        assert worker["names"] == ["workers"]
        assert worker["port"] == Settings().worker_metrics_port + number
    for name in ("worker", "worker-cpu"):
        assert "workers" in SERVICES[name]["networks"]["inside"]["aliases"]


def test_grafana_finds_datasource_and_dashboards_without_a_click() -> None:
    grafana = SERVICES["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "dycoke.yml").read_text())
    (datasource,) = source["datasources"]
    assert datasource["isDefault"] and datasource["url"] == "${PROMETHEUS_URL}"
    assert grafana["environment"]["PROMETHEUS_URL"] == "http://prometheus:9090"
    interval = yaml.safe_load(CONFIG.read_text())["global"]["scrape_interval"]
    assert datasource["jsonData"]["timeInterval"] == interval
    boards = yaml.safe_load((provisioning / "dashboards" / "dycoke.yml").read_text())
    (provider,) = boards["providers"]
    assert provider["options"]["path"] == mounts["./deploy/grafana/dashboards"]
    assert provider["folder"] == "DyCoke"
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "deploy" / "grafana" / "dashboards" / Path(home).name).is_file()


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_exists(name: str) -> None:
    for volume in SERVICES[name].get("volumes", []):
        source = volume.split(":")[0] if "${" not in volume else "models"
        if source.startswith("./"):
            assert (ROOT / source).exists()
        else:
            assert source in COMPOSE["volumes"]
