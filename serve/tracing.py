"""OpenTelemetry traces from the HTTP request to the engine, where the environment names a collector. Off otherwise.

The standard variables decide: OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT) turns it on, OTEL_TRACES_SAMPLER
says how many requests are traced, OTEL_SDK_DISABLED=true turns it off. While it is off nothing is imported. Neither
prompts, answers nor keys are in a span. Knows no HTTP and no Ray.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from serve.engines.engine import GenerationChunk, GenerationRequest

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_TRACEPARENT = "traceparent"

logger = logging.getLogger(__name__)

traceparent: ContextVar[str] = ContextVar("traceparent", default="")
"""The W3C trace context of the span of the present HTTP request; empty while tracing is off."""


def continued(requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
    """The same requests, whose engines continue the trace of the present HTTP request."""
    if parent := traceparent.get():
        return [replace(request, traceparent=parent) for request in requests]
    return requests


class Tracing:
    """The spans of one process, sent by a thread of their own. A collector that is away costs spans, not requests."""

    def __init__(self, service: str) -> None:
        """`service` is the name of the process, unless OTEL_SERVICE_NAME says otherwise."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        service = os.environ.get("OTEL_SERVICE_NAME") or service
        # A provider of its own: the global one of this process may be Ray's.
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("ft_service", version("ft-service"))
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def from_environment(cls, service: str) -> "Tracing | None":
        """None unless the environment names a collector. Spans go over HTTP: a missing package is a warning."""
        is_disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        if is_disabled or not any(os.environ.get(name) for name in _ENDPOINTS):
            return None
        if find_spec("opentelemetry.exporter.otlp.proto.http") is None:
            logger.warning("no traces: pip install -c constraints.txt -e '.[otel]' in the environment of the server")
            return None
        return cls(service)

    def begin_request(self, headers: Mapping[str, str], request_id: str, method: str) -> "Span":
        """The span of an HTTP request. Continues the trace of its client, if `headers` have one."""
        from opentelemetry.trace import SpanKind

        attributes = {"http.request.method": method, "ft.request.id": request_id}
        return self._tracer.start_span(
            method, context=self._propagator.extract(headers), kind=SpanKind.SERVER, attributes=attributes
        )

    def mark_failed(self, span: "Span") -> None:
        from opentelemetry.trace import StatusCode

        span.set_status(StatusCode.ERROR)

    def context_of(self, span: "Span") -> str:
        """The W3C trace context that continues `span`."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context=set_span_in_context(span))
        return carrier.get(_TRACEPARENT, "")

    def begin_answer(self, request: GenerationRequest, base: str) -> "AnswerSpan":
        """The span of one answer of an engine."""
        attributes: dict[str, Any] = {
            "ft.request.id": request.id,
            "ft.base": base,
            "ft.adapter": request.adapter.id if request.adapter else "",
            "gen_ai.usage.input_tokens": len(request.prompt_ids),
        }
        context = self._propagator.extract({_TRACEPARENT: request.traceparent})
        return AnswerSpan(self, self._tracer.start_span("engine", context=context, attributes=attributes))

    def add_phase(self, parent: "Span", name: str, began: int, ended: int) -> None:
        """A child of `parent` that has ended. Times are in nanoseconds since the epoch."""
        from opentelemetry.trace import set_span_in_context

        child = self._tracer.start_span(name, context=set_span_in_context(parent), start_time=began)
        child.end(max(began, ended))

    def close(self) -> None:
        """Send what is left, for some seconds at most."""
        self._provider.shutdown()


@dataclass
class AnswerSpan:
    """An engine's work on one answer: `queue`, `prefill` and `decode` are its children."""

    tracing: Tracing
    span: "Span"
    _began: int = 0
    _first: int = 0
    _queued_seconds: float | None = None

    def __post_init__(self) -> None:
        self._began = time.time_ns()

    def add(self, chunk: GenerationChunk) -> None:
        """Call it with each chunk as it comes."""
        if not self._first:
            self._first = time.time_ns()
            self._queued_seconds = chunk.queued_seconds

    def end(self, outcome: str, tokens: int, cached_tokens: int) -> None:
        """`outcome` is `ok`, `cancelled`, or the kind of an error."""
        now = time.time_ns()
        prefill = self._began
        if self._queued_seconds is not None:
            prefill += min(round(self._queued_seconds * 1e9), self._first - self._began)
            self.tracing.add_phase(self.span, "queue", self._began, prefill)
        if self._first:
            self.tracing.add_phase(self.span, "prefill", prefill, self._first)
            self.tracing.add_phase(self.span, "decode", self._first, now)
        self.span.set_attribute("gen_ai.usage.output_tokens", tokens)
        self.span.set_attribute("ft.cached_tokens", cached_tokens)
        self.span.set_attribute("ft.outcome", outcome)
        if outcome not in ("ok", "cancelled"):
            self.tracing.mark_failed(self.span)
        self.span.end(now)
