"""The tables of settings say what `app.settings` says."""

import re

import pytest

from app.api.app import LARGEST_UPLOADS
from app.api.pool import CORES_PER_PROCESS, MAX_DEFAULT_PROCESSES
from app.settings import ENV_PREFIX, Settings, load_settings
from app.worker.process import CPU_RUNNING_JOBS
from dycoke_core.auto import DEFAULT_LADDER, DEFAULT_OBJECTIVE_S
from dycoke_core.config import DEFAULT_BATCHING
from tests.docs.documents import DOCUMENTS
from tests.docs.tables import assert_defaults, codes, defaults, table, words

IN_WORDS = {2: "two", 4: "four", 8: "eight"}
TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT"  # of another's settings


def as_ladder() -> str:
    first, *others = DEFAULT_LADDER
    assert {level.policy for level in others} == {"dycoke"}
    return f"{first.policy} and dycoke at k " + ", ".join(str(level.k) for level in others)


DERIVED = {
    "redis_url": "unset: embedded",
    "model": "bundled",
    "auto_ladder": as_ladder(),
    "max_incoming_bytes": f"{LARGEST_UPLOADS} x MAX_UPLOAD_BYTES",
    "max_running_jobs": (
        f"{DEFAULT_BATCHING['cuda'].max_running_sequences} on a GPU, {CPU_RUNNING_JOBS} on a CPU"
    ),
    "api_processes": (
        f"serve: one per {IN_WORDS[CORES_PER_PROCESS]} cores, 1 to {MAX_DEFAULT_PROCESSES}; api: 1"
    ),
}


def said_in(document: str) -> dict[str, str]:
    """Each setting with its default, as the document's table says."""
    found: dict[str, str] = {}
    for names, default, _ in table(document, f"`{ENV_PREFIX}…`", "default").rows:
        found |= {n.lower(): text for n, text in defaults(codes(names), default)}
    return found


@pytest.mark.parametrize("document", ["README.md", "docs/settings.md"])
def test_defaults_are_those_of_the_code(document: str) -> None:
    said = said_in(document)
    said.pop(TRACES.lower(), None)
    said.pop(ENV_PREFIX.lower(), None)
    assert len(said) >= 8
    assert_defaults(Settings.model_fields, said, DERIVED)


def test_the_table_is_complete() -> None:
    said = said_in("docs/settings.md").keys() - {ENV_PREFIX.lower()}
    assert said == {*Settings.model_fields, TRACES.lower()}


def test_settings_in_the_text_exist_and_take_the_values_that_they_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    pairs: set[tuple[str, str]] = set()
    for document in DOCUMENTS:
        text = words(document)
        named = set(re.findall(rf"\b{ENV_PREFIX}[A-Z_]*[A-Z]\b", text))
        assert named <= known, f"{document.name}: {named - known}"
        pairs |= set(re.findall(rf"\b({ENV_PREFIX}[A-Z_]+)=([^\s`\"',]+)", text))
    assert len(pairs) >= 10
    for name, value in pairs:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            load_settings({name: value})


def test_the_objective_of_auto_is_the_setting_s() -> None:
    said = words("docs/compression.md")
    assert f"(`{ENV_PREFIX}AUTO_OBJECTIVE_S`, {DEFAULT_OBJECTIVE_S:g} s from" in said
    assert f"(`{ENV_PREFIX}AUTO_LADDER`; " in said
    first, *others = DEFAULT_LADDER
    *some, last = (str(level.k) for level in others)
    assert f"`{first.policy}`, then `dycoke` at `k` {', '.join(some)} and {last})" in said
