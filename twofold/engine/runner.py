"""Runner: executes a plan, one forward of the decoder over a flat token axis, then sampling and scores.

It keeps the weights and the KV cache and nothing else: all that a step needs is in its plan.

Shapes: T tokens of the step, D hidden size, R rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from ..kernels.sample import NOTHING_LEFT
from ..models.adapters import Slots
from ..models.compile import Program, Spans, why_not
from ..models.decoder import Decoder
from .capacity import rows_at_once
from .cuda import CudaCache
from .graphs import CudaForward
from .paged import KVCache, PagedContext, Span
from .plan import Chunk, ChunkResult, Draw, Masks, StepPlan, StepResult
from .request import TokenOut
from .sampler import sample, score

CAPTURED = 256  # requests at most of a decode step that is replayed on CUDA
NOT_FINITE = "the model's numbers are not finite for this request: its weights or its dtype cannot hold them"


class Runner:
    """One decoder and one KVCache of `num_blocks` blocks, made at once, so that a lack of memory shows at the start.

    A decoder that can be compiled runs as one program, for steps of at most `tokens` tokens; another runs one kernel
    at a time, with the same bits. On CUDA the kernels are Triton's, and decode steps are replayed. `watch` is shown
    each step's hidden states [T, D].
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        tokens: int,
        kv_dtype: torch.dtype | None = None,
        slots: Slots | None = None,
        watch: Callable[[StepPlan, StepResult, Tensor], None] | None = None,
    ) -> None:
        self.decoder, self.watch = decoder, watch
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.tokens = tokens
        self.kv_dtype = kv_dtype or decoder.dtype
        self.slots = slots
        self.cache: KVCache | CudaCache | None = None
        self.program: Program | None = None
        self.cuda: CudaForward | None = None
        self.compilations = 0
        self._written: tuple[object, ...] = ()
        self.wake()

    def wake(self) -> None:
        """Take the memory of the KV cache; its content starts empty."""
        if self.cache is None:
            decoder = self.decoder
            kind = CudaCache if CudaCache.serves(decoder.device) else KVCache
            self.cache = kind(decoder.spec, self.num_blocks, self.block_size, self.kv_dtype, decoder.device)
            self.compile()

    def compile(self) -> None:
        """Write the decoder's program: at the start, and anew when its weights lie elsewhere than when it was written.

        A program reads weights where they are, so one that was written for the same places is as good as a new one.
        """
        if self.slots is not None:
            self.slots.attach(self.decoder)
        places = (why_not(self.decoder), *_places(self.decoder)) if self.cache is not None else ()
        if places == self._written:
            return
        self.program, self.cuda, self._written = None, None, ()
        if isinstance(self.cache, CudaCache):
            self.cuda = CudaForward(
                self.decoder, self.cache, rows=min(self.tokens, CAPTURED), max_len=self.decoder.max_len
            )
        elif self.cache is not None and self.cache.panels and not why_not(self.decoder):
            caches = [self.cache.panels_of(i).struct() for i in range(len(self.cache.layers))]
            self.program = Program(self.decoder, caches, tokens=self.tokens, rows=self._rows_at_once)
        self._written = places
        self.compilations += 1

    @property
    def layers(self) -> list[dict[str, Tensor]]:
        """The parts of each layer of the cache as it is now; none while it sleeps."""
        return self.cache.layers if self.cache is not None else []

    def sleep(self) -> None:
        """Give the memory of the KV cache back, and what a step works in."""
        self.cache = self.program = self.cuda = None
        self._written = ()

    @torch.inference_mode()
    def execute(self, plan: StepPlan, masks: Masks | None = None) -> StepResult:
        """Run the plan's tokens and answer each of its chunks; `masks` is asked when the forward pass is done."""
        assert self.cache is not None, "the engine does not step while it sleeps"
        chunks = plan.chunks
        if plan.copies:
            self.cache.copy(plan.copies)
        hidden_TD = self._forward(chunks, self.cache)
        broken = self._broken(chunks, hidden_TD, self.cache)
        drawn = self._draw(chunks, hidden_TD, broken, masks() if masks is not None else {})
        rows, at = [], 0
        for number, chunk in enumerate(chunks):
            if number in broken:
                rows.append(self._failed(chunk))
            else:
                tokens = agreed(chunk.drafts, drawn[number])
                error = tokens if isinstance(tokens, str) else None
                scores = () if error else self._score(chunk, at, hidden_TD)
                said = () if isinstance(tokens, str) else tokens
                param = blame(chunk.draws[0]) if error == NOTHING_LEFT else None
                thoughts = self._think(chunk, at, said, hidden_TD)
                rows.append(
                    ChunkResult(
                        serial=chunk.serial, tokens=said, scores=scores, thoughts=thoughts, error=error, param=param
                    )
                )
            at += len(chunk.ids)
        result = StepResult(step=plan.step, rows=tuple(rows))
        if self.watch is not None:
            self.watch(plan, result, hidden_TD)
        return result

    def _failed(self, chunk: Chunk) -> ChunkResult:
        """The answer to a chunk with numbers that are not finite: when they may be a wrong guess's, try without."""
        if chunk.drafts:
            return ChunkResult(serial=chunk.serial, redo=chunk.start // self.block_size * self.block_size)
        return ChunkResult(serial=chunk.serial, error=NOT_FINITE)

    def _forward(self, chunks: tuple[Chunk, ...], cache: KVCache | CudaCache) -> Tensor:
        """Hidden states [T, D] of the plan's tokens."""
        slots = [chunk.adapter for chunk in chunks]
        if self.program is None and self.slots is not None and any(slots):
            with self.slots.step(self.decoder, [len(chunk.ids) for chunk in chunks], slots):
                return self._base(chunks, cache, slots)
        return self._base(chunks, cache, slots)

    def _base(self, chunks: tuple[Chunk, ...], cache: KVCache | CudaCache, slots: list[int]) -> Tensor:
        if self.cuda is not None:
            return self.cuda(chunks, captured=not any(slots))
        assert isinstance(cache, KVCache)
        ids = [token for chunk in chunks for token in chunk.ids]
        if self.program is not None:
            counts = [len(chunk.ids) for chunk in chunks]
            starts, blocks = [chunk.start for chunk in chunks], [chunk.blocks for chunk in chunks]
            return self.program.run(Spans(ids=ids, starts=starts, counts=counts, blocks=blocks, slots=slots))
        spans = [Span(chunk.start, len(chunk.ids), chunk.blocks) for chunk in chunks]
        hidden_TD: Tensor = self.decoder(torch.tensor(ids, device=self.decoder.device), PagedContext(cache, spans))
        return hidden_TD

    def _logits(self, wanted: list[int], hidden_TD: Tensor) -> Tensor:
        """Logits [R, V] of some of the step's tokens, good until the next call."""
        if self.program is not None:
            return self.program.logits(wanted)
        return self.decoder.logits(hidden_TD[wanted])

    def _broken(self, chunks: tuple[Chunk, ...], hidden_TD: Tensor, cache: KVCache | CudaCache) -> set[int]:
        """Chunks with a number that is not finite. What they wrote is zeroed, for whoever has the blocks next.

        A token's key and value reach its own hidden state, so looking at these finds bad ones before anybody shares
        them. Only this request holds the blocks it wrote to: shared blocks are full.
        """
        if self.program is not None:
            good_T = self.program.finite()
        else:
            good_T = bytes(torch.isfinite(hidden_TD).all(-1).tolist())
        broken: set[int] = set()
        if 0 not in good_T:
            return broken
        at = 0
        for number, chunk in enumerate(chunks):
            count = len(chunk.ids)
            if 0 in good_T[at : at + count]:
                broken.add(number)
                cache.clear(chunk.blocks[chunk.start // self.block_size :])
            at += count
        return broken

    def _draw(
        self, chunks: tuple[Chunk, ...], hidden_TD: Tensor, broken: set[int], masks: Mapping[int, Sequence[bytes]]
    ) -> list[list[TokenOut | str]]:
        """What each chunk's draws choose, or why one has nothing to choose from; one with masks makes that many."""
        wanted: list[int] = []
        draws: list[Draw] = []
        allowed: list[bytes | None] = []
        counts: list[int] = []
        at = 0
        for number, chunk in enumerate(chunks):
            at += len(chunk.ids)
            mine = () if number in broken else masks.get(chunk.serial, (None,) * len(chunk.draws))
            counts.append(min(len(mine), len(chunk.draws)))
            wanted += range(at - len(chunk.draws), at - len(chunk.draws) + counts[-1])
            draws += chunk.draws[: counts[-1]]
            allowed += mine[: counts[-1]]
        out: list[TokenOut | str] = []
        rows = self._rows_at_once
        for start in range(0, len(draws), rows):
            now = slice(start, start + rows)
            out += sample(self._logits(wanted[now], hidden_TD), draws[now], allowed[now])
        chosen = iter(out)
        return [list(islice(chosen, count)) for count in counts]

    def _score(self, chunk: Chunk, at: int, hidden_TD: Tensor) -> tuple[TokenOut, ...]:
        """Scores of the prompt tokens that follow the first tokens of a chunk, which begins `at` the step's tokens."""
        return self._scored(range(at, at + len(chunk.targets)), chunk.targets, chunk.num_top, hidden_TD)

    def _think(self, chunk: Chunk, at: int, drawn: tuple[TokenOut, ...], hidden_TD: Tensor) -> tuple[TokenOut, ...]:
        """What the model itself thinks of each way in which a beam may go on, where the caller asked."""
        if not drawn or not chunk.draws[0].beams:
            return ()
        params = chunk.draws[0].params
        if params.logprobs is None or params.logprobs_mode == "processed":
            return ()
        ids = [token for token, _ in drawn[0].top]
        return self._scored([at + len(chunk.ids) - 1] * len(ids), ids, params.logprobs, hidden_TD)

    def _scored(
        self, places: Sequence[int], targets: Sequence[int], num_top: int, hidden_TD: Tensor
    ) -> tuple[TokenOut, ...]:
        out: list[TokenOut] = []
        rows = self._rows_at_once
        for start in range(0, len(targets), rows):
            tile = slice(start, start + rows)
            out += score(self._logits(list(places[tile]), hidden_TD), targets[tile], num_top)
        return tuple(out)

    @property
    def _rows_at_once(self) -> int:
        return rows_at_once(self.tokens, self.decoder.spec.vocab)


def blame(draw: Draw) -> str:
    """The field that leaves no token to choose."""
    return "allowed_token_ids" if draw.params.structured_outputs is None else "structured_outputs"


def agreed(drafts: Sequence[int], drawn: Sequence[TokenOut | str]) -> tuple[TokenOut, ...] | str:
    """The tokens drawn up to the first that is not its draft, since what follows that one followed a wrong guess.

    A draw that failed ends them too: it will fail again when it is the next token's, and alone then.
    """
    tokens: list[TokenOut] = []
    for place, token in enumerate(drawn):
        if isinstance(token, str):
            return tuple(tokens) if tokens else token
        tokens.append(token)
        if place < len(drafts) and token.id != drafts[place]:
            break
    return tuple(tokens)


def _places(decoder: Decoder) -> Iterator[object]:
    """What a program is written for: the decoder's modules, and where each tensor lies in which shape."""
    for name, module in decoder.named_modules():
        yield name
        yield type(module)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
