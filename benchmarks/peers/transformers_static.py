"""The peer: transformers' `generate` on left-padded static batches.

    python benchmarks/peers/transformers_static.py --model DIR --threads N [--dtype float32|bfloat16]

Asked as protocol.py says, and for "batch", requests at a time (default 16), "order", "arrival" or "sorted", and
"beams", the width of a beam search (default 1: greedy). A batch runs until its longest output is done, as static
batching must; each request keeps as many tokens as it asked for. "sorted" puts requests of like output length together,
which needs the lengths beforehand. A shared prefix is computed once, kept, and copied for each request, as a user of
transformers would by hand. Needs torch and transformers.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from protocol import Channel, Question, Tokens, arguments


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    channel = Channel()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config = GenerationConfig(pad_token_id=0)  # nothing of the checkpoint's own: no EOS, no penalties
    name = f"transformers {transformers.__version__}, torch {torch.__version__}, static batches"
    channel.serve(name, lambda question: run(model, question))


def run(model: Any, question: Question) -> Tokens:
    """All requests in batches; the new tokens of each request, in the order of the requests."""
    prompts, outputs = question["prompts"], question["outputs"]
    places = list(range(len(prompts)))
    if question.get("order") == "sorted":
        places.sort(key=lambda i: (outputs[i], len(prompts[i])))
    found: Tokens = [[] for _ in prompts]
    batch = question.get("batch", 16)
    for start in range(0, len(places), batch):
        chosen = places[start : start + batch]
        new, shared = max(outputs[i] for i in chosen), question.get("shared", 0)
        rows = generate(model, [prompts[i] for i in chosen], new, shared, question.get("beams", 1))
        for i, row in zip(chosen, rows, strict=True):
            found[i] = row[: outputs[i]]
    return found


def generate(model: Any, prompts: Tokens, new: int, shared: int, beams: int) -> Tokens:
    """`new` greedy tokens for each prompt of one left-padded batch, or its best of so many beams; EOS ignored."""
    import torch
    from transformers import GenerationConfig

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    how = GenerationConfig(max_new_tokens=new, do_sample=False, num_beams=beams, pad_token_id=0, use_cache=True)
    with torch.inference_mode():
        more = {"past_key_values": prefix_cache(model, prompts[0][:shared], len(prompts))} if shared else {}
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=how, **more)
    rows: Tokens = out[:, width:].tolist()
    return rows


LAST: dict[tuple[int, ...], Any] = {}


def prefix_cache(model: Any, prefix: list[int], copies: int) -> Any:
    """A cache that holds a prefix for each of a batch; the last prefix's is kept for the next time."""
    import torch
    from transformers import DynamicCache

    key = tuple(prefix)
    if key not in LAST:
        LAST.clear()
        LAST[key] = DynamicCache(config=model.config)
        ids = torch.tensor([prefix])
        model(input_ids=ids, past_key_values=LAST[key], use_cache=True, logits_to_keep=1)
    cache = copy.deepcopy(LAST[key])
    cache.batch_repeat_interleave(copies)
    return cache


if __name__ == "__main__":
    main()
