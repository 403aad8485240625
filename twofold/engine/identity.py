"""What makes the keys and values of a token what they are, as one digest: who shares it may share blocks on a disk.

    the weights as they lie in memory │ the decoder's spec │ the cache's layout and format │ the build of the kernels

The weights are read, not their files' names and dates: a checkpoint that was edited, quantized or exchanged under the
same path is another one, and a copy of it elsewhere is the same. That reads memory once at the start, at about a
gigabyte a second and core.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import torch
from torch import Tensor

from .. import __version__
from ..core import ConfigError
from ..kernels import native
from ..kernels.op import VARIABLE
from ..models.decoder import Decoder
from ..models.streaming import in_memory
from ..platforms import usable_cores

PIECE = 64 << 20


def identity(decoder: Decoder, cache: str) -> str:
    """The digest in hexadecimal; `cache` says what a block's bytes are.

    Raises:
        ConfigError: the weights are not in memory.
    """
    built = native.library()
    kernels = built.path.name if built is not None and decoder.device.type == "cpu" else f"torch {torch.__version__}"
    chosen = os.environ.get(VARIABLE, "")
    here = [f"twofold {__version__}", kernels, chosen, _machine(decoder.device)]
    told = [*here, cache, repr(decoder.spec), str(decoder.max_len)]
    whole = blake2b("\0".join(told).encode(), digest_size=16)
    named = [*decoder.named_parameters(), *decoder.named_buffers()]
    with ThreadPoolExecutor(usable_cores()) as threads:
        for name, tensor in in_memory(decoder, named):
            if tensor.device.type == "meta":
                raise ConfigError(
                    f"kv_offload_dir: {name} is not in memory, so what is on the disk cannot be told apart"
                )
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
            for digest in threads.map(_digest, _pieces(tensor)):
                whole.update(digest)
    return whole.hexdigest()


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().contiguous().flatten()
    yield from flat.view(torch.uint8).split(PIECE) if flat.numel() else ()


def _digest(piece: Tensor) -> bytes:
    return blake2b(piece.cpu().numpy().data, digest_size=16).digest()
