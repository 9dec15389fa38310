"""A span for each HTTP request, where tracing is on."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.tracing import Tracing, traceparent


class TraceRequests:
    """ASGI middleware, within `AccessLog`. Adds the trace's id to the request's line in the log."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        span = self._tracing.begin_request(Headers(scope=scope), scope["state"]["request_id"], scope["method"])
        scope["state"]["log"]["trace"] = f"{span.get_span_context().trace_id:032x}"
        token = traceparent.set(self._tracing.context_of(span))

        async def send_seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    self._tracing.mark_failed(span)
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)
            self._tracing.mark_failed(span)
            raise
        finally:
            traceparent.reset(token)
            if route := getattr(scope.get("route"), "path", ""):  # the pattern: a path may hold ids
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.route", route)
            span.end()
