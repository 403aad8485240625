"""The requests of OpenAI's API with the fields that vLLM's users add: checked, and turned into SamplingParams.

A field nobody knows, a bad value, and a field that OpenAI has but this version does not do: each is an answer 400 that
names the field's path. Nothing is ignored silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import msgspec

from ..core import RequestError
from ..engine.sampling import EarlyStopping, LogprobsMode, SamplingParams
from .bodies import NotDone, check_done
from .forms import Forms
from .messages import Message
from .tools import Named, Tool, Tools, asked

MAX_TEXT = 256  # characters of an id, a salt or a name

# What OpenAI or vLLM has and this version has not.
NOT_DONE: NotDone = {
    "functions": (([],), "send tools"),
    "function_call": (("none", "auto"), "send tool_choice"),
    "modalities": ((["text"],), "only text is done"),
    "audio": ((), "only text is done"),
    "prediction": ((), ""),
    "web_search_options": ((), ""),
    "verbosity": (("medium",), ""),
    "store": ((False,), "nothing is kept"),
    "service_tier": (("auto", "default"), ""),
    "suffix": (("",), "put what follows into the prompt"),
    "documents": (([],), "put the documents into a message"),
    "chat_template": ((), "the server's operator chooses the template"),
    "mm_processor_kwargs": (({},), "only text is done"),
    "kv_transfer_params": (({},), ""),
}


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Ranked(Protocol):
    """What asks for the best of several sequences."""

    n: int | None
    best_of: int | None
    use_beam_search: bool | None


def check_stream(asked: Ranked) -> None:
    """Raises RequestError when nothing can be said before the end."""
    if asked.use_beam_search:
        raise RequestError(
            "beams cannot be streamed, since which one is the best shows only at the end: leave out stream", "stream"
        )
    if asked.best_of is not None and asked.best_of > (asked.n or 1):
        raise RequestError(
            "which of best_of samples are the best shows only at their ends: leave out stream, or best_of", "stream"
        )


class Common(Forms, kw_only=True, forbid_unknown_fields=True):
    """What completions and chats share; None means the default of SamplingParams."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: LogprobsMode | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    timings: bool | None = None
    # harmless: they ask for nothing that shows in the answer
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # in NOT_DONE
    store: Any = None
    service_tier: Any = None
    mm_processor_kwargs: Any = None
    kv_transfer_params: Any = None

    def check(self) -> None:
        """What no single field can say; raises RequestError."""
        check_done(self, NOT_DONE)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", "stream_options")
        for name in ("request_id", "cache_salt"):
            text = getattr(self, name)
            if text is not None and not (0 < len(text) <= MAX_TEXT and text.isprintable()):
                raise RequestError(f"{name} must be 1 to {MAX_TEXT} printable characters", name)
        if self.stream:
            check_stream(self)
        if self.priority is not None and not -(2**31) <= self.priority < 2**31:
            raise RequestError(f"priority must be in [-2^31, 2^31), not {self.priority}", "priority")
        truncate = self.truncate_prompt_tokens
        if truncate is not None and truncate != -1 and not 1 <= truncate < 2**31:
            raise RequestError(f"truncate_prompt_tokens must be -1 or at least 1, not {truncate}", _TRUNCATE)

    def asked(self, defaults: Mapping[str, Any], **extra: Any) -> dict[str, Any]:
        """The sampling fields that were sent, as SamplingParams takes them, over the checkpoint's `defaults`."""
        found = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if found.get("seed") == -1:  # vLLM's way to say none
            del found["seed"]
        if self.use_beam_search:  # nothing is drawn, so what the checkpoint says about drawing does not apply
            defaults = {name: value for name, value in defaults.items() if name == "repetition_penalty"}
            found.setdefault("temperature", 0.0)
        if (form := self.form()) is not None:
            found["structured_outputs"] = form
        return {**defaults, **found} | {name: value for name, value in extra.items() if value is not None}


_TRUNCATE = "truncate_prompt_tokens"
_SAMPLING = (
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("seed", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output"),
    *("skip_special_tokens", "prompt_logprobs", "logprobs_mode", "logit_bias", "allowed_token_ids", "bad_words"),
    *("best_of", "use_beam_search", "beam_width", "length_penalty", "early_stopping"),
)


class CompletionRequest(Common, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions. `max_tokens` 0 with `echo` scores the prompt and generates nothing."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: Any = None

    @property
    def scores_only(self) -> bool:
        return bool(self.echo) and self.max_tokens == 0

    def prompts(self, most: int) -> list[str | list[int]]:
        """One string or one list of ids for each prompt.

        Raises:
            RequestError: none, too many, or a mixture.
        """
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and all(isinstance(item, int) for item in given):
            return [given]  # type: ignore[list-item]
        if not given or any(isinstance(item, int) or not isinstance(item, type(given[0])) for item in given):
            raise RequestError("prompt is a string, token ids, or a list that holds one kind of these", "prompt")
        if len(given) > most:
            raise RequestError(f"prompt holds {len(given)} prompts, at most {most} in one request: split it", "prompt")
        return given  # type: ignore[return-value]

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        wanted = self.logprobs if self.echo else None
        changes: dict[str, Any] = {"max_tokens": 1, "min_tokens": 0} if self.scores_only else {}
        return SamplingParams(
            **self.asked(defaults, logprobs=self.logprobs) | changes | _scores(wanted, self.prompt_logprobs)
        )


class ChatRequest(Common, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions. Without `max_tokens` an answer may fill the context."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | Named | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    verbosity: Any = None
    documents: Any = None
    chat_template: Any = None

    def check(self) -> None:
        super().check()
        if self.add_special_tokens:
            raise RequestError("the chat template writes the special tokens: leave it out", "add_special_tokens")
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: send one",
                "continue_final_message",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise RequestError("max_tokens and max_completion_tokens differ: send one", "max_completion_tokens")

    def wanted_tools(self) -> Tools:
        """What may be called; raises RequestError."""
        return asked(self.tools, self.tool_choice, self.parallel_tool_calls)

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        top = (self.top_logprobs or 0) if self.logprobs else None
        try:
            return SamplingParams(**self.asked(defaults, logprobs=top) | {"max_tokens": most})
        except RequestError as error:
            if error.param == "logprobs":
                error.param = "top_logprobs"
            if error.param == "max_tokens" and self.max_completion_tokens is not None:
                error.param = "max_completion_tokens"
            raise


def _scores(*wanted: int | None) -> dict[str, int]:
    """How many alternatives the prompt's tokens need, when anything asks for them."""
    given = [value for value in wanted if value is not None]
    return {"prompt_logprobs": max(given)} if given else {}
