"""Spans without a service: when there are any, contexts that are malformed, and the end."""

import sys
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app.tracing import Tracing, tracing_from_environment

PATIENCE_S = 60.0
TRACE_ID, CLIENT_SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01"


def test_tracing_is_off_unless_a_collector_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    tracing = tracing_from_environment("api")
    span = tracing.start_post(TRACEPARENT, "/v1/video/chat")
    assert span.traceparent == TRACEPARENT, "the client's trace id still reaches the log"
    span.end("done", is_error=False)
    tracing.close()
    assert tracing.start_post(None, "/v1/video/chat").traceparent is None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        f"00-{TRACE_ID}",
        f"00-{TRACE_ID.upper()}-{CLIENT_SPAN_ID}-01",
        f"00-{'0' * 32}-{CLIENT_SPAN_ID}-01",
        f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01\n",
    ],
)
def test_malformed_context_begins_a_trace_of_its_own(header: str) -> None:
    assert Tracing().start_post(header, "/v1/video/chat").traceparent is None
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    span = Tracing(provider).start_post(header, "/v1/video/chat")
    assert span.traceparent is not None and TRACE_ID not in span.traceparent
    span.end("no_worker", is_error=True)
    span.end("done", is_error=False)
    (finished,) = exporter.get_finished_spans()
    assert finished.attributes is not None
    assert finished.attributes["error.type"] == finished.attributes["dycoke.outcome"] == "no_worker"
    assert finished.parent is None


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ValueError, match="tracing"):
        tracing_from_environment("api")


class BlackHole(SpanExporter):
    """A collector that takes the connection and never answers."""

    def __init__(self) -> None:
        self.is_asked, self.may_answer = threading.Event(), threading.Event()
        self.has_answered = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.is_asked.set()
        self.may_answer.wait(PATIENCE_S)
        self.has_answered = True
        return SpanExportResult.SUCCESS


def test_collector_that_does_not_answer_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.tracing.FLUSH_TIMEOUT_S", 0.01)
    collector = BlackHole()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(collector))
    tracing = Tracing(provider)
    tracing.start_post(None, "/v1/video/chat").end("done", is_error=False)
    tracing.close()
    assert not collector.has_answered
    assert collector.is_asked.wait(PATIENCE_S), "it was given the chance"
    collector.may_answer.set()


def test_nothing_is_sent_once_more_when_python_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    at_exit: list[object] = []
    monkeypatch.setattr("atexit.register", lambda call, *args, **kwargs: at_exit.append(call))
    tracing = tracing_from_environment("api")
    tracing.close()
    owners = [getattr(call, "__self__", None) for call in at_exit]
    assert not any(isinstance(owner, TracerProvider) for owner in owners)
