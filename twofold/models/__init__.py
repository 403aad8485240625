"""One decoder, many families.

spec.py      what a model is, as plain values
context.py   the one thing the decoder asks of the world around it
packed.py    the context of whole sequences
rope.py      the angle of each position
decoder.py   the model
tensors.py   its matrices, tables and norms
scoring.py   score heads: reward models and critics
draft_head.py  heads that guess the hidden states of another model
memory.py    memory for what was built without
compile.py   Program: a decoder as one list of stages for the CPU kernels
write.py     how a decoder's layers are written as stages
beside.py    the stages of its adapters
working.py   the memory that a program works in, and its bytes
cuts.py      how tensor parallel ranks divide a model, and whether they can
parallel.py  one tensor parallel rank's part of a decoder
sequence.py  the contexts of a part of every sequence: Ulysses and ring
ring.py      attention whose keys and values go round the ranks
fused.py     its forward on CUDA, with fewer passes over memory
reader.py    config.json with a memory: what nobody reads is an error
gguf/        GGUF files, read as the checkpoints that they were made from
families/    config.json to spec, one short file for each family
layout.py    where each tensor of a checkpoint lies in the decoder
filler.py    tensors put into their places one at a time, and what is still missing
inject/      init_inference: a transformers model whose operations are swapped for ours
lora.py      low-rank adapters beside a decoder's frozen weights
lora_config.py  their settings
adapters.py  many adapters beside a served decoder, in slots
peft.py      adapters on disk, as PEFT has them
seeds.py     random numbers by a tensor's name
quantized.py which weights may be quantized, and the decoder with panels in their places
calibration.py  a decoder as calibration sees it: blocks, weights, where scales can move
exchange.py  a decoder whose experts are divided among ranks
shards.py    safetensors through a memory map
sections.py  a decoder's tensors as one file has them, a layer after another
streaming.py layers that pass through a few buffers, read ahead from that file
streamed.py  the file made of a checkpoint, and a decoder over it
weights.py   load, save, and weights by the checkpoint's names
sentences.py how a checkpoint makes one vector of a text
whole.py     a checkpoint's directory as parameters, one whole at a time
"""

from .context import AttnContext
from .decoder import Decoder
from .lora_config import LoraConfig
from .packed import PackedContext
from .peft import load_adapter, save_adapter
from .spec import LayerSpec, ModelSpec
from .weights import decoder_tensors, load, load_tensors, read_config, read_formats, read_spec, save, spec_from

__all__ = [
    "AttnContext",
    "Decoder",
    "LayerSpec",
    "LoraConfig",
    "ModelSpec",
    "PackedContext",
    "decoder_tensors",
    "load",
    "load_adapter",
    "load_tensors",
    "read_config",
    "read_formats",
    "read_spec",
    "save",
    "save_adapter",
    "spec_from",
]
