"""The peer: OpenVINO GenAI's continuous batching.

    python benchmarks/peers/run_openvino.py --model DIR --threads N [--compute f32|bf16] [--kv f32|f16|u8]

Its pipeline is made anew when a workload asks for prefix caching after one that did not, or the other way round. Needs
openvino-genai and numpy; the model is what make_openvino.py wrote.
"""

from __future__ import annotations

from typing import Any

from protocol import Channel, Question, Tokens, arguments

STEP = 512  # tokens of one step: of 256, 512 and 1024 the best at prefill


class Pipeline:
    def __init__(self, args: Any) -> None:
        self.args = args
        self.caching: bool | None = None
        self.pipe: Any = None

    def make(self, caching: bool) -> None:
        """Compile the model for a scheduler with or without prefix caching, unless that is what there is."""
        import openvino_genai as genai

        if caching == self.caching:
            return
        self.pipe = None  # its memory first
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs, scheduler.max_num_batched_tokens = self.args.cache_gb, 64, STEP
        scheduler.dynamic_split_fuse, scheduler.enable_prefix_caching = True, caching
        settings = {
            "INFERENCE_NUM_THREADS": self.args.threads,
            "INFERENCE_PRECISION_HINT": self.args.compute,
            "KV_CACHE_PRECISION": self.args.kv,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.pipe = genai.ContinuousBatchingPipeline(self.args.model, scheduler, "CPU", settings)
        self.caching = caching

    def run(self, question: Question) -> Tokens:
        import numpy as np
        import openvino

        prompts = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in question["prompts"]]
        answers = self.pipe.generate(prompts, [greedy(new) for new in question["outputs"]])
        return [list(answer.m_generation_ids[0]) for answer in answers]


def greedy(new: int) -> Any:
    import openvino_genai as genai

    how = genai.GenerationConfig()
    how.max_new_tokens = how.min_new_tokens = new
    how.ignore_eos, how.do_sample, how.apply_chat_template = True, False, False
    how.eos_token_id = 0
    return how


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--compute", default="f32")
    parser.add_argument("--kv", default="u8")
    parser.add_argument("--cache-gb", type=int, default=4)
    args = parser.parse_args()
    channel = Channel()

    import openvino_genai as genai

    pipeline = Pipeline(args)
    pipeline.make(False)
    name = f"openvino-genai {genai.__version__.split('-')[0]}, {args.compute} arithmetic, {args.kv} cache"
    channel.serve(name, pipeline.run, prepare=lambda question: pipeline.make(bool(question.get("caching"))))


if __name__ == "__main__":
    main()
