"""/metrics: the names that dashboards know, and values that are the answers' own figures."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dyvte_engine.serve.options import ServeOptions

from .common import Asgi, chat_body

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def samples(app) -> dict:
    """Name and labels but the model's -> value."""
    found = {}
    for family in text_string_to_metric_families(app("GET", "/metrics").text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            assert sample.labels["model_name"] == "nano"
            found[(sample.name, *labels.values())] = sample.value
    return found


@pytest.fixture
def fresh(engine):
    return Asgi(engine, ServeOptions(policies={"keep-all": "keep-all"}))


def test_counts_and_times_of_answers(fresh, engine):
    usages = [fresh.chat().json()["usage"] for _ in range(2)] + [fresh.chat(policy="keep-all").json()["usage"]]
    fresh.events(**chat_body(max_tokens=2))
    fresh.chat(temperature=-1)
    got = samples(fresh)
    tokens = sum(u["completion_tokens"] for u in usages) + 2
    assert got["dyvte:generation_tokens_total",] == tokens
    assert got["dyvte:prompt_tokens_total",] == 4 * usages[0]["prompt_tokens"]
    assert got["dyvte:request_success_total", "stop"] == 3
    assert got["dyvte:request_success_total", "length"] == 1
    assert got["dyvte:request_errors_total", "400"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert got[f"dyvte:{name}_seconds_count",] == 4
    assert got["dyvte:inter_token_latency_seconds_count",] == tokens - 4
    assert got["dyvte:request_time_per_output_token_seconds_count",] == 4
    parts = sum(got[f"dyvte:request_{p}_time_seconds_sum",] for p in ("queue", "vision", "prefill", "decode"))
    assert parts == pytest.approx(got["dyvte:e2e_request_latency_seconds_sum",], rel=0.05)


def test_exits_and_visual_rows(fresh, engine):
    exit_layer = fresh.chat().json()["usage"]["exit_layer"]
    fresh.chat(policy="keep-all")
    got, layers = samples(fresh), engine.model.shape.num_layers
    assert got["dyvte:exit_layer_bucket", str(float(exit_layer))] == 1
    assert got["dyvte:exit_layer_bucket", str(float(exit_layer - 1))] == 0
    assert got["dyvte:exit_layer_bucket", str(float(layers))] == 2
    assert got["dyvte:visual_rows_saved_total",] == 144 * (layers - exit_layer - 1)
    assert got["dyvte:visual_rows_computed_total",] == 144 * (layers + exit_layer + 1)


def test_gauges_are_the_engine_s(fresh, engine):
    from dyvte_engine import Request

    handle = engine.submit(Request("what is", chat=False, options={"max_new_tokens": 1500, "eos_token_id": []}))
    next(iter(handle))
    got = samples(fresh)
    assert got["dyvte:num_requests_running",] == 1 and got["dyvte:num_requests_waiting",] == 0
    assert 0 < got["dyvte:kv_cache_usage_perc",] <= 1
    handle.cancel()
    assert samples(fresh)["dyvte:kv_cache_usage_perc",] == 0


def test_the_dashboard_asks_for_metrics_that_are_there(fresh):
    fresh.chat()
    fresh.chat(model="other")
    there = {name for name, *_ in samples(fresh)}
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for expression in asked:
        named = re.findall(r"dyvte:\w+", expression)
        assert named and set(named) <= there, expression
    assert {name for name in there if not name.endswith(("_created", "_count", "_sum"))} <= {
        name for expression in asked for name in re.findall(r"dyvte:\w+", expression)
    }
