"""/metrics for Prometheus: vLLM's words with our prefix, and what only a trimmed model has."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trimserve.engine.events import Usage
from trimserve.engine.metrics import EngineMetrics
from trimserve.serving.models import Models

PREFIX = "trimserve:"
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
# Name -> what it is; each is a field of `EngineMetrics` under the second name.
_GAUGES = (
    ("num_requests_running", "running", "requests at work"),
    ("num_requests_waiting", "waiting", "requests in the queue"),
    ("num_tokens_waiting", "waiting_tokens", "prompt tokens of the requests in the queue"),
    ("kv_cache_bytes", "kv_bytes", "bytes held for keys and values"),
    ("strict", "strict", "whether an answer is the same under load as alone (1 or 0)"),
)
_COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "tokens of prompts"),
    ("prompt_tokens_cached", "cached_tokens", "tokens of prompts whose keys and values were there"),
    ("generation_tokens", "generation_tokens", "tokens generated"),
    ("cold_tokens", "cold_tokens", "tokens without a compact row, of prompts and answers"),
    ("drafted_tokens", "drafted", "tokens drafted by the compact head"),
    ("accepted_tokens", "accepted", "drafts that the full model's head confirmed"),
    ("checked_steps", "checked_steps", "steps that exact mode checked"),
    ("certified_steps", "certified_steps", "of these proven without the cold rows"),
    ("cold_bytes_read", "cold_bytes", "bytes of the cold files read by checks"),
    ("decode_steps", "decode_steps", "runs of the graph for decoding"),
    ("decode_rows", "decode_rows", "sequences in these runs, added up"),
    ("admission_rejections", "rejected", "requests that the queue had no room for"),
)


class Metrics:
    """What a server counts of its requests, and where its engines' counts are read."""

    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(models))
        self._requests = Counter(
            f"{PREFIX}http_requests",
            "answers by route and status",
            ("route", "status"),
            registry=self._registry,
        )
        self._first_token, self._queue, self._decode, self._whole, self._between = (
            Histogram(PREFIX + name, text, ("model_name",), buckets=_SECONDS, registry=self._registry)
            for name, text in (
                ("time_to_first_token_seconds", "from the request to its first token"),
                ("request_queue_time_seconds", "from the request to its first step"),
                ("request_decode_time_seconds", "from the first token to the last"),
                ("e2e_request_latency_seconds", "from the request to its last token"),
                ("inter_token_latency_seconds", "mean time between two tokens of an answer"),
            )
        )

    def count_answer(self, route: str, status: int) -> None:
        """Count an HTTP answer."""
        self._requests.labels(route, str(status)).inc()

    def count_generation(self, model: str, usage: Usage) -> None:
        """Count a finished sequence."""
        first = usage.queue_seconds + usage.first_token_seconds
        self._queue.labels(model).observe(usage.queue_seconds)
        self._first_token.labels(model).observe(first)
        self._decode.labels(model).observe(usage.decode_seconds)
        self._whole.labels(model).observe(first + usage.decode_seconds)
        if usage.completion_tokens > 1:
            self._between.labels(model).observe(usage.decode_seconds / (usage.completion_tokens - 1))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        text: bytes = generate_latest(self._registry)
        return text


class _Engines(Collector):
    """The engines' own counts, read when they are asked for."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are ours alone."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """A family a count, with a sample a model."""
        found = {name: served.engine.metrics() for name, served in self._models.served.items()}
        for name, field, text in _GAUGES:
            yield _filled(GaugeMetricFamily(PREFIX + name, text, labels=["model_name"]), field, found)
        for name, field, text in _COUNTERS:
            yield _filled(CounterMetricFamily(PREFIX + name, text, labels=["model_name"]), field, found)
        usage = GaugeMetricFamily(
            f"{PREFIX}kv_cache_usage_perc",
            "share of the memory for keys and values in use",
            labels=["model_name"],
        )
        reasons = CounterMetricFamily(
            f"{PREFIX}request_success", "finished requests", labels=["model_name", "finished_reason"]
        )
        for model, counts in found.items():
            usage.add_metric([model], counts.kv_used_bytes / max(counts.kv_limit_bytes, 1))
            for reason, count in (counts.finished or {}).items():
                reasons.add_metric([model, reason], count)
        yield from (usage, reasons)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, field: str, found: dict[str, EngineMetrics]
) -> Metric:
    for model, counts in found.items():
        family.add_metric([model], float(getattr(counts, field)))
    return family
