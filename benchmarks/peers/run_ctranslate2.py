"""The peer: CTranslate2's generator on static batches.

    python benchmarks/peers/run_ctranslate2.py --model DIR --threads N [--compute float32|bfloat16|int8_float32]

It takes one output length for a batch, so a batch runs to its longest: 16 requests in the order they come, or all of
them when they want the same. A shared prefix goes in as its static prompt, which it computes once and keeps. What
this processor has no instructions for is computed in float32. Needs ctranslate2; make_ctranslate2.py wrote the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from protocol import Channel, Question, Tokens, arguments


def run(generator: Any, vocabulary: list[str], question: Question) -> Tokens:
    prompts, outputs, shared = question["prompts"], question["outputs"], question.get("shared", 0)
    batch = question.get("batch", 16) if len(set(outputs)) > 1 else len(prompts)
    words = [[vocabulary[token] for token in prompt] for prompt in prompts]
    prefix = {"static_prompt": words[0][:shared], "cache_static_prompt": True} if shared else {}
    found: Tokens = []
    for start in range(0, len(prompts), batch):
        longest = max(outputs[start : start + batch])
        answers = generator.generate_batch(
            [prompt[shared:] for prompt in words[start : start + batch]],
            max_length=longest,
            min_length=longest,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
            end_token=[],
            max_batch_size=0,
            **prefix,
        )
        found += [list(answer.sequences_ids[0]) for answer in answers]
    return [tokens[:new] for tokens, new in zip(found, outputs, strict=True)]


def read_vocabulary(folder: Path) -> list[str]:
    """Token texts by id, as the converter wrote them."""
    data = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
    return sorted(data, key=data.__getitem__) if isinstance(data, dict) else list(data)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--compute", default="float32")
    args = parser.parse_args()
    channel = Channel()

    import ctranslate2

    compute = args.compute if args.compute in ctranslate2.get_supported_compute_types("cpu") else "float32"
    generator = ctranslate2.Generator(
        args.model, device="cpu", compute_type=compute, inter_threads=1, intra_threads=args.threads
    )
    vocabulary = read_vocabulary(Path(args.model))
    name = f"ctranslate2 {ctranslate2.__version__}, {generator.compute_type}"
    channel.serve(name, lambda question: run(generator, vocabulary, question))


if __name__ == "__main__":
    main()
