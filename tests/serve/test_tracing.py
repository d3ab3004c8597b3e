"""OpenTelemetry, as an operator adds it (docs/serving.md); needs opentelemetry-instrumentation-fastapi."""

import pytest

pytest.importorskip("opentelemetry.instrumentation.fastapi")
pytest.importorskip("opentelemetry.sdk")

from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from .common import QUESTION, Asgi, chat_body


@pytest.mark.parametrize("stream", [True, False])
def test_spans_of_requests_hold_neither_questions_nor_answers(engine, stream):
    app, spans, provider = Asgi(engine), InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    FastAPIInstrumentor.instrument_app(app.app, tracer_provider=provider)
    assert app.chat(stream=stream, **chat_body(max_tokens=2)).status_code == 200
    assert app.chat(temperature=-1).status_code == 400
    found = {span.name: span for span in spans.get_finished_spans()}
    assert "POST /v1/chat/completions" in found
    text = " ".join(span.to_json() for span in spans.get_finished_spans())
    assert QUESTION not in text and "rectangle" not in text and '"http.status_code": 400' in text
