"""What the documents say of alerts, metrics and sizes is what is there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.worker.process import CPU_RUNNING_JOBS
from deploy.reference import metric_names
from dycoke_core.config import DEFAULT_BATCHING
from dycoke_core.engine.backends.cpu.backend import CpuBackend
from dycoke_core.engine.vision_encoder import SLICE_S
from tests.docs.documents import DOCUMENTS, ROOT
from tests.docs.tables import codes, table

RULES = ROOT / "deploy" / "prometheus" / "rules"
_NUMBER = r"(?<![\w.])\d+(?:\.\d+)?"


def alerts() -> Iterator[dict[str, Any]]:
    for path in sorted(RULES.glob("*.y*ml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from (rule for rule in group["rules"] if "alert" in rule)


def test_alerts_with_their_severities() -> None:
    rows = table("docs/operations.md", "alert", "severity").rows
    said = [(name, severity) for names, severity, _ in rows for name in codes(names)]
    there = [(rule["alert"], rule["labels"]["severity"]) for rule in alerts()]
    assert sorted(said) == sorted(there)


def test_thresholds_of_alerts() -> None:
    """Those that are written in figures."""
    rules = {rule["alert"]: rule for rule in alerts()}
    num_compared = 0
    for names, _, when in table("docs/operations.md", "alert", "severity").rows:
        text = "".join(f"{rules[name]['expr']} {rules[name].get('for')}" for name in codes(names))
        known = {float(number) for number in re.findall(_NUMBER, text)}
        for number, percent in re.findall(rf"({_NUMBER})( %)?", when):
            assert float(number) / (100 if percent else 1) in known, f"{names}: {number}"
            num_compared += 1
    assert num_compared


def test_sizes_by_device() -> None:
    cpu, gpu = DEFAULT_BATCHING["cpu"], DEFAULT_BATCHING["cuda"]
    (_, *rows) = table("docs/gpu.md", "", "CPU", "GPU").rows
    jobs = table("docs/gpu.md", "", "CPU", "GPU").rows[0]
    assert "`MAX_RUNNING_JOBS`" in jobs[0]
    assert jobs[1:] == (str(CPU_RUNNING_JOBS), str(gpu.max_running_sequences))
    for row, name in zip(
        rows, ("max_running_sequences", "prefill_chunk_tokens", "vision_batch_frames"), strict=False
    ):
        assert row[1:] == (f"{getattr(cpu, name):,}", f"{getattr(gpu, name):,}"), row[0]
    assert rows[-1][1:] == (
        f"{CpuBackend.vision_slice_layers} layers a step",
        f"as many layers as take {SLICE_S * 1000:g} ms",
    )


DEPLOYED = [  # not the Python that puts names together for the dashboards
    path
    for path in (ROOT / "deploy").rglob("*")
    if path.suffix in (".json", ".md", ".yaml", ".yml")
]
ELSEWHERE = {"dycoke_core", "dycoke_pipe", "dycoke_llava_onevision", "dycoke_one_shot"}


@pytest.mark.parametrize("paths", [DOCUMENTS, DEPLOYED], ids=["documents", "deploy"])
def test_metrics_that_are_named_exist(paths: list[Path]) -> None:
    known = metric_names()
    num_found = 0
    for path in paths:
        for name in re.findall(r"(?<![\w./-])dycoke_[a-z_]+[a-z]", path.read_text()):
            if name in ELSEWHERE:
                continue
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert name in known or base in known, f"{path.name}: no metric is {name}"
            num_found += 1
    assert num_found >= 10


def test_the_reference_has_every_metric_that_a_service_shows(url: str) -> None:
    page = httpx.get(f"{url}/metrics").raise_for_status().text
    shown = {metric.name for metric in text_string_to_metric_families(page)}
    ours = {name for name in shown if name.startswith("dycoke_")}
    known = {name.removesuffix("_total") for name in metric_names()}
    assert "dycoke_reader_kills" in ours and ours <= known
