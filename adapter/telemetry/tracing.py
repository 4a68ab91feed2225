"""Traces: a span for each call, and one for each request at Triton with its denoising steps.

Until `configure_tracing` turns recording on, OpenTelemetry's API makes spans that record nothing.
Either kind passes the caller's trace context on to Triton.
"""

import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from adapter.errors import SettingsError
from adapter.types import Event

#: W3C trace context of this task's span; sent to Triton as a header.
TRACEPARENT: ContextVar[str | None] = ContextVar("traceparent", default=None)

NAME = "dllm-adapter"
#: A worker that stops waits no longer than this for the collector.
FLUSH_SECONDS = 2.0
PROPAGATOR = TraceContextTextMapPropagator()
tracer = trace.get_tracer(NAME)


def configure_tracing() -> Callable[[], None]:
    """Export spans over OTLP; returns the function that sends the last of them, in some seconds.

    OpenTelemetry's own variables set the rest, such as OTEL_EXPORTER_OTLP_ENDPOINT and
    OTEL_TRACES_SAMPLER. Raises `SettingsError` where the extra `otel` is missing.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        msg = f"DLLM_TRACING: needs the extra otel, pip install 'dllm-serve[otel]': {error}"
        raise SettingsError(msg) from error
    # Left to itself, it would also wait for a silent collector when Python exits.
    resource = Resource.create({"service.name": NAME})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)

    def flush() -> None:
        sending = threading.Thread(target=provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(FLUSH_SECONDS)

    return flush


def call_span(name: str, headers: Mapping[str, str]) -> Span:
    """Start the span of an HTTP call, in the client's trace if it sent one."""
    return _start(name, SpanKind.SERVER, headers.get("traceparent"))


def request_span(request_id: str) -> Span:
    """Start the span of a request at Triton, below the span of this task."""
    span = _start("denoise", SpanKind.CLIENT, TRACEPARENT.get())
    span.set_attribute("triton.request_id", request_id)
    return span


def add_step(span: Span, event: Event) -> None:
    """Record an event of the engine as a denoising step."""
    attributes: dict[str, str | int] = {"final_characters": len(event.text)}
    if event.usage is not None:
        attributes["steps"] = event.usage.steps
        attributes["forward_passes"] = event.usage.forward_passes
    if event.finish_reason:
        attributes["finish_reason"] = event.finish_reason
    span.add_event("denoising", attributes)


def set_failed(span: Span, error: BaseException) -> None:
    """Make the error the span's status."""
    description = f"{type(error).__name__}: {error}"
    span.set_status(trace.Status(trace.StatusCode.ERROR, description))


def _start(name: str, kind: SpanKind, parent: str | None) -> Span:
    """Start a span; what this task does from here on belongs to it."""
    context = PROPAGATOR.extract({"traceparent": parent or ""})
    span = tracer.start_span(name, context, kind=kind)
    carrier: dict[str, str] = {}
    PROPAGATOR.inject(carrier, trace.set_span_in_context(span, context))
    TRACEPARENT.set(carrier.get("traceparent"))
    return span
