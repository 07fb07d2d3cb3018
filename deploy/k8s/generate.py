"""Writes `rules.yaml`: the deployed Prometheus rules as a PrometheusRule (`make dashboards`).

A test fails if it is not up to date.
"""

from pathlib import Path

import yaml

FOLDER = Path(__file__).parent
OUTPUT = FOLDER / "rules.yaml"
RULES = FOLDER.parent / "prometheus" / "rules"
HEAD = "# Written by `make dashboards` from deploy/prometheus/rules: edit there.\n"


def prometheus_rule() -> str:
    files = [yaml.safe_load(path.read_text()) for path in sorted(RULES.glob("*.yml"))]
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "dycoke"},
        "spec": {"groups": [group for file in files for group in file["groups"]]},
    }
    return HEAD + yaml.safe_dump(resource, sort_keys=False, width=100)


if __name__ == "__main__":
    OUTPUT.write_text(prometheus_rule())
    print(OUTPUT)
