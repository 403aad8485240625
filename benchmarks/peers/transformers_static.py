"""The peer: transformers' `generate` on left-padded static batches, driven through standard input and output.

    python benchmarks/peers/transformers_static.py --model DIR --threads N

Reads one JSON object a line, {"prompts": [[id]], "outputs": [n], "batch": size, "order": "arrival" | "sorted"}, and
answers {"seconds": s, "tokens": [[id]]}. A batch runs until its longest output is done, as static batching must; each
request keeps as many tokens as it asked for. "sorted" puts requests of like output length together, which needs the
lengths beforehand. Needs torch and transformers, nothing of Twofold, so it may live in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.generation_config = GenerationConfig(pad_token_id=0)  # nothing of the checkpoint's own: no EOS, no penalties
    answer({"ready": f"transformers {transformers.__version__}, torch {torch.__version__}"})
    for line in sys.stdin:
        ask = json.loads(line)
        start = time.perf_counter()
        tokens = run(model, ask["prompts"], ask["outputs"], ask["batch"], ask["order"])
        answer({"seconds": time.perf_counter() - start, "tokens": tokens})


def answer(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def run(model: Any, prompts: list[list[int]], outputs: list[int], batch: int, order: str) -> list[list[int]]:
    """All requests in batches of `batch`; the new tokens of each request, in the order of the requests."""
    places = list(range(len(prompts)))
    if order == "sorted":
        places.sort(key=lambda i: (outputs[i], len(prompts[i])))
    found: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(places), batch):
        chosen = places[start : start + batch]
        rows = generate(model, [prompts[i] for i in chosen], max(outputs[i] for i in chosen))
        for i, row in zip(chosen, rows, strict=True):
            found[i] = row[: outputs[i]]
    return found


def generate(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """`new` greedy tokens for each prompt of one left-padded batch, EOS ignored."""
    import torch
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    how = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, use_cache=True)
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
    rows: list[list[int]] = out[:, width:].tolist()
    return rows


if __name__ == "__main__":
    main()
