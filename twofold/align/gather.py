"""gather: the weights that a trainer's ranks hold between them, one whole tensor at a time, for who sends them on.

rank 0   rows of a, b, c ──┐
rank 1   rows of a, b, c ──┼──▶ a, then b, then c ──▶ buckets ──▶ generator
rank 2   rows of a, b, c ──┘    no rank ever has the model, whatever divided it: ZeRO, tensor, pipeline, expert
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..models.decoder import Decoder
from ..models.spec import ModelSpec
from ..models.weights import plan_files
from ..parallel import Mesh
from ..parallel.messages import everyone
from ..train.courier import Courier
from ..train.pieces import Pieces, divide, table


def gathered(
    pieces: Pieces, spec: ModelSpec, dtype: torch.dtype, mesh: Mesh, to: Sequence[int] = (0,)
) -> Iterator[tuple[str, Tensor]]:
    """The weights by the checkpoint's names, in the decoder's order, on the ranks `to`; the others give theirs.

    `pieces` is `train.state.weight_pieces`, `spec` the whole model's. A collective: every rank exhausts or closes it,
    also who is not in `to` and sees nothing.
    """
    group, rank = mesh.group("world"), mesh.rank_in_world
    courier = Courier(pieces, divide(everyone(table(pieces), group)), rank, group)
    (items,) = plan_files(Decoder(spec, dtype=dtype, device="meta"), 2**62, courier.whole).values()
    courier.send([(item.source, writer) for item in items for writer in to])
    try:
        for item in items if rank in to else ():
            yield item.name, item.values()
    finally:
        courier.finish()
