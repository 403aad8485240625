"""A conversation with a tool in it: the model speaks, a Python function answers, the model goes on."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from twofold import LLM, SamplingParams
from twofold.align.episode import Prompt
from twofold.align.rollout import rollout
from twofold.align.speech import Speech
from twofold.commands.model import bundled_model

ROWS = [
    {"prompt": "What does os.path.join do?", "module": "os.path", "name": "join"},
    {"prompt": "What does math.gcd do?", "module": "math", "name": "gcd"},
    {"prompt": "What does textwrap.dedent do?", "module": "textwrap", "name": "dedent"},
]


def lookup(prompt: Prompt, messages: list[dict[str, Any]]) -> dict[str, str] | None:
    """Behind the model's first turn, what the library itself says; behind its second one, nothing more."""
    if len(messages) > 1:
        return None
    found = getattr(importlib.import_module(prompt.columns["module"]), prompt.columns["name"])
    said = (inspect.getdoc(found) or "nothing").splitlines()[0]
    return {"role": "user", "content": f"The library says: {said} So what does {prompt.columns['name']} do?"}


def main() -> None:
    llm = LLM(bundled_model(), max_model_len=512)
    speech = Speech.load(llm.model)
    params = SamplingParams(temperature=0.7, max_tokens=48)
    for group in rollout(
        llm.engine, speech.prompts(ROWS), 2, params, seed=1, words=speech, turn=lookup, max_turns=2, max_total=256
    ):
        print(group.prompt.columns["name"])
        for each in group.rollouts:
            mine = [logprob for logprob, own in zip(each.logprobs, each.mine) if own]
            nats = -sum(mine) / len(mine)
            said = len(each.ids) - len(mine)
            print(f"  {len(mine)} tokens of the model ({nats:.2f} nats each), {said} of the tool, {each.finish}")


if __name__ == "__main__":
    main()
