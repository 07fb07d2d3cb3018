"""Traces a question through API, queue and worker, and sends its spans by OTLP over HTTP.

    POST /v1/video/chat             the API, from acceptance to the job's end as clients see it;
    │                               or another path that posts jobs
    ├── receive                     the body, and the probe of its video
    ├── read frames
    ├── queue                       before it was taken, and waiting inside the engine
    └── chat MODEL                  a worker, from taking the job to its end
        └── vision, compress, prefill, decode

The context travels in the job (`JobRequest.traceparent`, in W3C's format), so if another worker
finishes the job after a crash, its spans belong to the same request. An attempt whose worker died
has no span. The lengths of the stages are known when the job has ended, so they are drawn one after
the other, and work that the engine did for several jobs at once appears in each of them.

Tracing is off unless `OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`) names a collector;
the other OTEL_ variables are OpenTelemetry's own. Off or on, a client's trace id is logged. Spans
contain no questions or answers. Attribute names are OpenTelemetry's for generative AI where it has
them.
"""

import logging
import os
import re
import threading
import time
from typing import TYPE_CHECKING, Any

from app.messages import DoneEvent, ErrorEvent, JobRequest, Timings
from app.store.job_leases import Delivery

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_TIMEOUT_S = 3.0
STAGES = ("vision", "compress", "prefill", "decode")

_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

logger = logging.getLogger(__name__)

Attributes = dict[str, Any]


class Tracing:
    """Args:
    provider: None: tracing is off, and nothing here does anything but pass contexts on.
    """

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        self._provider = provider
        self._tracer: Tracer | None = provider.get_tracer("dycoke") if provider else None

    def start_post(self, traceparent: str | None, route: str) -> "PostSpan":
        """Begins a request's span, under the one that its client names, if that is well-formed."""
        parent = traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else None
        if self._tracer is None:
            return PostSpan(None, parent)
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            f"POST {route}",
            context=_context(parent),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": "POST", "http.route": route},
        )
        return PostSpan(span, _traceparent(span))

    def record(
        self, name: str, parent: str | None, *, start_s: float, end_s: float | None = None
    ) -> None:
        """Records what has ended already. Unix seconds; it ended now unless given."""
        if self._tracer is not None:
            context = _context(parent)
            span = self._tracer.start_span(name, context=context, start_time=_ns(start_s))
            span.end(_ns(time.time() if end_s is None else end_s))

    def record_attempt(self, delivery: Delivery, final: DoneEvent | ErrorEvent) -> None:
        """Records what a worker did for a job that has just ended."""
        if self._tracer is None:
            return
        from opentelemetry.trace import SpanKind

        request, ended_at_s = delivery.request, time.time()
        span = self._tracer.start_span(
            f"chat {request.model}",
            context=_context(request.traceparent),
            kind=SpanKind.CONSUMER,
            attributes=_request_attributes(request) | {"dycoke.attempt": delivery.attempt},
            start_time=_ns(delivery.started_at_s),
        )
        if isinstance(final, DoneEvent):
            span.set_attributes(_answer_attributes(final))
            self._record_stages(delivery, final.timings_s, _traceparent(span))
        else:
            _fail(span, final.code)
        span.end(_ns(ended_at_s))

    def _record_stages(self, delivery: Delivery, timings: Timings, attempt: str) -> None:
        queued_at_s, at_s = delivery.queued_at_s, delivery.queued_at_s + timings.queue
        self.record("queue", delivery.request.traceparent, start_s=queued_at_s, end_s=at_s)
        for stage in STAGES:
            ends_at_s = at_s + getattr(timings, stage)
            self.record(stage, attempt, start_s=at_s, end_s=ends_at_s)
            at_s = ends_at_s

    def close(self) -> None:
        """Sends what is left, for at most `FLUSH_TIMEOUT_S`. Blocks."""
        if self._provider is not None:
            # The provider's own time limits do not end a request in progress.
            shutdown = threading.Thread(target=self._provider.shutdown, daemon=True)
            shutdown.start()
            shutdown.join(FLUSH_TIMEOUT_S)


class PostSpan:
    """A request that the API has accepted, until its job has ended.

    `traceparent`: what goes into the job; None where tracing is off.
    """

    def __init__(self, span: "Span | None", traceparent: str | None) -> None:
        self._span = span
        self.traceparent = traceparent

    def describe(self, request: JobRequest) -> None:
        if self._span is not None:
            self._span.set_attributes(_request_attributes(request))

    def end(self, outcome: str, *, is_error: bool) -> None:
        """Ends the span; only the first call counts.

        Args:
            outcome: `done`, or the code that the client got.
        """
        if self._span is not None and self._span.is_recording():
            self._span.set_attribute("dycoke.outcome", outcome)
            if is_error:
                _fail(self._span, outcome)
            self._span.end()


def tracing_from_environment(process: str) -> Tracing:
    """Raises ValueError: a collector is configured and the packages to reach it are missing."""
    configured = [name for name in ENDPOINTS if os.environ.get(name)]
    if not configured:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ValueError(
            f"{configured[0]} is set and OpenTelemetry is missing: install the extra 'tracing', or "
            "unset it"
        ) from None
    name = os.environ.get("OTEL_SERVICE_NAME", f"dycoke-{process}")
    provider = TracerProvider(
        resource=Resource.create({"service.name": name}),
        shutdown_on_exit=False,  # `close` has waited already
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    logger.info("sending traces", extra={"service_name": name})
    return Tracing(provider)


def _request_attributes(request: JobRequest) -> Attributes:
    video = {} if request.video_id is None else {"dycoke.video_id": request.video_id}
    return {
        **video,
        "dycoke.job_id": request.job_id,
        "dycoke.compression.policy": request.compression["policy"],
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "dycoke",
        "gen_ai.request.model": request.model,
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_p": request.top_p,
        "gen_ai.request.seed": request.seed,
    }


def _answer_attributes(done: DoneEvent) -> Attributes:
    cache = done.cache.model_dump() if done.cache is not None else {}
    return {
        **{f"dycoke.cache.{name}": use for name, use in cache.items()},
        "gen_ai.response.id": done.job_id,
        "gen_ai.response.model": done.model,
        "gen_ai.response.finish_reasons": [done.finish_reason],
        "gen_ai.response.time_to_first_chunk": done.timings_s.ttft,
        "gen_ai.usage.input_tokens": done.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": done.usage.completion_tokens,
        "dycoke.visual_tokens.input": done.compression.visual_tokens_in,
        "dycoke.visual_tokens.prefill": done.compression.visual_tokens_prefill,
        "dycoke.visual_tokens.decode": done.compression.visual_tokens_decode,
        "dycoke.kv_bytes": done.memory.kv_bytes,
    }


def _fail(span: "Span", code: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", code)
    span.set_status(StatusCode.ERROR, code)


def _context(traceparent: str | None) -> "Context | None":
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {"traceparent": traceparent} if traceparent else {}
    return TraceContextTextMapPropagator().extract(carrier, context=Context())


def _traceparent(span: "Span") -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _ns(unix_s: float) -> int:
    return int(unix_s * 1e9)
