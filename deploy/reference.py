"""Writes `docs/reference.md`: error codes, events and metrics from the code (`make dashboards`).

A test fails if it is not up to date.
"""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from pydantic import BaseModel

from app.api.errors import INTERNAL_ERROR, STATUS_BY_CODE
from app.api.upkeep.metrics_page import AboutProcesses
from app.messages import (
    DoneEvent,
    ErrorEvent,
    JobEvent,
    StatusEvent,
    TokenEvent,
)
from app.metrics import ApiMetrics, WorkerMetrics
from app.process_table import ProcessTable
from dycoke_core.errors import DycokeError

OUTPUT = Path(__file__).parent.parent / "docs" / "reference.md"
HEAD = """\
# Reference

`make dashboards` writes this page from the code: make changes there. The whole HTTP interface is in
the OpenAPI document, `/openapi.json`.
"""
BY_HTTP_ALONE = {  # codes that none of our exceptions has
    INTERNAL_ERROR: "Something unexpected failed; the log says what.",
    "not_found": "There is no such path.",
    "method_not_allowed": "The path does not take this method.",
}
EVENTS: tuple[tuple[type[BaseModel], str], ...] = (
    (JobEvent, "first: the job, with its compression and all defaults filled in"),
    (StatusEvent, "what the job waits for, until its first token"),
    (TokenEvent, "a piece of the answer; `index` is the position of its first token"),
    (DoneEvent, "last: the whole answer and its receipt"),
    (ErrorEvent, "last, instead of `done`: why there is no answer"),
)


def reference() -> str:
    parts = (HEAD, _errors(), _events(), _objects(), _metrics())
    return "\n".join(parts)


def _errors() -> str:
    meanings = dict(BY_HTTP_ALONE) | {error.code: _first_line(error) for error in _error_classes()}
    retryable = {error.code for error in _error_classes() if error.retryable}
    rows = (
        (f"`{code}`", str(status), "yes" if code in retryable else "", meanings[code])
        for code, status in sorted(STATUS_BY_CODE.items(), key=lambda item: (item[1], item[0]))
    )
    return _section("Error codes", ("code", "HTTP", "retryable", "meaning"), rows)


def _error_classes() -> list[type[DycokeError]]:
    found, classes = [], DycokeError.__subclasses__()
    while classes:
        error_class = classes.pop()
        classes += error_class.__subclasses__()
        if "code" in vars(error_class):
            found.append(error_class)
    return found


def _first_line(error_class: type[DycokeError]) -> str:
    doc = inspect.getdoc(error_class) if error_class.__doc__ else None
    assert doc, f"{error_class.__name__} says nothing of itself"
    return " ".join(doc.split("\n\n")[0].split())


def _events() -> str:
    rows = (
        (f"`{get_args(event.model_fields['type'].annotation)[0]}`", text, _fields(event))
        for event, text in EVENTS
    )
    return _section("Events", ("type", "when", "fields"), rows)


def _fields(model: type[BaseModel]) -> str:
    return ", ".join(f"`{name}`" for name in model.model_fields if name != "type")


def _objects() -> str:
    """The fields that are objects, with theirs."""
    rows = ((f"`{path}`", _fields(model)) for event, _ in EVENTS for path, model in nested(event))
    return _section("Objects in events", ("object", "fields"), rows)


def nested(event: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Each object within the event, by its path; the first word is the event's type."""
    (name,) = get_args(event.model_fields["type"].annotation)
    yield from _within(name, event)


def _within(path: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            yield f"{path}.{name}", inner
            yield from _within(f"{path}.{name}", inner)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Those in an annotation such as `Model | None` or `list[Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def metric_names() -> set[str]:
    """Of everything that the service's pages show."""
    return {_name(metric) for _, registry in _registries() for metric in _sorted(registry)}


def _metrics() -> str:
    return "\n".join(
        _section(
            title,
            ("metric", "type", "meaning"),
            ((f"`{_name(metric)}`", metric.type, metric.documentation) for metric in _sorted(of)),
        )
        for title, of in _registries()
    )


def _registries() -> tuple[tuple[str, CollectorRegistry], ...]:
    of_api, of_worker = CollectorRegistry(), CollectorRegistry()
    ApiMetrics(of_api).watch_readers(kills=dict, num_exceptions=lambda: 0)
    of_api.register(AboutProcesses(ProcessTable.create(1), ()))
    WorkerMetrics(of_worker, model="any")
    return (("Metrics of the API", of_api), ("Metrics of a worker", of_worker))


def _sorted(registry: CollectorRegistry) -> list[Metric]:
    return sorted(registry.collect(), key=lambda metric: metric.name)


def _name(metric: Metric) -> str:
    return metric.name + ("_total" if metric.type == "counter" else "")


def _section(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return f"## {title}\n\n" + "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(reference())
    print(OUTPUT)
