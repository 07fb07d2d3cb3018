"""Rules and alerts: valid, tested by promtool, and in step with the service's error codes."""

import re
import subprocess
from typing import Any

import pytest
import yaml

from app.api.errors import is_our_fault
from app.errors import error_codes
from app.metrics import CLIENT_DEADLINE_EXCEEDED
from tests.deploy.prometheus import CONFIG, RULES, tool

LOCAL_CONFIG = CONFIG.with_name("local.yml")
ALERTS = yaml.safe_load((RULES / "alerts.yml").read_text())
ALERT_RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]


def promtool(*args: str) -> None:
    done = subprocess.run(
        [tool("promtool"), *args], cwd=CONFIG.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_scrape_configurations_are_valid_and_name_the_same_jobs() -> None:
    promtool("check", "config", "--syntax-only", CONFIG.name)
    promtool("check", "config", LOCAL_CONFIG.name)
    deployed, local = (
        {job["job_name"] for job in yaml.safe_load(path.read_text())["scrape_configs"]}
        for path in (CONFIG, LOCAL_CONFIG)
    )
    assert local == deployed - {"prometheus"}


def test_rules_are_valid() -> None:
    promtool("check", "rules", *map(str, sorted(RULES.glob("*.yml"))))


def test_each_alert_fires_when_it_must_and_only_then() -> None:
    promtool("test", "rules", "alerts_test.yml")


@pytest.mark.parametrize("rule", ALERT_RULES, ids=lambda rule: rule["alert"])
def test_alert_says_what_to_do_and_is_tested(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"] and len(rule["annotations"]["runbook"]) > 40
    tests = (CONFIG.parent / "alerts_test.yml").read_text()
    assert f'{{labels: \'ALERTS{{alertname="{rule["alert"]}"' in tests, "no test makes it fire"


def test_error_ratio_leaves_out_what_clients_cause() -> None:
    """Of the codes that an answer may end with, those that do not count against the service."""
    text = (RULES / "recording.yml").read_text()
    (pattern,) = re.findall(r'outcome!~"([^"]+)"', text)
    left_out = set(pattern.split("|")) - {"done"}
    outcomes = (CLIENT_DEADLINE_EXCEEDED, *error_codes())
    assert left_out == {outcome for outcome in outcomes if not is_our_fault(outcome)}
