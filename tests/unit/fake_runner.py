"""A runner without a model: it keeps tokens where keys and values would be, and answers with a hash of what it reads.

A next token depends on the whole history as found in the blocks, so a block that was shared, evicted, overwritten or
skipped wrongly changes the text. What the text must be is known without any engine: `expected`.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from twofold.engine.blocks import BlockPool
from twofold.engine.limits import Limits
from twofold.engine.plan import ChunkResult, StepPlan, StepResult
from twofold.engine.request import Output, Request, TokenOut
from twofold.engine.sampling import SamplingParams
from twofold.engine.scheduler import Scheduler
from twofold.engine.tiers import Tiers

VOCAB = 97


def next_token(history: list[int]) -> int:
    return int.from_bytes(blake2b(repr(history).encode(), digest_size=4).digest(), "little") % VOCAB


def expected(prompt: tuple[int, ...], count: int) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history))
    return history[len(prompt) :]


def options(history: list[int], count: int) -> tuple[tuple[int, float], ...]:
    """What may follow, best first, as a beam's row is told: no two values alike."""
    digest = blake2b(repr(("beam", history)).encode(), digest_size=64).digest()
    ranked = sorted(
        {(-(byte + place / 64) / 50 - 0.1, byte % VOCAB) for place, byte in enumerate(digest)}, reverse=True
    )
    best = dict[int, float]()
    for value, token in ranked:
        best.setdefault(token, value)
    return tuple(best.items())[:count]


class FakeRunner:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size = block_size
        self.slots: list[int | None] = [None] * (num_blocks * block_size)
        self.computed = 0

    def slot(self, blocks: tuple[int, ...], position: int) -> int:
        return blocks[position // self.size] * self.size + position % self.size

    def execute(self, plan: StepPlan) -> StepResult:
        rows = []
        read = [self.slots[a * self.size : (a + 1) * self.size] for a, _ in plan.copies]
        for (_, to), content in zip(plan.copies, read):
            self.slots[to * self.size : (to + 1) * self.size] = content
        for chunk in plan.chunks:
            for place, token in enumerate(chunk.ids, chunk.start):
                self.slots[self.slot(chunk.blocks, place)] = token
        for chunk in plan.chunks:
            self.computed += len(chunk.ids)
            stop = chunk.start + len(chunk.ids)
            history = [self.slots[self.slot(chunk.blocks, place)] for place in range(stop)]
            tokens: list[TokenOut] = []
            first = stop - len(chunk.draws) + 1
            for known, draw in enumerate(chunk.draws, first):
                assert draw.position == known
                if tokens and tokens[-1].id != history[known - 1]:
                    break
                top = options(history[:known], draw.beams)
                tokens.append(TokenOut(top[0][0] if top else next_token(history[:known]), top=top))
            scores = tuple(TokenOut(target) for target in chunk.targets)
            rows.append(ChunkResult(serial=chunk.serial, tokens=tuple(tokens), scores=scores))
        return StepResult(step=plan.step, rows=tuple(rows))


class FakeContents:
    """A block's tokens as its bytes; a slot that was never written is -1."""

    def __init__(self, runner: FakeRunner) -> None:
        self.runner = runner
        self.nbytes = 4 * runner.size

    def save(self, blocks):
        size = self.runner.size
        rows = [self.runner.slots[block * size : (block + 1) * size] for block in blocks]
        return [memoryview(array("i", [-1 if s is None else s for s in row])).cast("B") for row in rows]

    def restore(self, blocks, contents):
        size = self.runner.size
        for block, content in zip(blocks, contents, strict=True):
            self.runner.slots[block * size : (block + 1) * size] = content.cast("i").tolist()


class Bench:
    """A scheduler, a pool and the fake runner, with what came out collected by request id."""

    def __init__(
        self,
        *,
        num_blocks=64,
        block_size=4,
        max_model_len=200,
        caching=True,
        max_num_seqs=8,
        budget=32,
        tiers=(),
        patience=5.0,
        **kw,
    ):
        self.pool = BlockPool(num_blocks, block_size, caching=caching)
        limits = Limits(
            max_model_len=max_model_len,
            vocab=VOCAB,
            cache_tokens=num_blocks * block_size,
            block_size=block_size,
            max_seqs=max_num_seqs,
        )
        self.runner = FakeRunner(num_blocks, block_size)
        self.tiers = None
        if tiers:
            clock = {"clock": kw["clock"]} if "clock" in kw else {}
            self.tiers = Tiers(self.pool, FakeContents(self.runner), tiers, patience=patience, **clock)
        self.scheduler = Scheduler(
            self.pool,
            limits,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            tiers=self.tiers,
            **kw,
        )
        self.outputs: dict[str, list[Output]] = {}

    def submit(self, request: Request) -> Request:
        self.scheduler.submit(request)
        return request

    def step(self) -> StepPlan:
        self.scheduler.expire()
        plan = self.scheduler.plan()
        self.flush()
        self.scheduler.apply(self.runner.execute(plan))
        self.flush()
        self.collect()
        return plan

    def flush(self) -> None:
        if self.tiers is not None:
            self.tiers.flush()

    def collect(self) -> None:
        for output in self.scheduler.take():
            self.outputs.setdefault(output.request_id, []).append(output)

    def drain(self, limit: int = 2000) -> int:
        steps = 0
        while self.scheduler.has_work:
            self.step()
            self.scheduler.check_integrity()
            steps += 1
            assert steps < limit, "the scheduler does not get done"
        assert self.pool.used == 0
        return steps

    def tokens(self, request_id: str) -> list[int]:
        return [token.id for output in self.outputs[request_id] for token in output.tokens]

    def finish(self, request_id: str):
        ends = [output.finish for output in self.outputs[request_id] if output.finish]
        assert len(ends) == 1, f"{request_id} ended {len(ends)} times"
        return ends[0]


def ask(name, prompt, max_tokens=5, *, priority=0, deadline=None, salt="", output=(), **params):
    return Request(
        id=name,
        prompt_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        priority=priority,
        deadline=deadline,
        salt=salt,
        output_ids=list(output),
    )
