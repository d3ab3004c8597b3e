"""Prometheus metrics, under the names that dashboards of such servers have, behind the prefix `dyvte:`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .answer import Answer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class _Load(Collector):
    """Gauges that are read when somebody asks."""

    def __init__(self, load: Callable[[], dict[str, int]], model: str):
        self._load, self._model = load, model

    def collect(self) -> Iterator[Metric]:
        now = self._load()
        values = {
            "num_requests_running": (now["running"] + now["prefilling"], "answers being prefilled or decoded"),
            "num_requests_waiting": (now["waiting"], "answers that wait for a place"),
            "kv_cache_usage_perc": (now["pages_promised"] / now["pages"], "K/V pages held or promised, 1 is all"),
        }
        for name, (value, text) in values.items():
            gauge = GaugeMetricFamily(f"dyvte:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge


class Metrics:
    """One registry for one app. `load`: as `Engine.load`."""

    def __init__(self, model: str, layers: int, load: Callable[[], dict[str, int]]):
        self._registry, self._model, self._layers = CollectorRegistry(), model, layers
        self._registry.register(_Load(load, model))
        seconds = {
            "time_to_first_token_seconds": "from the request's submission to its first token",
            "inter_token_latency_seconds": "between two tokens of an answer",
            "request_time_per_output_token_seconds": "mean time between tokens of an answer",
            "e2e_request_latency_seconds": "from the request's submission to its last token",
            "request_queue_time_seconds": "waiting for a place",
            "request_vision_time_seconds": "in processor, vision tower and projector",
            "request_prefill_time_seconds": "in the prompt's decoder layers, to the first token",
            "request_decode_time_seconds": "from the first to the last token",
        }
        self._seconds = {name: self._histogram(name, text, _SECONDS) for name, text in seconds.items()}
        exits = (-1.0, *map(float, range(layers + 1)))
        self._exit = self._histogram("exit_layer", f"layer that visual tokens left after; {layers}: none", exits)
        counts = {
            "prompt_tokens": "tokens of prompts, visual ones included",
            "generation_tokens": "tokens of answers",
            "visual_rows_computed": "visual rows times layers that prefills computed",
            "visual_rows_saved": "visual rows times layers that exits and pruning saved",
        }
        self._counts = {name: self._counter(name, text) for name, text in counts.items()}
        self._success = self._counter(
            "request_success", "answers by how they ended; abort: the client went away", "finished_reason"
        )
        self._refused = self._counter("request_errors", "requests that ended in an error", "status")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"dyvte:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dyvte:{name}", text, ["model_name", *labels], registry=self._registry)

    def error(self, status: int) -> None:
        self._refused.labels(self._model, str(status)).inc()

    def aborted(self, answers: int) -> None:
        """So many were cancelled before their end."""
        if answers:
            self._success.labels(self._model, "abort").inc(answers)

    def answered(self, answer: Answer, seconds: float) -> None:
        """An answer is complete; `seconds` since its submission."""
        stats = answer.stats
        assert stats is not None
        decode = max(seconds - stats.ttft_s, 0.0)
        times = {
            "time_to_first_token_seconds": stats.ttft_s,
            "e2e_request_latency_seconds": seconds,
            "request_queue_time_seconds": max(stats.queued_s, 0.0),
            "request_vision_time_seconds": stats.vision_s,
            "request_prefill_time_seconds": max(stats.ttft_s - stats.queued_s - stats.vision_s, 0.0),
            "request_decode_time_seconds": decode,
        }
        if stats.new_tokens > 1:
            times["request_time_per_output_token_seconds"] = decode / (stats.new_tokens - 1)
        for name, value in times.items():
            self._seconds[name].labels(self._model).observe(value)
        between = self._seconds["inter_token_latency_seconds"].labels(self._model)
        for before, after in pairwise(answer.times):
            between.observe(after - before)
        if stats.visual_tokens:
            self._exit.labels(self._model).observe(self._layers if stats.exit_layer is None else stats.exit_layer)
        computed = sum(max(rows - stats.text_tokens, 0) for rows in stats.tokens_per_layer)
        saved = stats.visual_tokens * len(stats.tokens_per_layer) - computed
        counted = (stats.visual_tokens + stats.text_tokens, stats.new_tokens, computed, max(saved, 0))
        for counter, value in zip(self._counts.values(), counted, strict=True):
            counter.labels(self._model).inc(value)
        self._success.labels(self._model, answer.finish_reason).inc()

    def text(self) -> bytes:
        """Prometheus' exposition format."""
        return generate_latest(self._registry)
