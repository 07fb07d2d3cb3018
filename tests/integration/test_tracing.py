"""One question's trace through API, queue and worker, received over OTLP as a collector would."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from dycoke_core.tiny import CLIP
from loadtest.running import RunningService, running_service

PATIENCE_S = 60.0
TRACE_ID, CLIENT_SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{CLIENT_SPAN_ID}-01"
STAGES = {"vision", "compress", "prefill", "decode"}


class Collector:
    """Takes OTLP over HTTP, and keeps each span with the service that sent it."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, WireSpan]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, message: ExportTraceServiceRequest) -> None:
        for of_resource in message.resource_spans:
            name = attributes(of_resource.resource)["service.name"]
            for of_scope in of_resource.scope_spans:
                self.spans += [(name, span) for span in of_scope.spans]

    def trace(self, trace_id: str, *names: str) -> dict[str, tuple[str, WireSpan]]:
        """A trace's spans by name, once those are there."""
        until = time.monotonic() + PATIENCE_S
        while True:
            found = {s.name: (by, s) for by, s in list(self.spans) if s.trace_id.hex() == trace_id}
            if set(names) <= set(found):
                return found
            assert time.monotonic() < until, sorted(found)
            time.sleep(0.05)


def attributes(holder: Any) -> dict[str, Any]:
    values = {}
    for pair in holder.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        values[pair.key] = (
            [v.string_value for v in value.values] if kind == "array_value" else value
        )
    return values


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.fixture(scope="module")
def service(
    collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    settings = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "DYCOKE_WORKER_THREADS": "1",
        "DYCOKE_DTYPE": "float32",
    }
    with running_service(tmp_path_factory.mktemp("tracing"), settings) as service:
        yield service


def ask(service: RunningService, traceparent: str, **fields: str) -> httpx.Response:
    with CLIP.open("rb") as video:
        return httpx.post(
            f"{service.url}/v1/video/chat",
            files={"video": video},
            data={"question": "What moves?", "max_tokens": "6", "stream": "false", **fields},
            headers={"traceparent": traceparent},
            timeout=PATIENCE_S,
        )


@pytest.mark.slow
def test_one_trace_leads_from_the_client_through_api_and_queue_to_the_worker(
    service: RunningService, collector: Collector
) -> None:
    done = ask(service, TRACEPARENT).json()
    names = {"POST /v1/video/chat", "receive", "read frames", "queue", "chat dycoke-tiny", *STAGES}
    spans = collector.trace(TRACE_ID, *names)
    assert set(spans) == names

    def parent(name: str) -> str:
        return spans[name][1].parent_span_id.hex()

    def span_id(name: str) -> str:
        return spans[name][1].span_id.hex()

    assert parent("POST /v1/video/chat") == CLIENT_SPAN_ID
    for name in ("receive", "read frames", "queue", "chat dycoke-tiny"):
        assert parent(name) == span_id("POST /v1/video/chat"), name
    for name in STAGES:
        assert parent(name) == span_id("chat dycoke-tiny"), name
    assert spans["read frames"][0] == "dycoke-api"
    assert spans["chat dycoke-tiny"][0] == "dycoke-worker"
    for _, span in spans.values():
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        assert "What moves?" not in str(span), "questions are in no span"

    said = attributes(spans["chat dycoke-tiny"][1])
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.request.model"] == said["gen_ai.response.model"] == "dycoke-tiny"
    assert said["gen_ai.request.max_tokens"] == 6
    assert said["gen_ai.usage.input_tokens"] == done["usage"]["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == done["usage"]["completion_tokens"]
    assert said["gen_ai.response.finish_reasons"] == [done["finish_reason"]]
    assert said["dycoke.job_id"] == done["job_id"]
    decode = spans["decode"][1]
    length_s = (decode.end_time_unix_nano - decode.start_time_unix_nano) / 1e9
    assert length_s == pytest.approx(done["timings_s"]["decode"], abs=1e-4)


@pytest.mark.slow
def test_generative_ai_attributes_are_those_of_opentelemetry(
    service: RunningService, collector: Collector
) -> None:
    known = {v for k, v in vars(gen_ai_attributes).items() if k.startswith("GEN_AI_")}
    ask(service, TRACEPARENT)
    for _, span in collector.trace(TRACE_ID, "chat dycoke-tiny").values():
        ours = {name for name in attributes(span) if name.startswith("gen_ai.")}
        assert ours <= known, ours - known


@pytest.mark.slow
def test_log_lines_about_a_job_carry_its_trace(service: RunningService) -> None:
    job_id = ask(service, TRACEPARENT).json()["job_id"]
    until = time.monotonic() + PATIENCE_S
    while True:
        lines = [
            json.loads(line) for line in service.log.read_text().splitlines() if job_id in line
        ]
        told = {(line["process"], line["message"]) for line in lines}
        if {("worker-0", "job ended"), ("api-0", "job ended")} <= told:
            break
        assert time.monotonic() < until, told
        time.sleep(0.05)
    assert {line["job_id"] for line in lines} == {job_id}
    assert {line["trace_id"] for line in lines} == {TRACE_ID}


@pytest.mark.slow
def test_refused_post_ends_its_span_without_blaming_the_service(
    service: RunningService, collector: Collector
) -> None:
    trace_id = "1" * 32
    response = ask(service, f"00-{trace_id}-{CLIENT_SPAN_ID}-01", num_frames="0")
    assert response.status_code == 400
    _, span = collector.trace(trace_id, "POST /v1/video/chat")["POST /v1/video/chat"]
    assert attributes(span)["dycoke.outcome"] == "invalid_request"
    assert "error.type" not in attributes(span)
