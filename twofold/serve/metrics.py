"""What Prometheus reads, under vLLM's names where vLLM has one, so that its dashboards carry over.

Labels are the model's name and `engine`, and the reason of an end: nothing a client sends, so that their number is
bounded.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.facts import REASONS
from ..engine.stats import EngineStats
from .choice import Choice
from .client import Accepted, EngineClient, add
from .config import ServeConfig

FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
WHOLE = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
LENGTH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
RECENT = 4096  # latencies that are kept between two looks of history.py
SAMPLES = (1, 2, 5, 10, 20)
ENDS = ("stop", "length", "abort", "error")
WAITS = (*REASONS, "restart", "compile")
LABELS = ("model_name", "engine")


class Metrics:
    """Counters and histograms of the front, and the engine's gauges read at the moment they are asked for."""

    def __init__(self, config: ServeConfig, client: EngineClient) -> None:
        self.registry = CollectorRegistry()
        self.labels = (config.name, "0")
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.sequences = 0
        self.rejections = 0
        self.first_tokens: deque[float] = deque(maxlen=RECENT)
        self.between_tokens: deque[float] = deque(maxlen=RECENT)
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._rejected = self._counter("admission_rejections", "Requests answered 429.")
        success = Counter(
            "vllm:request_success", "Sequences by how they ended.", (*LABELS, "finished_reason"), registry=self.registry
        )
        waits = Counter(
            "twofold:request_wait_seconds", "Why requests waited.", (*LABELS, "reason"), registry=self.registry
        )
        self._waits = {reason: waits.labels(*self.labels, reason) for reason in WAITS}
        self._ends = {end: success.labels(*self.labels, end) for end in ENDS}
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN)
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens.", BETWEEN_TOKENS)
        self._per_token = self._histogram("request_time_per_output_token_seconds", "Its mean.", BETWEEN_TOKENS)
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", WHOLE)
        self._queue = self._histogram("request_queue_time_seconds", "In the engine's queue.", WHOLE)
        self._prefill = self._histogram("request_prefill_time_seconds", "From the queue to the first token.", WHOLE)
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last.", WHOLE)
        self._inference = self._histogram("request_inference_time_seconds", "From the queue to the end.", WHOLE)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens.", LENGTH)
        self._said_length = self._histogram("request_generation_tokens", "Generated tokens.", LENGTH)
        self._samples = self._histogram("request_params_n", "Samples asked for.", SAMPLES)
        self._most = self._histogram("request_params_max_tokens", "Tokens allowed.", LENGTH)
        self._left_queue: dict[str, float] = {}
        self.registry.register(_EngineGauges(client, self.labels))
        client.on_started = self._started

    # -- what happens -----------------------------------------------------------------------------------------------

    def accepted(self, choices: Sequence[Choice]) -> None:
        for choice in choices:
            params = choice.request.params
            if choice.request.sample == 0:
                self.prompt_tokens += len(choice.request.prompt_ids)
                self._prompt.inc(len(choice.request.prompt_ids))
                self._prompt_length.observe(len(choice.request.prompt_ids))
                self._samples.observe(params.n)
                if params.max_tokens is not None:
                    self._most.observe(params.max_tokens)

    def rejected(self) -> None:
        self.rejections += 1
        self._rejected.inc()

    def tokens(self, choice: Choice, count: int, arrived: float) -> None:
        """`count` tokens came at once for one sequence; the time since the last is spread over them."""
        now = time.monotonic()
        self.generation_tokens += count
        self._generated.inc(count)
        if choice.first_token is None:
            choice.first_token = now
            self._first.observe(now - arrived)
            self.first_tokens.append(now - arrived)
        elif choice.last_token is not None:
            gap = (now - choice.last_token) / count
            for _ in range(count):
                self._between.observe(gap)
                self.between_tokens.append(gap)
        choice.last_token = now

    def finished(self, choice: Choice, arrived: float) -> None:
        now = time.monotonic()
        self.sequences += 1
        self._ends["stop" if choice.finish == "stop" else "length"].inc()
        self._whole.observe(now - arrived)
        self._said_length.observe(choice.tokens)
        first, began = choice.first_token, self._left_queue.get(choice.request.id)
        if first is not None:
            self._decode.observe(now - first)
            if choice.tokens > 1:
                self._per_token.observe((now - first) / (choice.tokens - 1))
            if began is not None:
                self._prefill.observe(max(first - began, 0.0))
        if began is not None:
            self._inference.observe(now - began)

    def waited(self, waits: Mapping[str, float]) -> None:
        """A call is over that waited so many seconds by reason."""
        for reason, seconds in waits.items():
            self._waits[reason].inc(seconds)

    def texts(self, lengths: Sequence[int]) -> None:
        """Texts of so many tokens were accepted to be read whole."""
        for length in lengths:
            self.prompt_tokens += length
            self._prompt.inc(length)
            self._prompt_length.observe(length)

    def texts_ended(self, names: Sequence[str], end: str, arrived: float) -> None:
        """They were read ("stop"), or came to another end."""
        self._ends[end].inc(len(names))
        for name in names:
            self._left_queue.pop(name, None)
            if end == "stop":
                self._whole.observe(time.monotonic() - arrived)

    def ended(self, choices: Sequence[Choice], failed: bool) -> None:
        """A call is over; sequences without an end of their own were dropped by the client or failed."""
        for choice in choices:
            self._left_queue.pop(choice.request.id, None)
            if choice.finish is None:
                self._ends["error" if failed else "abort"].inc()

    def _started(self, accepted: Accepted, seconds: float) -> None:
        name = accepted.request.id
        if name not in self._left_queue:
            self._queue.observe(seconds)
            self._left_queue[name] = accepted.fate.started or time.monotonic()

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, LABELS, registry=self.registry).labels(*self.labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"vllm:{name}", text, LABELS, registry=self.registry, buckets=buckets)
        return made.labels(*self.labels)


class _EngineGauges(Collector):
    """Reads the client at scrape time. Counters of processes that died are added to those of the one that lives."""

    def __init__(self, client: EngineClient, labels: tuple[str, str]) -> None:
        self._client = client
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        client, now, past = self._client, self._client.stats, self._client.past
        total = now.blocks or (client.info.blocks if client.info else 0)
        unsent = sum(not accepted.sent for accepted in client.live.values())
        gauges = {
            "vllm:num_requests_running": ("Sequences in the batch.", now.running),
            "vllm:num_requests_waiting": ("Sequences in the queue.", now.waiting + unsent),
            "vllm:kv_cache_usage_perc": ("Share of the cache in use, 1 is full.", now.blocks_used / max(total, 1)),
            "twofold:kv_blocks_used": ("Blocks in use.", now.blocks_used),
            "twofold:kv_blocks_cached": ("Free blocks that still hold a known prefix.", now.blocks_cached),
            "twofold:adapter_bytes": ("Bytes of adapters in memory.", now.adapter_bytes),
            "twofold:ready": ("1 when the model answers.", float(client.ready)),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        both = add(past, now)
        counters = {
            "vllm:prefix_cache_queries": ("Prompt tokens looked up.", both.prefix_queries),
            "vllm:prefix_cache_hits": ("Prompt tokens found.", both.prefix_hits),
            "vllm:external_prefix_cache_queries": ("Prompt tokens looked up behind the cache.", both.external_queries),
            "vllm:external_prefix_cache_hits": ("Prompt tokens found there.", both.external_hits),
            "vllm:num_preemptions": ("Sequences put back.", both.preemptions),
            "vllm:spec_decode_num_drafts": ("Times that tokens of a sequence were guessed at.", both.drafts),
            "vllm:spec_decode_num_draft_tokens": ("Tokens guessed at.", both.draft_tokens),
            "vllm:spec_decode_num_accepted_tokens": ("Tokens guessed rightly.", both.accepted_tokens),
            "twofold:engine_restarts": ("Times the model's process was started again.", client.restarts),
            "twofold:engine_steps": ("Steps of the engine.", both.steps),
            "twofold:adapter_reads": ("Adapters that came into memory.", both.adapter_reads),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        place = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Tokens guessed rightly, by place in the guess.",
            labels=(*LABELS, "position"),
        )
        for position, count in enumerate(both.accepted_per_pos):
            place.add_metric((*self._labels, str(position)), count)
        yield place
        yield from self._tiers(both, now)
        if now.max_adapters:
            lists = ",".join(now.adapters_running), ",".join(now.adapters_waiting), str(now.max_adapters)
            names = ("running_lora_adapters", "waiting_lora_adapters", "max_lora")
            lora = GaugeMetricFamily("vllm:lora_requests_info", "Adapters that requests have, and when.", labels=names)
            lora.add_metric(lists, time.time())
            yield lora
        if client.info is not None:
            config = GaugeMetricFamily(
                "vllm:cache_config_info", "The cache.", labels=(*LABELS, "block_size", "num_gpu_blocks")
            )
            config.add_metric((*self._labels, str(client.info.block_size), str(client.info.blocks)), 1.0)
            yield config

    def _tiers(self, both: EngineStats, now: EngineStats) -> Iterator[Metric]:
        """What the tiers behind the cache did, by tier."""
        counters = {
            "hits": "Tokens that came back, resumed requests' too.",
            "stored_bytes": "Bytes kept.",
            "loaded_bytes": "Bytes that came back.",
            "errors": "Blocks that could not be written or read, or were not what they should be.",
        }
        for key, text in counters.items():
            counter = CounterMetricFamily(f"twofold:kv_tier_{key}", text, labels=(*LABELS, "tier"))
            for name, counts in both.tiers.items():
                counter.add_metric((*self._labels, name), counts[key])
            yield counter
        held = GaugeMetricFamily("twofold:kv_tier_held_bytes", "Bytes held.", labels=(*LABELS, "tier"))
        for name, counts in now.tiers.items():
            held.add_metric((*self._labels, name), counts["held_bytes"])
        yield held


class _Together:
    """Several registries as one: each name once, with the samples of all."""

    def __init__(self, registries: Sequence[CollectorRegistry]) -> None:
        self._registries = registries

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for registry in self._registries:
            for metric in registry.collect():
                if metric.name in found:
                    found[metric.name].samples.extend(metric.samples)
                else:
                    found[metric.name] = metric
        yield from found.values()


def render(metrics: Sequence[Metrics]) -> bytes:
    """The text that Prometheus scrapes, of several models; labels tell them apart."""
    return generate_latest(_Together([each.registry for each in metrics]))
