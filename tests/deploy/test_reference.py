"""The generated reference: every code, event, object and metric that the code has."""

import re

from app.api.errors import STATUS_BY_CODE
from app.errors import error_codes
from app.messages import DoneEvent, JobEvent, Timings, TokenEvent, Usage
from deploy.reference import EVENTS, metric_names, nested, reference

TEXT = reference()


def rows_of(title: str) -> list[list[str]]:
    """The cells of a section's tables, but for their heads."""
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_code_stands_there_once_by_its_status() -> None:
    rows = rows_of("Error codes")
    codes = [row[0].strip("`") for row in rows]
    assert len(set(codes)) == len(codes) and set(codes) == set(STATUS_BY_CODE)
    assert set(error_codes()) <= set(codes)
    statuses = [int(row[1]) for row in rows]
    assert statuses == sorted(statuses)
    assert statuses == [STATUS_BY_CODE[code] for code in codes]
    assert all(row[3] for row in rows), "each says what it means"


def test_what_may_be_tried_again_is_marked() -> None:
    retryable = {row[0].strip("`") for row in rows_of("Error codes") if row[2] == "yes"}
    assert {"queue_full", "no_worker", "engine_error"} <= retryable
    assert not retryable & {"invalid_request", "unauthorized", "cancelled", "internal_error"}


def test_events_come_with_their_fields_in_order() -> None:
    rows = {row[0].strip("`"): row[2] for row in rows_of("Events")}
    for event, _ in EVENTS:
        name = event.model_fields["type"].default
        fields = [field for field in event.model_fields if field != "type"]
        assert re.findall(r"`(\w+)`", rows[name]) == fields


def test_objects_within_an_event_are_found_by_their_path() -> None:
    within = dict(nested(DoneEvent))
    assert within["done.usage"] is Usage and within["done.timings_s"] is Timings
    assert "done.compression.flops.exact" in within, "objects within objects"
    assert dict(nested(TokenEvent)) == {} == dict(nested(JobEvent))


def test_metrics_are_those_of_every_process() -> None:
    names = metric_names()
    assert {"dycoke_request_latency_seconds", "dycoke_generation_tokens_total"} <= names
    assert all(f"`{name}`" in TEXT for name in names)
