"""Twofold itself, in a process of its own and asked like its peers.

    python benchmarks/peers/run_twofold.py --model DIR --threads N [--set NAME=VALUE ...]

`--set` gives fields of EngineConfig (dtype, quantization, kv_dtype ...). Prefix caching is on, as is its default; where
a workload brings fresh tokens it finds nothing. Answers also tell the share of cache slots allocated for nothing.
"""

from __future__ import annotations

import os
from typing import Any

from protocol import Channel, Question, Tokens, arguments


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    channel = Channel()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    from twofold.platforms import bound_spin

    bound_spin()

    import torch

    import twofold

    torch.set_num_threads(args.threads)
    settings = dict(each.split("=", 1) for each in args.set)
    engine = Engine(twofold.LLM(args.model, max_model_len=2048, **settings))
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    channel.serve(f"twofold, {told}", engine.run, more=lambda: {"waste": engine.waste})


class Engine:
    """Requests straight to the engine: no text is made of the tokens."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.engine
        self.turns = 0
        self.waste = 0.0

    def run(self, question: Question) -> Tokens:
        from twofold import SamplingParams
        from twofold.engine.request import Request

        self.turns += 1
        found: dict[str, list[int]] = {}
        for i, (prompt, new) in enumerate(zip(question["prompts"], question["outputs"], strict=True)):
            params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
            name = f"{self.turns}-{i}"
            found[name] = []
            self.engine.submit(Request(id=name, prompt_ids=tuple(prompt), params=params))
        while self.engine.has_work:
            for output in self.engine.step():
                if output.error:
                    raise RuntimeError(output.error)
                found[output.request_id] += [token.id for token in output.tokens]
        self.waste = self.engine.stats().waste
        return list(found.values())


if __name__ == "__main__":
    main()
