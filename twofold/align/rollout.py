"""rollout: n samples of each prompt from the serving engine, as groups that come out when they are finished.

    prompts ──▶ n requests each ──▶ engine ──▶ tokens, each with log-probability and version ──▶ Group
       as many as keep the engine      ▲                      │ stop
       busy, and no more               └── a tool's reply ◀───┘ turn(prompt, messages)

- A sample's draws are a function of (seed, the prompt's number, the sample's number, position): what else runs, in
  which order, on which rank, in how many turns and after how many preemptions leaves no trace.
- Samples share their prompt's full blocks: the first computes them, the others wait for it (`engine/scheduler.py`).
  A block that is not full is computed by each, since each goes on writing into it.
- Log-probabilities are of the distribution at the temperature, before any cut: `Decoder.logprobs(temperature=...)` has
  the same bits. With top-p, top-k, min-p or penalties a rollout is off-policy, by choice.
- What a tool said stays in the sequence but is not the model's; the next turn finds everything before it in the cache.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from hashlib import blake2b
from typing import Any, Protocol

from ..core import CapacityError, ConfigError, RequestError, StateError
from ..data import TextStream
from ..engine.config import EngineConfig
from ..engine.limits import Limits
from ..engine.request import Output, Request, State
from ..engine.sampling import SamplingParams
from .episode import Group, Prompt, Rollout
from .stops import Stops
from .turns import Reply, Turn, Words, reply_ids

TOOLS_AT_ONCE = 16
PATIENCE = 0.25
"""Seconds to wait for a tool before the caller is asked again whether it is enough."""
_NAMES = itertools.count()


def never() -> bool:
    """Nobody asks for an end."""
    return False


class Engine(Protocol):
    """The verbs of an engine that a rollout needs, wherever the engine is."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def has_work(self) -> bool: ...

    def submit(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[Output]: ...


def rollout(
    engine: Engine,
    prompts: Iterable[Prompt],
    n: int,
    params: SamplingParams,
    *,
    seed: int,
    words: Words,
    turn: Turn | None = None,
    max_turns: int = 8,
    max_total: int | None = None,
    until: Callable[[], bool] = never,
) -> Iterator[Group]:
    """n samples of each prompt; groups come as they finish, rollouts of a group in the order of their numbers.

    `params.max_tokens` bounds each turn of the model, `max_total` all that stands behind a prompt, `max_turns` the
    model's turns; what they cut short has finish "length". One whose request the engine refused, or whose numbers were
    not finite, has finish "error", says why, and stops nobody else. `n`, `seed`, `logprobs` and `prompt_logprobs` of
    `params` are not read. One rollout at a time drives an engine; new weights may come between two groups. When the
    iterator is closed, or anything raises, the engine is left without its requests; so when `until`, which is asked
    before each step of the engine, says that it is enough.

    Raises:
        ConfigError: no sample, or no turn.
        StateError: somebody else drives the same engine.
    """
    if n < 1 or max_turns < 1:
        raise ConfigError(f"a rollout takes n samples of max_turns turns, both from 1, not {n} and {max_turns}")
    return _groups(_Run(engine, params, seed, words, turn, max_turns, max_total), iter(prompts), n, until)


def seed_of(seed: int, number: int) -> int:
    """The seed of a prompt's requests; the sample's number is a key of each draw besides."""
    key = struct.pack("<QQ", seed % 2**64, number % 2**64)
    return int.from_bytes(blake2b(key, digest_size=8, person=b"twofold.roll").digest(), "little")


def _groups(run: _Run, prompts: Iterator[Prompt], n: int, until: Callable[[], bool]) -> Iterator[Group]:
    try:
        more = True
        while (more or run.busy) and not until():
            while more and run.hungry:
                prompt = next(prompts, None)
                more = prompt is not None
                if prompt is not None:
                    run.begin(prompt, n)
            if run.busy:
                run.advance()
            yield from run.finished()
    finally:
        run.close()


class _Sample:
    """One rollout while it grows. `start` is where the model's present turn began."""

    __slots__ = (
        *("prompt", "number", "group", "name", "ids", "logprobs", "mine", "versions"),
        *("messages", "start", "turns", "shown", "stream", "tail", "finish", "error"),
    )

    def __init__(self, prompt: Prompt, number: int, group: list[_Sample]) -> None:
        self.prompt, self.number, self.group, self.name = prompt, number, group, ""
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.mine: list[bool] = []
        self.versions: list[int] = []
        self.messages: list[dict[str, Any]] = []
        self.start = self.turns = 0
        self.shown = ""  # the text before the present turn
        self.stream: TextStream | None = None  # of the turn, once a stop may have been in it
        self.tail = b""
        self.finish: str | None = None
        self.error: str | None = None

    def result(self) -> Rollout:
        assert self.finish is not None, "asked for when all have ended"
        return Rollout(
            prompt=self.prompt,
            sample=self.number,
            ids=tuple(self.ids),
            logprobs=tuple(self.logprobs),
            mine=tuple(self.mine),
            versions=tuple(self.versions),
            finish=self.finish,
            text=self.shown,
            error=self.error,
        )


class _Run:
    """The requests of one rollout, and the tools they wait for."""

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        seed: int,
        words: Words,
        turn: Turn | None,
        max_turns: int,
        max_total: int | None,
    ) -> None:
        self.engine, self.seed, self.words = engine, seed, words
        self.turn, self.max_turns, self.max_total = turn, max_turns, max_total
        self.params = params.with_(n=1, seed=None, logprobs=0, prompt_logprobs=None, logprobs_mode="tempered")
        self._stops = Stops(words.tokenizer, self.params)
        self.most = 2 * engine.config.max_num_seqs
        self._live: dict[str, _Sample] = {}
        self._asked: dict[Future[Reply], _Sample] = {}
        self._done: list[_Sample] = []
        self._tools = ThreadPoolExecutor(TOOLS_AT_ONCE, "tool") if turn else None

    @property
    def busy(self) -> bool:
        return bool(self._live or self._asked)

    @property
    def hungry(self) -> bool:
        """Whether the engine's queue has room: enough is kept waiting there to fill every seat that becomes free."""
        return len(self._live) + len(self._asked) < self.most

    def begin(self, prompt: Prompt, n: int) -> None:
        """Submit the samples of a prompt, together, so that they find each other's blocks."""
        group: list[_Sample] = []
        group += (_Sample(prompt, number, group) for number in range(n))
        for sample in group:
            self._submit(sample, self.max_total)

    def advance(self) -> None:
        """One step of the engine, and what tools have said meanwhile; with nothing else to do, wait for one of them."""
        if self._live:
            if not self.engine.has_work:
                raise StateError(
                    f"{len(self._live)} rollouts are under way and the engine knows nothing of them: "
                    "one rollout at a time drives an engine"
                )
            for output in self.engine.step():
                sample = self._live.get(output.request_id)
                if sample is not None:  # else one that was stopped, of this rollout or of another
                    self._take(sample, output)
        if self._asked:
            done = wait(self._asked, 0 if self._live else PATIENCE, FIRST_COMPLETED).done
            for answer in done:
                self._reply(self._asked.pop(answer), answer.result())

    def finished(self) -> Iterator[Group]:
        """The groups whose last sample has ended since this was asked last."""
        done, self._done = self._done, []
        for sample in done:
            group = sample.group
            if group and all(each.finish is not None for each in group):
                yield Group(prompt=sample.prompt, rollouts=tuple(each.result() for each in group))
                group.clear()

    def close(self) -> None:
        """Leave nothing in the engine, and no tool waiting to be called."""
        if self._tools:
            self._tools.shutdown(wait=False, cancel_futures=True)
        if self._live:
            for name in self._live:
                self.engine.abort(name)
            self._live.clear()
            with suppress(StateError):  # asleep, or between two weights: then the ends are told at its next step
                if self.engine.has_work:
                    self.engine.step()

    # ------------------------------------------------------------------------------------ a turn of the model
    def _submit(self, sample: _Sample, left: int | None) -> None:
        """Begin a turn of at most `left` ids."""
        params = self.params if left is None else _within(self.params, left)
        sample.name = f"rollout-{next(_NAMES)}-{sample.prompt.number}.{sample.number}"
        sample.start = len(sample.ids)
        sample.stream, sample.tail = None, b""
        request = Request(
            id=sample.name,
            prompt_ids=(*sample.prompt.ids, *sample.ids),
            params=params,
            sample=sample.number,
            seed=seed_of(self.seed, sample.prompt.number),
        )
        try:
            self.engine.submit(request)
        except (RequestError, CapacityError) as error:
            self._end(sample, "error", str(error))
        else:
            self._live[sample.name] = sample

    def _take(self, sample: _Sample, output: Output) -> None:
        for token in output.tokens:
            assert token.logprob is not None, "asked for"
            sample.ids.append(token.id)
            sample.logprobs.append(token.logprob)
            sample.mine.append(True)
            sample.versions.append(output.version)
        finish = output.finish
        stopped = bool(self._stops) and self._read(sample, output)
        if stopped and finish is None:
            self.engine.abort(sample.name)  # the engine does not know strings
        if stopped or finish is not None:
            del self._live[sample.name]
            spoken = sample.ids[sample.start : -1 if self._silent(finish) else None]
            text = sample.stream.text if sample.stream else self._decode(spoken)
            self._turn_ended(sample, "stop" if stopped or finish is None else finish.value, text, output.error)

    def _read(self, sample: _Sample, output: Output) -> bool:
        """Take an output's text in; whether a stop string ended the turn, which then ends with the token that did."""
        ids = [token.id for token in output.tokens]
        silent = self._silent(output.finish)
        new = ids[:-1] if silent else ids
        stream = sample.stream
        if stream is None:
            sample.tail, near = self._stops.near(sample.tail, new)
            if not near:
                return False
            stream = sample.stream = self._stops.stream()
            new = sample.ids[sample.start : -1 if silent else None]
        stream.push(new)
        if output.finish is not None:
            stream.finish()
        if stream.stopped is None:
            return False
        for values in (sample.ids, sample.logprobs, sample.mine, sample.versions):
            del values[sample.start + stream.tokens :]
        return True

    def _silent(self, finish: State | None) -> bool:
        """Whether the last id said only that this is the end, and is no part of the text."""
        return finish is State.STOP and not self.params.include_stop_str_in_output

    def _turn_ended(self, sample: _Sample, finish: str, text: str, error: str | None) -> None:
        sample.turns += 1
        sample.shown += text
        if self._tools is None or self.turn is None or finish != "stop":
            self._end(sample, finish, error)
            return
        sample.messages.append({"role": "assistant", "content": text})
        asked = self._tools.submit(self.turn, sample.prompt, [dict(message) for message in sample.messages])
        self._asked[asked] = sample

    def _end(self, sample: _Sample, finish: str, error: str | None = None) -> None:
        sample.finish, sample.error = finish, error
        self._done.append(sample)

    # ------------------------------------------------------------------------------------ a turn of a tool
    def _reply(self, sample: _Sample, reply: Reply) -> None:
        """Put what a tool said behind the model's turn and let the model go on, where there is room for one more id."""
        if reply is None:
            self._end(sample, "stop")
            return
        ids = reply_ids(self.words, sample.prompt, sample.ids[-1], reply)
        left = self._room(sample.prompt) - len(sample.ids) - len(ids)
        if sample.turns >= self.max_turns or left < 1:
            self._end(sample, "length")
            return
        sample.ids += ids
        sample.logprobs += [0.0] * len(ids)
        sample.mine += [False] * len(ids)
        sample.versions += [sample.versions[-1]] * len(ids)
        said = self._decode(ids)
        sample.shown += said
        sample.messages.append(dict(reply) if isinstance(reply, Mapping) else {"role": "tool", "content": said})
        self._submit(sample, left)

    def _room(self, prompt: Prompt) -> int:
        """How many ids may stand behind a prompt."""
        limits = self.engine.limits
        room = min(limits.max_model_len, limits.cache_tokens + 1) - len(prompt.ids)
        return room if self.max_total is None else min(room, self.max_total)

    def _decode(self, ids: Iterable[int]) -> str:
        return self.words.tokenizer.decode(list(ids), skip_special_tokens=self.params.skip_special_tokens)


def _within(params: SamplingParams, left: int) -> SamplingParams:
    """For a turn of at most `left` ids."""
    most = left if params.max_tokens is None else min(params.max_tokens, left)
    return params.with_(max_tokens=most, min_tokens=min(params.min_tokens, most))
