"""Spans for OpenTelemetry; imported only where tracing is on.

Where they go and how many are kept is said by OpenTelemetry's own variables, such as
OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_TRACES_SAMPLER.
"""

from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from adapter.telemetry.tracing import TRACEPARENT, Span, Tracer
from adapter.types import Event

PROPAGATOR = TraceContextTextMapPropagator()


class OtelSpan(Span):
    """A span of OpenTelemetry; denoising steps are its events."""

    def __init__(self, span: trace.Span) -> None:
        carrier: dict[str, str] = {}
        PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
        super().__init__(carrier.get("traceparent"))
        self._span = span

    def set(self, attributes: Mapping[str, str | int]) -> None:
        """Say more about it."""
        for name, value in attributes.items():
            self._span.set_attribute(name, value)

    def step(self, event: Event) -> None:
        """The engine has sent an event."""
        attributes: dict[str, str | int] = {"final_characters": len(event.text)}
        if event.usage is not None:
            attributes["steps"] = event.usage.steps
            attributes["forward_passes"] = event.usage.forward_passes
        if event.finish_reason:
            attributes["finish_reason"] = event.finish_reason
        self._span.add_event("denoising", attributes)

    def fail(self, error: BaseException) -> None:
        """It went wrong."""
        status = trace.Status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}")
        self._span.set_status(status)

    def end(self) -> None:
        """It is over."""
        self._span.end()


class OtelTracer(Tracer):
    """Makes spans of the given provider."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("dllm-adapter")

    def call(self, name: str, headers: Mapping[str, str]) -> Span:
        """Begin the span of a call."""
        context = PROPAGATOR.extract({"traceparent": headers.get("traceparent", "")})
        return OtelSpan(self._tracer.start_span(name, context, kind=trace.SpanKind.SERVER))

    def request(self, request_id: str) -> Span:
        """Begin the span of a request at Triton."""
        context = PROPAGATOR.extract({"traceparent": TRACEPARENT.get() or ""})
        span = self._tracer.start_span("denoise", context, kind=trace.SpanKind.CLIENT)
        span.set_attribute("triton.request_id", request_id)
        return OtelSpan(span)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def exporting_tracer() -> OtelTracer:
    """A tracer that sends its spans to a collector, over OTLP and HTTP."""
    provider = TracerProvider(resource=Resource.create({"service.name": "dllm-adapter"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtelTracer(provider)
