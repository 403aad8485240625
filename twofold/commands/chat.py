"""`twofold chat`: a conversation in the terminal, with a model in this process or behind a server.

A `Reply` is given the messages so far and yields the answer's text as it comes; `talk` does the rest, whoever answers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..core import TwofoldError
from .flags import Given
from .remote import Server

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..engine.sampling import SamplingParams

Message = dict[str, str]
Reply = Callable[[list[Message]], Iterator[str]]

ROOM = 512  # new tokens of one answer, unless told otherwise
HINT = "Type a message and press Enter. /reset forgets the conversation, /exit or Ctrl-D leaves."


def talk(reply: Reply, system: str | None) -> int:
    """Read messages from standard input until it ends; each answer is printed as it comes. Ctrl-C cuts an answer."""
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    if sys.stdin.isatty():
        print(HINT)
    while True:
        said = _ask()
        if said is None or said.strip() == "/exit":
            return 0
        if said.strip() == "/reset":
            messages = list(start)
        elif said.strip():
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": _print_as_it_comes(reply(messages))})


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _print_as_it_comes(pieces: Iterator[str]) -> str:
    said: list[str] = []
    try:
        for piece in pieces:
            said.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass  # the answer so far stands, the conversation goes on
    finally:
        print(flush=True)
    return "".join(said)


def local(given: Given) -> Reply:
    """Answers by an engine in this process; the prefix cache keeps the conversation so far."""
    from ..engine.config import EngineConfig
    from ..engine.llm import LLM
    from ..engine.sampling import SamplingParams
    from .model import generate_defaults, model_dir

    model = model_dir(given.model)
    params = given.settings(SamplingParams, **{"max_tokens": ROOM} | generate_defaults(model))
    llm = LLM(model, **given.options(EngineConfig))
    return lambda messages: _answer(llm, messages, params)


def _answer(llm: LLM, messages: list[Message], params: SamplingParams) -> Iterator[str]:
    """One answer's text, in pieces that no later token can change; leaving early aborts the request."""
    from ..data import TextStream
    from ..engine.request import Request, State

    prompt = llm.template.encode(llm.tokenizer, messages)
    request = Request(id=f"chat-{len(messages)}-{time.monotonic_ns()}", prompt_ids=tuple(prompt), params=params)
    text = TextStream(
        llm.tokenizer,
        stop=params.stop,
        include_stop=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
    )
    llm.engine.submit(request)
    try:
        finish = None
        while finish is None and text.stopped is None:
            for output in llm.engine.step():
                if output.request_id == request.id:
                    finish = output.finish
                    ids = [token.id for token in output.tokens]
                    yield text.push(ids[:-1] if finish is State.STOP else ids)
        yield text.finish()
    finally:
        llm.engine.abort(request.id)


def remote(given: Given) -> Reply:
    """Answers by the server at --url, over its OpenAI-compatible API."""
    from ..engine.sampling import SamplingParams

    server = Server(given.url, given.api_key, "--url")
    wanted = {"max_tokens": ROOM} | given.options(SamplingParams)

    def reply(messages: list[Message]) -> Iterator[str]:
        return _stream(server, {"messages": messages, "stream": True, **wanted})

    return reply


def _stream(server: Server, body: dict[str, Any]) -> Iterator[str]:
    """The pieces of one streamed chat completion; the model is the first that the server lists."""
    with server.asked("chat/completions", {"model": server.model(), **body}) as answer:
        for line in answer:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise TwofoldError(f"the server says: {event['error'].get('message', event['error'])}")
            yield from (choice["delta"].get("content") or "" for choice in event["choices"])
