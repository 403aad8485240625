"""`twofold evaluate`: a model or a server on a task file; figures with intervals, and against another model on demand.

A model in this process and a server are asked alike, with the same seeds: a server of the same model answers the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..align import scores
from ..align.episode import Group, Prompt, Rollout
from ..align.evaluate import Answerer, Drawing, Evaluation, Tell, evaluate
from ..align.rewards import Panel
from ..align.rollout import rollout, seed_of
from ..align.speech import Speech
from ..align.task import Task, read_prompts, read_task
from ..core import CapacityError, CheckpointError, ConfigError, RequestError
from ..data.rows import Said
from ..data.wording import Wording
from ..engine.config import EngineConfig
from ..engine.llm import LLM
from ..engine.sampling import MAX_N, SamplingParams
from ..train import card
from .flags import Given
from .model import bundled_model
from .remote import Server

CALLS = 8
"""Requests that a server is sent at the same time."""
TRIES = 6
"""How often a server that is full is asked again, after 1, 2, 4 ... seconds."""

PLAIN = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
"""What servers like Twofold and vLLM are told besides, so that they draw from the model as it is."""


def run(given: Given) -> int:
    """Evaluate, print the figures, and write what the flags ask for; exit code 0."""
    model, file = (given.model, given.task) if given.task else (str(bundled_model()), given.model)
    task = read_task(Path(file), {name.replace("-", "_"): value for name, value in given.overrides(Task).items()})
    prompts = read_prompts(task, _count("--limit", given.limit))
    _must_be_writable(given.output, given.answers)
    if given.record and _is_url(model):
        raise ConfigError("--record keeps the figures beside a model: give its directory, not a server")
    with Panel(task.rewards) as panel, _progress() as tell:
        found = [
            _evaluated(task, prompts, place, panel, given, tell)
            for place in (model, given.against)
            if place is not None
        ]
    for note in dict.fromkeys(note for one in found for note in one.notes):
        print(f"twofold: {note}", file=sys.stderr)
    records = [scores.record(one) for one in found]
    difference = scores.compare(*found) if len(found) == 2 else None
    for line in _told(records, difference):
        print(line)
    if given.output:
        told = {"evaluations": records, **({"comparison": difference} if difference else {})}
        Path(given.output).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if given.answers:
        rows = (json.dumps(row, ensure_ascii=False) + "\n" for one in found for row in scores.answers(one))
        Path(given.answers).write_text("".join(rows), encoding="utf-8")
    if given.record:
        place = _directory(model)
        path = scores.keep(place, records[0])
        print(f"kept in {path}" + (f", and in the card {place / card.CARD}" if card.refresh(place) else ""))
    return 0


def _evaluated(task: Task, prompts: Sequence[Prompt], place: str, panel: Panel, given: Given, tell: Tell) -> Evaluation:
    if _is_url(place):
        server = Server(place, given.api_key, "MODEL")
        model = server.model(given.served_model)
        return evaluate(task, prompts, _Remote(server, model), panel, model=model, tell=tell)
    directory = _directory(place)
    llm = LLM(directory, **given.options(EngineConfig))
    path = directory.resolve()
    name = path.parent.name if path.name == "model" else path.name
    chats = not all(isinstance(prompt.shown, str) for prompt in prompts)
    return evaluate(task, prompts, _local(llm, chats), panel, model=name, tell=tell)


# ------------------------------------------------------------------------------------------------- who answers
def _local(llm: LLM, chats: bool) -> Answerer:
    """Answers of an engine in this process."""
    words = Speech(llm.tokenizer, llm.template if chats else None)
    wording = Wording(words.tokenizer, words.template)

    def answer(prompts: Sequence[Prompt], drawing: Drawing) -> Iterator[Group]:
        ready = [replace(prompt, ids=tuple(wording.prompt(_said(prompt)))) for prompt in prompts]
        params = SamplingParams(
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            max_tokens=drawing.max_tokens,
            stop=drawing.stop,
        )
        for group in rollout(llm.engine, ready, drawing.n, params, seed=drawing.seed, words=words):
            failed = next((it for it in group.rollouts if it.finish == "error"), None)
            if failed is not None:
                raise RequestError(f"prompt {group.prompt.number} was not answered: {failed.error}")
            yield group

    return answer


def _said(prompt: Prompt) -> Said:
    return prompt.shown if isinstance(prompt.shown, str) else tuple(prompt.shown)


class _Remote:
    """Answers of a server; what it does not know of PLAIN it is not told again."""

    def __init__(self, server: Server, model: str) -> None:
        self.server, self.model = server, model
        self._plain: Mapping[str, Any] = PLAIN

    def __call__(self, prompts: Sequence[Prompt], drawing: Drawing) -> Iterator[Group]:
        with ThreadPoolExecutor(CALLS) as pool:
            asked: dict[Future[Group], Prompt] = {}
            try:
                asked |= {pool.submit(self._group, prompt, drawing): prompt for prompt in prompts}
                for done in as_completed(asked):
                    yield done.result()
            finally:
                for future in asked:
                    future.cancel()

    def _group(self, prompt: Prompt, drawing: Drawing) -> Group:
        rollouts: list[Rollout] = []
        for params in _requests(prompt, drawing):
            for choice in self._choices(prompt, params):
                text = choice["text"] if isinstance(prompt.shown, str) else choice["message"]["content"]
                ids = choice.get("token_ids") or ()
                rollouts.append(_rollout(prompt, len(rollouts), ids, choice["finish_reason"], text or ""))
        return Group(prompt=prompt, rollouts=tuple(rollouts))

    def _choices(self, prompt: Prompt, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        chat = not isinstance(prompt.shown, str)
        path, shown = (
            ("chat/completions", {"messages": prompt.shown}) if chat else ("completions", {"prompt": prompt.shown})
        )
        body = {"model": self.model, **shown, **params, "stop": list(params["stop"])}
        plain = self._plain
        try:
            return self._patiently(path, {**body, **plain})
        except RequestError:
            if not plain:
                raise
            found = self._patiently(path, body)
            self._plain = {}
            return found

    def _patiently(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        for wait in range(TRIES):
            try:
                with self.server.asked(path, body) as answer:
                    found = json.loads(answer.read())["choices"]
                    return sorted(found, key=lambda choice: choice["index"])
            except CapacityError:
                if wait == TRIES - 1:
                    raise
                sleep(2**wait)
        raise AssertionError("the last try returns or raises")


def _requests(prompt: Prompt, drawing: Drawing) -> list[dict[str, Any]]:
    """The sampling fields of each request that together draw a prompt's samples."""
    parts = [min(MAX_N, drawing.n - start) for start in range(0, drawing.n, MAX_N)]
    same = {
        "temperature": drawing.temperature,
        "top_p": drawing.top_p,
        "max_tokens": drawing.max_tokens,
        "stop": drawing.stop,
    }
    seeds = [seed_of(drawing.seed, prompt.number + (part << 32)) for part in range(len(parts))]
    return [{"n": n, "seed": _signed(seed), **same} for n, seed in zip(parts, seeds, strict=True)]


def _signed(seed: int) -> int:
    """A seed of 64 bits as the signed number of 64 bits that APIs take; an engine of ours reads the same bits."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _rollout(prompt: Prompt, sample: int, ids: Sequence[int], finish: str, text: str) -> Rollout:
    """An answer whose log-probabilities nobody asked for."""
    count = len(ids)
    return Rollout(
        prompt=prompt,
        sample=sample,
        ids=tuple(ids),
        logprobs=(0.0,) * count,
        mine=(True,) * count,
        versions=(0,) * count,
        finish=finish,
        text=text,
    )


# ------------------------------------------------------------------------------------------------- what is said
def _told(records: Sequence[scores.Record], difference: scores.Record | None) -> Iterator[str]:
    """The lines of the table."""
    for found in records:
        settings = found["settings"]
        drawn = f" and {found['samples']} sampled ones" if found["samples"] else ""
        yield (
            f"{found['model']} on {found['task']}: {found['prompts']} prompts, for each a greedy answer{drawn} "
            f"(temperature {settings['temperature']:g}, at most {settings['max_tokens']} tokens)"
        )
        passed = f"{found['greedy']['passed']} of {found['prompts']}"
        yield _line("greedy", found["greedy"], passed, rate=True)
        for k, figure in found["pass@k"].items():
            yield _line(f"pass@{k}", figure, rate=True)
        for name, figure in found["reward"].items():
            yield _line(f"reward, {name}", figure)
        if len(found["rewards"]) > 1:
            for name, figure in found["rewards"].items():
                yield _line(f"  {name}", figure)
        length = "" if found["length"] is None else f"{found['length']:.1f} tokens an answer, "
        yield f"  {length}{found['truncated']:.1%} cut at the limit"
        if found["unjudged"]:
            faults = ", ".join(f"{name} {count}" for name, count in found["faults"].items() if count)
            yield f"  {found['unjudged']} answers were not judged and count as not passed{faults and f' ({faults})'}"
        yield ""
    if difference:
        yield f"{difference['model']} against {difference['against']}, prompt by prompt"
        for name, figure in difference["differences"].items():
            if name.startswith("rewards.") and len(records[0]["rewards"]) == 1:
                continue  # it is the total
            rate = name.startswith(("greedy", "pass@"))
            yield _line(name, figure, figure["verdict"], rate=rate, signed=True)


def _line(label: str, figure: Mapping[str, Any], note: str = "", *, rate: bool = False, signed: bool = False) -> str:
    sign, kind = "+" if signed else "", ".1%" if rate else ".3f"
    value, low, high = (format(figure[name], sign + kind) for name in ("value", "low", "high"))
    return f"  {label:<28}{value:>9}   {low:>8} to {high:>8}   {note}".rstrip()


@contextmanager
def _progress() -> Iterator[Tell]:
    """A bar on standard error while somebody watches."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(line, description=what, completed=done, total=total)


# ------------------------------------------------------------------------------------------------- what is given
def _is_url(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _directory(place: str) -> Path:
    """A model's directory, or that of a run which has finished one."""
    for found in (Path(place), Path(place) / "model"):
        if (found / "config.json").is_file():
            return found
    raise CheckpointError(f"{place} has no config.json: give a model's directory, a finished run's, or a server's URL")


def _count(flag: str, value: str | None) -> int | None:
    if value is not None and not (value.isdecimal() and int(value) > 0):
        raise ConfigError(f"{flag} must be a whole number from 1, not '{value}'")
    return int(value) if value is not None else None


def _must_be_writable(*files: str | None) -> None:
    """Say now, not after the work, that a result has nowhere to go."""
    for file in filter(None, files):
        if not Path(file).resolve().parent.is_dir():
            raise ConfigError(f"{file}: there is no directory {Path(file).parent}; make it first")
