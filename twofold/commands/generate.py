"""`twofold generate`: a prompt continued as the checkpoint says, printed."""

from __future__ import annotations

import sys

from ..engine import LLM, EngineConfig, SamplingParams
from .flags import Given
from .model import model_dir, sampling_defaults

ROOM = 128  # new tokens, when neither the flags nor the checkpoint say how many


def generate(given: Given) -> int:
    """Print the continuation alone, or after the prompt with --echo; several samples one after another."""
    model = model_dir(given.model)
    params = given.settings(SamplingParams, **{"max_tokens": ROOM} | sampling_defaults(model))
    prompt = sys.stdin.read() if given.prompt == "-" else given.prompt
    llm = LLM(model, **given.options(EngineConfig))
    for completion in llm.generate([prompt], params):
        for sample in completion.outputs:
            print((prompt if given.echo else "") + sample.text)
    return 0
