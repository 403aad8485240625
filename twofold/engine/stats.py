"""EngineStats: what an engine is doing and has done, as plain numbers that cross a process."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Gauges of this moment and counters since the engine was made; times in seconds, lengths in tokens.

    `waste` is the share of allocated cache slots that held no token, over all steps. `finished` counts ends by state.
    `prompt_tokens` counts prompts whose first token came, cached tokens included. `adapters_running` and
    `adapters_waiting` are names of adapters that requests have, `max_adapters` at once; `adapter_reads` counts how
    often one came into memory. `drafts` counts the guesses sent, in all `draft_tokens` long, of which
    `accepted_tokens` were right, `accepted_per_pos` by their place in the guess. `external_hits` of `external_queries`
    prompt tokens that the cache had not were found in its `tiers`, which tell by name what they found (in tokens,
    resumed requests' too), stored, loaded and hold (in bytes), and their errors.
    """

    running: int = 0
    waiting: int = 0
    blocks: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    waste: float = 0.0
    step_tokens: int = 0
    step_seconds: float = 0.0

    steps: int = 0
    busy_seconds: float = 0.0
    computed_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    external_queries: int = 0
    external_hits: int = 0
    tiers: dict[str, dict[str, int]] = field(default_factory=dict)
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_pos: tuple[int, ...] = ()

    adapters_running: tuple[str, ...] = ()
    adapters_waiting: tuple[str, ...] = ()
    max_adapters: int = 0
    adapter_bytes: int = 0
    adapter_reads: int = 0

    version: int = 0
    asleep: bool = False

    @property
    def acceptance(self) -> float:
        """The share of guessed tokens that were right, 0 to 1."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    @property
    def kv_usage(self) -> float:
        """The share of blocks that requests hold, 0 to 1."""
        return self.blocks_used / self.blocks if self.blocks else 0.0
