"""What a run of requests amounts to, by the field's definitions (those of vLLM's benchmark and of DeepSpeed-FastGen's).

TTFT      from sending to the first piece of text
ITL       each gap between two pieces, all requests together
TPOT      (last piece - first piece) / (tokens - 1), one for each request of two tokens and more
E2EL      from sending to the end
goodput   requests a second that meet every limit given, after DistServe
SLA       FastGen's: the first piece within prompt tokens / 512 seconds, and the moving average of the time between
          tokens (span 16) never above 1 / rate
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from load import Seen

PERCENTILES = (50, 90, 95, 99)
LIMITS = ("ttft", "tpot", "e2el")
SLA_PROMPT = 512  # prompt tokens a second
SLA_SPAN = 16


def percentile(values: Sequence[float], share: float) -> float:
    """Between the two nearest values, as numpy's default is."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ttft(seen: Seen) -> float:
    return seen.pieces[0] - seen.sent


def tpot(seen: Seen) -> float | None:
    if seen.tokens_out < 2:
        return None
    return (seen.pieces[-1] - seen.pieces[0]) / (seen.tokens_out - 1)


def gaps(seen: Seen) -> list[float]:
    return [b - a for a, b in zip(seen.pieces, seen.pieces[1:], strict=False)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, and percentiles, in milliseconds."""
    if not values:
        return {}
    found = {"mean": 1e3 * statistics.fmean(values)}
    return found | {f"p{share}": 1e3 * percentile(values, share) for share in PERCENTILES}


def meets(seen: Seen, limits: Mapping[str, float]) -> bool:
    """Whether an answered request keeps every limit (milliseconds of ttft, tpot, e2el)."""
    took = {"ttft": ttft(seen), "tpot": tpot(seen) or 0.0, "e2el": seen.ended - seen.sent}
    return all(1e3 * took[name] <= most for name, most in limits.items())


def meets_sla(seen: Seen, rate: float) -> bool:
    """FastGen's agreement at `rate` tokens a second."""
    if ttft(seen) > max(seen.tokens_in, 1) / SLA_PROMPT:
        return False
    share = 2 / (SLA_SPAN + 1)
    average: float | None = None
    for gap in gaps(seen):
        average = gap if average is None else share * gap + (1 - share) * average
        if average > 1 / rate:
            return False
    return True


def figures(seen: Sequence[Seen], limits: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Rates and latencies of a run; requests that failed count in `failed` alone."""
    good = [each for each in seen if each.error is None]
    failed = [each.error for each in seen if each.error is not None]
    began = min((each.sent for each in seen), default=0.0)
    seconds = max((each.ended for each in seen), default=0.0) - began
    tokens_in, tokens_out = sum(each.tokens_in for each in good), sum(each.tokens_out for each in good)
    per = 1 / seconds if seconds > 0 else 0.0
    found: dict[str, Any] = {
        "completed": len(good),
        "failed": len(failed),
        "error": failed[0] if failed else None,
        "seconds": seconds,
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "requests_s": len(good) * per,
        "output_tokens_s": tokens_out * per,
        "total_tokens_s": (tokens_in + tokens_out) * per,
        "peak_tokens_s": peak(good),
        "ttft_ms": spread([ttft(each) for each in good]),
        "tpot_ms": spread([one for each in good if (one := tpot(each)) is not None]),
        "itl_ms": spread([gap for each in good for gap in gaps(each)]),
        "e2el_ms": spread([each.ended - each.sent for each in good]),
        "lag_ms": spread([each.sent - each.due for each in seen]),
    }
    if limits:
        found |= {"limits_ms": dict(limits), "goodput_s": sum(meets(each, limits) for each in good) * per}
    return found


def peak(seen: Sequence[Seen]) -> float:
    """Pieces in the fullest second."""
    times = sorted(time for each in seen for time in each.pieces)
    best = first = 0
    for last, time in enumerate(times):
        while time - times[first] >= 1.0:
            first += 1
        best = max(best, last - first + 1)
    return float(best)


def under_agreement(seen: Sequence[Seen], rates: Sequence[float]) -> dict[str, Any]:
    """A point of FastGen's curves: requests a second, their latency, and how many of them keep each agreement."""
    found = figures(seen)
    per = 1 / found["seconds"] if found["seconds"] else 0.0
    good = [each for each in seen if each.error is None]
    kept = {f"{rate:g}": sum(meets_sla(each, rate) for each in good) * per for rate in rates}
    return {
        "requests_s": found["requests_s"],
        "latency_s": found["e2el_ms"].get("mean", 0.0) / 1e3,
        "itl_p95_ms": found["itl_ms"].get("p95"),
        "effective_s": kept,
        "failed": found["failed"],
    }
