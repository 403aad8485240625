"""`twofold generate`: a prompt continued as the checkpoint says, printed."""

from __future__ import annotations

import sys

from ..engine.config import EngineConfig
from ..engine.llm import LLM
from ..engine.sampling import SamplingParams
from .flags import Given
from .model import generate_defaults, model_dir

ROOM = 128  # new tokens, when neither the flags nor the checkpoint say how many


def generate(given: Given) -> int:
    """Print the continuation alone, or after the prompt with --echo; several samples one after another."""
    model = model_dir(given.model)
    params = given.settings(SamplingParams, **{"max_tokens": ROOM} | generate_defaults(model))
    prompt = sys.stdin.read() if given.prompt == "-" else given.prompt
    llm = LLM(model, **given.options(EngineConfig))
    for completion in llm.generate([prompt], params, progress=False):
        for sample in completion.outputs:
            print((prompt if given.echo else "") + sample.text, flush=True)
    return 0
