"""Logs are one JSON object per line."""

import json
import logging
import sys

from app.logs import JsonFormatter


def test_record_becomes_one_line_of_json_with_its_extras() -> None:
    record = logging.LogRecord("app.x", logging.INFO, __file__, 1, "took %d", (3,), None)
    record.job_id = "j"
    line = JsonFormatter("worker-0").format(record)
    entry = json.loads(line)
    assert "\n" not in line
    assert (entry["message"], entry["job_id"], entry["level"]) == ("took 3", "j", "INFO")
    assert (entry["process"], entry["logger"]) == ("worker-0", "app.x")
    assert entry["time"].endswith("Z")


def test_exception_is_kept_with_its_traceback() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    entry = json.loads(JsonFormatter("api").format(record))
    assert "ValueError: no" in entry["traceback"]


def test_what_json_does_not_know_is_written_as_text() -> None:
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "m", (), None)
    record.path = object()
    assert "object" in json.loads(JsonFormatter("api").format(record))["path"]
