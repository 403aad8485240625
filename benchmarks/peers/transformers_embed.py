"""The peer: transformers' encoder on right-padded static batches, the mean of each text's tokens, normalised.

    python benchmarks/peers/transformers_embed.py --model DIR --threads N

Asked for "texts", lists of ids, in batches of "batch", in the order they come or "sorted" by length, as
sentence-transformers sorts them. Answers with "tokens", which are the vectors. Needs torch and transformers.
"""

from __future__ import annotations

import os
from typing import Any

from protocol import Channel, Question, arguments


def main() -> None:
    args = arguments(__doc__).parse_args()
    channel = Channel()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import torch
    import transformers
    from transformers import AutoModel

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    model = AutoModel.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    name = f"transformers {transformers.__version__}, torch {torch.__version__}, static batches"
    channel.serve(name, lambda question: run(model, question))


def run(model: Any, question: Question) -> list[list[float]]:
    """A vector of each text, in the order of the texts."""
    import torch

    texts, batch = question["texts"], question["batch"]
    places = list(range(len(texts)))
    if question["order"] == "sorted":
        places.sort(key=lambda i: -len(texts[i]))
    found: list[list[float]] = [[] for _ in texts]
    with torch.inference_mode():
        for start in range(0, len(places), batch):
            chosen = places[start : start + batch]
            width = max(len(texts[i]) for i in chosen)
            ids = torch.zeros(len(chosen), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, : len(texts[i])] = torch.tensor(texts[i])
                mask[row, : len(texts[i])] = 1
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            for i, vector in zip(chosen, torch.nn.functional.normalize(mean, dim=-1).tolist(), strict=True):
                found[i] = vector
    return found


if __name__ == "__main__":
    main()
