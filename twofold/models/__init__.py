"""One decoder, many families.

spec.py      what a model is, as plain values
context.py   the one thing the decoder asks of the world around it
packed.py    the context of whole sequences
rope.py      the angle of each position
decoder.py   the model
"""

from .context import AttnContext
from .decoder import Decoder
from .packed import PackedContext
from .spec import LayerSpec, ModelSpec

__all__ = ["AttnContext", "Decoder", "LayerSpec", "ModelSpec", "PackedContext"]
