"""LLM: a model in this process, texts in and texts out.

llm = LLM("path/to/checkpoint", max_model_len=1024)
for answer in llm.generate(["def fib(n):"], SamplingParams(temperature=0, max_tokens=64)):
    print(answer.outputs[0].text)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import RequestError, build
from ..data import TextStream, Tokenizer
from ..models.gguf import folder_of
from ..platforms import free_on
from .adapters import AdapterPool
from .capacity import resolve
from .config import EngineConfig
from .embedding import TextJudge
from .engine import Engine, open_engine
from .grammar.masks import Grammars
from .opening import open_decoder
from .request import Beam, Output, Request, State, TokenOut
from .sampling import SamplingParams
from .words import ban

if TYPE_CHECKING:
    from ..data import ChatTemplate
    from .grammar.masks import Grammars

Message = Mapping[str, Any]
Prompt = str | Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One sample. `token_ids` holds the token that ended it, `text` does not (nor the stop string, unless asked for).

    `finish_reason` is stop, length, timeout, abort or error; `stop_reason` the stop string or id, None for EOS. A beam
    has a score, and in `cumulative_logprob` the sum that its search made. `structured_output_error` says what a form
    that was not strict could not keep out.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: tuple[TokenOut, ...] | None = None
    error: str | None = None
    cumulative_logprob: float | None = None
    beam_score: float | None = None
    structured_output_error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A prompt (None when it came as ids) and its `n` samples."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenOut, ...] | None = None


class LLM(TextJudge):
    """A checkpoint, its tokenizer and an engine. Not for use by several threads at once.

    What is asked of texts rather than after them (`embed`, `classify`, `score`) is in `embedding.py`.

    `model` is the directory of a checkpoint, `settings` are fields of EngineConfig.

    Raises:
        ConfigError: an unknown setting, with the nearest name.
        CheckpointError: a directory that cannot be read as it stands.
        CapacityError: it does not fit this machine; told before anything is loaded, with what would fit.
    """

    def __init__(self, model: str | Path, **settings: Any) -> None:
        self.model = folder_of(model)
        config = resolve(build(EngineConfig, settings), self.model)
        decoder = open_decoder(self.model, config, free_on(config.device))
        self.tokenizer = Tokenizer.load(self.model)
        self.engine = open_engine(decoder, config, self.model, eos_ids=self.tokenizer.eos_ids)
        self._names = itertools.count()

    @cached_property
    def template(self) -> ChatTemplate:
        """The checkpoint's chat template, read at the first chat: a base model has none."""
        from ..data import ChatTemplate

        return ChatTemplate.load(self.model)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        progress: bool = True,
    ) -> list[Completion]:
        """Continue each prompt, text or ids; one SamplingParams for all or one for each. Results are in order.

        `adapter` names one that `load_adapter` has loaded, for all prompts; or one, or None, for each.

        Raises:
            RequestError: a prompt or setting that cannot be served; nothing is left behind in the engine.
            CapacityError: a prompt that could never fit the cache.
        """
        many = _listed(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in many]
        ids = [self.tokenizer.encode_prompt(p) if isinstance(p, str) else list(p) for p in many]
        return self._run(texts, ids, params, progress, adapter)

    def load_adapter(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Know the adapter of a PEFT directory by a name; the model was made with `enable_lora=True`.

        Raises:
            RequestError: the name is taken (unless `replace`), or no adapters are served.
            CheckpointError, CapacityError: it is no adapter for this model, or too large a one.
        """
        self._adapters.load(name, str(path), replace=replace)

    def unload_adapter(self, name: str) -> None:
        """Know an adapter no more. Raises RequestError when nobody did."""
        self._adapters.unload(name)

    @property
    def _adapters(self) -> AdapterPool:
        return self.engine.adapters if isinstance(self.engine, Engine) else AdapterPool()

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
        progress: bool = True,
        **template: Any,
    ) -> list[Completion]:
        """Answer one conversation or several; `template` goes to the checkpoint's chat template, `adapter` as above.

        Raises:
            CheckpointError: the checkpoint has no chat template.
            RequestError: as `generate`, or messages that the template refuses.
        """
        single = not messages or isinstance(messages[0], Mapping)
        talks: Sequence[Any] = [messages] if single else messages
        ids = [self.template.encode(self.tokenizer, talk, **template) for talk in talks]
        texts: list[str | None] = [self.template.render(talk, **template) for talk in talks]
        return self._run(texts, ids, params, progress, adapter)

    # ------------------------------------------------------------------------------------ the loop
    def _run(
        self,
        texts: Sequence[str | None],
        ids: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
        adapter: str | Sequence[str | None] | None,
    ) -> list[Completion]:
        wanted, adapters = _one_each(params, len(ids)), _named(adapter, len(ids))
        self._check_forms(wanted)
        samples: list[list[_Sample]] = []
        live: dict[str, list[_Sample]] = {}
        try:
            for prompt, settings, name in zip(ids, wanted, adapters):
                samples.append(self._samples(tuple(prompt), ban(settings, self.tokenizer), name))
                for made in samples[-1]:
                    if made.request.id not in live:
                        self.engine.submit(made.request)
                    live.setdefault(made.request.id, []).append(made)
            self._drive(live, progress)
        finally:
            for name in live:
                self.engine.abort(name)
        for made in itertools.chain(*samples):
            self._hold_against_form(made)
        return [
            Completion(
                prompt=text,
                prompt_token_ids=tuple(prompt),
                outputs=_best(group, settings),
                prompt_logprobs=group[0].prompt,
            )
            for text, prompt, group, settings in zip(texts, ids, samples, wanted)
        ]

    @property
    def _grammars(self) -> Grammars | None:
        return self.engine.grammars if isinstance(self.engine, Engine) else None

    def _check_forms(self, wanted: Sequence[SamplingParams]) -> None:
        """Raises RequestError for a form that cannot be enforced."""
        grammars = self._grammars
        for form in dict.fromkeys(each.structured_outputs for each in wanted):
            if form is not None and grammars is not None:
                grammars.check(form)

    def _hold_against_form(self, made: _Sample) -> None:
        """Check a finished text against a schema that no grammar could hold whole."""
        form, grammars = made.request.params.structured_outputs, self._grammars
        if form is not None and form.checked_after and grammars is not None and made.reason == "stop":
            made.form_error = grammars.validate(form, made.text)

    def _samples(self, prompt: tuple[int, ...], params: SamplingParams, adapter: str) -> list[_Sample]:
        """One for each sequence: a request each, or all beams of one."""
        if params.use_beam_search:
            first = self._sample(prompt, params, 0, adapter)
            return [first, *(_Sample(first.request, self.tokenizer) for _ in range(1, params.n))]
        if params.width > params.n and params.logprobs is None:
            params = params.with_(logprobs=0)
        return [self._sample(prompt, params, k, adapter) for k in range(params.width)]

    def _sample(self, prompt: tuple[int, ...], params: SamplingParams, k: int, adapter: str) -> _Sample:
        number = next(self._names)
        seed = -1
        if params.seed is None and self.engine.config.seed is not None:
            digest = blake2b(f"{self.engine.config.seed}/{number}".encode(), digest_size=8).digest()
            seed = int.from_bytes(digest, "little")
        if params.prompt_logprobs is not None and k > 0:
            params = params.with_(prompt_logprobs=None)  # the prompt is the same for all samples
        request = Request(id=f"llm-{number}", prompt_ids=prompt, params=params, sample=k, seed=seed, adapter=adapter)
        return _Sample(request, self.tokenizer)

    def _drive(self, live: dict[str, list[_Sample]], progress: bool) -> None:
        """Step until every sample has ended, taking each out of `live` as it does."""
        total, tokens = len(live), 0
        with _bar(total) if progress else nullcontext(lambda ended, tokens: None) as tell:
            while live:
                for output in self.engine.step():
                    group = live.get(output.request_id, [])  # none: left behind by a call that was interrupted
                    for made, part in zip(group, output.parts(len(group))):
                        tokens += len(part.tokens)
                        made.take(part)
                    if group and group[0].ended:
                        self.engine.abort(output.request_id)  # a stop string: the engine does not know
                        del live[output.request_id]
                tell(total - len(live), tokens)


class _Sample:
    """One request and what it has said so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        params = request.params
        self.request = request
        self.beam: Beam | None = None
        self.tokens: list[TokenOut] = []
        self.prompt: tuple[TokenOut, ...] | None = None
        self._text = TextStream(
            tokenizer,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )
        self._finish: tuple[str, int | str | None, str | None] | None = None
        self.form_error: str | None = None

    @property
    def ended(self) -> bool:
        return self._finish is not None

    @property
    def reason(self) -> str | None:
        return self._finish[0] if self._finish is not None else None

    @property
    def text(self) -> str:
        return self._text.text

    def take(self, output: Output) -> None:
        """Add what a step said; a stop string ends the sample in the middle of it."""
        self.prompt = output.prompt or self.prompt
        self.beam = next(iter(output.beams), None)
        ids = [token.id for token in output.tokens]
        silent = output.finish is State.STOP and not self.request.params.include_stop_str_in_output
        self._text.push(ids[:-1] if silent else ids)
        self.tokens += output.tokens
        if output.finish is not None:
            self._text.finish()
        if self._text.stopped is not None:
            del self.tokens[self._text.tokens :]
            self._finish = ("stop", self._text.stopped, None)
        elif output.finish is not None:
            self._finish = (output.finish.value, output.stop_reason, output.error)

    @property
    def mean_logprob(self) -> float:
        return sum(token.logprob or 0.0 for token in self.tokens) / max(len(self.tokens), 1)

    def result(self, index: int, params: SamplingParams) -> CompletionOutput:
        assert self._finish is not None, "every sample has ended"
        reason, stop, error = self._finish
        return CompletionOutput(
            index=index,
            text=self._text.text,
            token_ids=tuple(token.id for token in self.tokens),
            finish_reason=reason,
            stop_reason=stop,
            logprobs=tuple(self.tokens) if params.logprobs is not None else None,
            error=error,
            cumulative_logprob=None if self.beam is None else self.beam.cumulative_logprob,
            beam_score=None if self.beam is None else self.beam.score,
            structured_output_error=self.form_error,
        )


def _best(group: list[_Sample], params: SamplingParams) -> tuple[CompletionOutput, ...]:
    """The `n` sequences asked for: of more samples those with the highest mean log-probability, best first."""
    if len(group) > params.n:
        group = sorted(group, key=lambda made: -made.mean_logprob)[: params.n]
    return tuple(made.result(index, params) for index, made in enumerate(group))


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, moved by telling how many samples have ended and how many tokens came."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generating", total=total, rate=0.0)

        def tell(ended: int, tokens: int) -> None:
            bar.update(task, completed=ended, rate=tokens / max(bar.tasks[0].elapsed or 0.0, 1e-3))

        yield tell


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as several."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} SamplingParams for {count} prompts: give one for all or one for each")
    return list(params)


def _named(given: str | Sequence[str | None] | None, count: int) -> list[str]:
    """The adapter of each prompt, "" for none."""
    each = [given] * count if given is None or isinstance(given, str) else list(given)
    if len(each) != count:
        raise RequestError(f"{len(each)} adapters for {count} prompts: give one for all, or one or None for each")
    return [name or "" for name in each]
