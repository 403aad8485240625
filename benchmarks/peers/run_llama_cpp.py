"""The peer: llama.cpp through its Python binding's low-level calls, batched continuously as its own server does.

    python benchmarks/peers/run_llama_cpp.py --model FILE.gguf --threads N [--kv f16|f32|q8_0]

Every step takes one token of each running request, then prompt tokens up to the batch size; greedy by numpy. A shared
prefix is computed once, kept, and its cells are given to every sequence. Needs llama-cpp-python and numpy.

    request   waiting -> prompt (its tokens go in, as many as a step has room for) -> decoding -> done
    slot      a llama.cpp sequence; a request holds one from its first token to its last
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from protocol import Channel, Question, Tokens, arguments

BATCH, UBATCH, SLOTS = 2048, 512, 63
HOLDER = SLOTS  # one sequence more keeps the last shared prefix
KV = {"f32": 0, "f16": 1, "q8_0": 8}


@dataclass
class Request:
    prompt: list[int]
    new: int
    slot: int
    done: int = 0  # tokens whose keys and values are in the cache
    found: list[int] = field(default_factory=list)

    def next_tokens(self, room: int) -> list[int]:
        """What goes in next: a stretch of the prompt, or the token found last."""
        return self.prompt[self.done : self.done + room] if not self.found else self.found[-1:]


class Context:
    """One llama.cpp context with room for `cells` tokens of all its sequences together."""

    def __init__(self, model: Any, cells: int, threads: int, kv: int) -> None:
        import llama_cpp.llama_cpp as llama

        self.llama, self.cells = llama, cells
        self.held: list[int] = []
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch, settings.n_ubatch = cells, SLOTS + 1, BATCH, UBATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True  # one cache for all sequences, so that a prefix can be in several
        settings.type_k = settings.type_v = kv
        self.handle = llama.llama_init_from_model(model, settings)
        if not self.handle:
            raise SystemExit(f"llama.cpp could not make a context of {cells} cells")
        self.memory = llama.llama_get_memory(self.handle)
        self.batch = llama.llama_batch_init(BATCH, 0, 1)
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def close(self) -> None:
        self.llama.llama_batch_free(self.batch)
        self.llama.llama_free(self.handle)

    def step(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute rows of (token, position, slot, whether its next token is wanted); the wanted ones, in order."""
        import numpy as np

        batch, llama = self.batch, self.llama
        batch.n_tokens = len(rows)
        for place, (token, position, slot, wanted) in enumerate(rows):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = slot
        if code := llama.llama_decode(self.handle, batch):
            raise SystemExit(f"llama_decode failed with {code}")
        found = []
        for place, row in enumerate(rows):
            if row[3]:
                logits = llama.llama_get_logits_ith(self.handle, place)
                found.append(int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax()))
        return found

    def share(self, prefix: list[int]) -> None:
        """Put the cells of a prefix into every slot, computed in the holder's sequence unless it has them."""
        if prefix != self.held:
            self.llama.llama_memory_clear(self.memory, False)
            for start in range(0, len(prefix), BATCH):
                piece = prefix[start : start + BATCH]
                self.step([(token, start + i, HOLDER, False) for i, token in enumerate(piece)])
            self.held = prefix
        for slot in range(SLOTS):
            self.llama.llama_memory_seq_cp(self.memory, HOLDER, slot, -1, -1)

    def run(self, question: Question) -> Tokens:
        """All requests to their end; at most as many at once as there are slots."""
        shared = question.get("shared", 0)
        if shared:
            self.share(question["prompts"][0][:shared])
        waiting = list(zip(question["prompts"], question["outputs"], strict=True))[::-1]
        requests: list[Request] = []
        running: list[Request] = []
        slots = list(range(SLOTS))[::-1]
        while waiting or running:
            while waiting and slots:
                prompt, new = waiting.pop()
                request = Request(prompt=prompt, new=new, slot=slots.pop(), done=shared)
                requests.append(request)
                running.append(request)
            self.advance(running)
            for request in [r for r in running if len(r.found) == r.new]:
                running.remove(request)
                self.llama.llama_memory_seq_rm(self.memory, request.slot, -1, -1)
                if not shared:  # a slot that has lost its prefix serves nobody else
                    slots.append(request.slot)
        for slot in slots if shared else ():
            self.llama.llama_memory_seq_rm(self.memory, slot, -1, -1)
        return [request.found for request in requests]

    def advance(self, running: list[Request]) -> None:
        """One step: decodes first, then prompts in order while there is room."""
        rows: list[tuple[int, int, int, bool]] = []
        ending: list[Request] = []
        for request in sorted(running, key=lambda r: not r.found):
            tokens = request.next_tokens(BATCH - len(rows))
            last = request.done + len(tokens) >= len(request.prompt)
            for i, token in enumerate(tokens):
                rows.append((token, request.done + i, request.slot, last and i == len(tokens) - 1))
            request.done += len(tokens)
            if last and tokens:
                ending.append(request)
        for request, token in zip(ending, self.step(rows), strict=True):
            request.found.append(token)


class Engine:
    """The model, and a context that grows with the workloads."""

    def __init__(self, path: str, threads: int, kv: str) -> None:
        import llama_cpp.llama_cpp as llama

        self.quiet = llama.llama_log_callback(lambda level, text, data: None)  # kept: C holds a pointer to it
        llama.llama_log_set(self.quiet, None)
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp could not read {path}")
        self.threads, self.kv = threads, KV[kv]
        self.context: Context | None = None

    def prepare(self, question: Question) -> None:
        """A context large enough, outside the timing."""
        longest = [len(p) + n for p, n in zip(question["prompts"], question["outputs"], strict=True)]
        cells = -(-sum(sorted(longest)[-SLOTS:]) // 256) * 256 + 256
        if self.context is None or self.context.cells < cells:
            if self.context is not None:
                self.context.close()
            self.context = Context(self.model, cells, self.threads, self.kv)

    def run(self, question: Question) -> Tokens:
        assert self.context is not None
        return self.context.run(question)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--kv", default="f16", choices=KV)
    args = parser.parse_args()
    channel = Channel()

    import llama_cpp

    engine = Engine(args.model, args.threads, args.kv)
    name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), {args.kv} cache"
    channel.serve(name, engine.run, prepare=engine.prepare)


if __name__ == "__main__":
    main()
