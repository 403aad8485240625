"""How much sooner does one stream of code come when its next tokens are guessed at?

    twofold bench speculation [--model DIR] [--draft DIR] [--head DIR] [--temperature 0.8] [--quick] [--json FILE]

Prompts are cut from the standard library's source; each is continued alone, once by every side in turn, and timed from
its first token to its last. A ratio is the time without guesses over the time with, prompt by prompt. All sides must
write the same tokens. Sides: none; ngram, and so many drafts always (fixed); suffix, in the request's own text alone,
and with the outputs of the prompts before it (shared); a draft model and a draft head, when they are given, each also
with so many drafts always (fixed).
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
import time
from pathlib import Path
from typing import Any

import limits
from turns import Spread, use_threads

from twofold import LLM, SamplingParams
from twofold.commands.model import model_dir
from twofold.engine.request import Request
from twofold.platforms import team_size

SIDES: dict[str, dict[str, Any]] = {
    "none": {},
    "ngram": {"method": "ngram"},
    "ngram fixed 4": {"method": "ngram", "adaptive": False, "num_speculative_tokens": 4, "prompt_lookup_min": 2},
    "suffix": {"method": "suffix", "suffix_decoding_max_cached_requests": 0},
    "suffix shared": {"method": "suffix"},
}
DEPTHS = 4
"""Depths whose share of right drafts is told."""


def prompts_from(llm: LLM, count: int, size: int) -> list[tuple[int, ...]]:
    """`count` pieces of `size` tokens from files of the standard library, the same on every run of one Python."""
    rng = random.Random(0)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    found = []
    for path in rng.sample([path for path in files if path.stat().st_size > 12_000], count):
        ids = llm.tokenizer.encode_prompt(path.read_text(encoding="utf-8"))
        start = rng.randrange(max(1, len(ids) - size))
        found.append(tuple(ids[start : start + size]))
    return found


def decode(llm: LLM, name: str, prompt: tuple[int, ...], params: SamplingParams) -> tuple[float, list[int], int]:
    """Seconds from the first token to the last, all tokens, and the steps that they took."""
    engine = llm.engine
    engine.submit(Request(id=name, prompt_ids=prompt, params=params))
    ids: list[int] = []
    began, steps = 0.0, 0
    while engine.has_work:
        outputs = engine.step()
        if not ids:
            began = time.perf_counter()
        else:
            steps += 1
        ids += [token.id for output in outputs for token in output.tokens]
    return time.perf_counter() - began, ids, steps


def measure(args: argparse.Namespace, sides: dict[str, dict[str, Any]], model: Path) -> dict[str, Any]:
    """Each side's ratio to none over all prompts of all rounds, each round with new engines, which know nothing yet."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    steps = dict.fromkeys(sides, 0)
    drafted, kept, drafts = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0), dict.fromkeys(sides, 0)
    depths: dict[str, list[int]] = {side: [0] * DEPTHS for side in sides}
    tokens = 0
    for turn in range(args.rounds):
        llms = {
            side: LLM(model, enable_prefix_caching=False, max_num_seqs=8, speculative=settings)
            for side, settings in sides.items()
        }
        prompts = prompts_from(llms["none"], args.prompts, args.input_len)
        for number, prompt in enumerate(prompts):
            params = SamplingParams(
                temperature=args.temperature, seed=number, max_tokens=args.output_len, ignore_eos=True
            )
            order = list(sides) if (turn + number) % 2 else list(reversed(sides))
            texts = {}
            for side in order:
                took, texts[side], done = decode(llms[side], f"{turn}-{number}", prompt, params)
                seconds[side].append(took)
                steps[side] += done
            tokens += len(texts["none"])
            wrong = [side for side in sides if texts[side] != texts["none"]]
            if wrong:
                raise SystemExit(f"{', '.join(wrong)} wrote other tokens than none: this is a bug in Twofold")
        for side, llm in llms.items():
            stats = llm.engine.stats()
            drafted[side] += stats.draft_tokens
            kept[side] += stats.accepted_tokens
            drafts[side] += stats.drafts
            depths[side] = [sum(pair) for pair in zip(depths[side], stats.accepted_per_pos)]
    return {
        side: {
            "tokens_per_second": tokens / sum(seconds[side]),
            "ratios": [none / this for none, this in zip(seconds["none"], seconds[side], strict=True)],
            "whole": sum(seconds["none"]) / sum(seconds[side]),
            "tokens_per_step": tokens / steps[side],
            "acceptance": kept[side] / drafted[side] if drafted[side] else None,
            "by_depth": [round(right / max(1, drafts[side]), 3) for right in depths[side]],
        }
        for side in sides
    }


def told(side: str, found: dict[str, Any]) -> str:
    text = f"{side:14} {found['tokens_per_second']:7,.0f} tokens/s, {found['tokens_per_step']:.2f} a step"
    if found["acceptance"] is not None:
        text += f", {found['acceptance']:.0%} of the drafts right"
        text += f" (by depth {' '.join(format(share, '.2f') for share in found['by_depth'])})"
    return f"{text}; {found['whole']:.2f} times none, by prompt {Spread.of(found['ratios']).text('times', 2)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--draft", help="a smaller checkpoint with the same tokenizer, as one more side")
    parser.add_argument("--head", help="a draft head that was trained beside the model, as one more side")
    parser.add_argument("--threads", type=int, default=team_size(), help="threads (default: as the server)")
    parser.add_argument("--prompts", type=int, default=24, help="how many prompts (default: 24)")
    parser.add_argument("--input-len", type=int, default=384, help="tokens of a prompt (default: 384)")
    parser.add_argument("--output-len", type=int, default=256, help="new tokens (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (the default)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each prompt runs (default: 3)")
    parser.add_argument("--sides", nargs="+", help=f"some of {', '.join(SIDES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="three short prompts, once: a smoke test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.rounds, args.input_len, args.output_len = 3, 1, 64, 32
    model = model_dir(args.model)
    use_threads(args.threads)
    machine = limits.measure(args.threads, quick=True)
    sides = {side: SIDES[side] for side in SIDES if side == "none" or not args.sides or side in args.sides}
    for side, method, folder in (("draft model", "draft_model", args.draft), ("draft head", "eagle", args.head)):
        if folder:
            sides[side] = {"method": method, "model": folder, "num_speculative_tokens": 6}
            sides[f"{side} fixed 4"] = {**sides[side], "adaptive": False, "num_speculative_tokens": 4}
    print(f"{model}: {args.prompts} prompts of {args.input_len}, {args.output_len} new, {args.threads} threads")
    print(limits.line(machine), flush=True)
    found = measure(args, sides, model)
    for side, each in found.items():
        print(told(side, each), flush=True)
    print("all sides wrote the same tokens")
    if args.json:
        record = {"model": model.name, "temperature": args.temperature, "limits": machine, "sides": found}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
