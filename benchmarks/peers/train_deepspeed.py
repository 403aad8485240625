"""The peer: DeepSpeed around transformers' model, a rank of it, at ZeRO 1, 2 or 3.

    python benchmarks/peers/train_deepspeed.py --model DIR --threads N --length L --micro B --stage 1|2|3

The rule is torch's fused AdamW, as for the others; what is not said here is at DeepSpeed's default. Needs deepspeed,
torch and transformers.
"""

from __future__ import annotations

import os

from protocol import Channel
from training import CLIP, Turns, arguments, causal_model, mine, optimizer, versions


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--stage", type=int, required=True, choices=(1, 2, 3))
    args = parser.parse_args()
    turns = Turns(Channel())
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    model = causal_model(args)
    settings = {
        "train_micro_batch_size_per_gpu": args.micro,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": args.stage},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=settings)
    turns.ready(f"ZeRO {args.stage}, {versions('deepspeed', 'torch', 'transformers')}")
    while turns.wanted():
        ids = mine(args, turns.step)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        turns.done(float(loss.detach()))


if __name__ == "__main__":
    main()
