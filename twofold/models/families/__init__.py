"""Families: each reads its config.json into a ModelSpec; none has a forward of its own.

registry.py    the tables of architectures: causal models, and encoders
labels.py      how many labels a score head has
rope.py        rotary settings in every spelling
llama.py       Llama, Mistral, Granite, and the names that most families share
qwen.py        Qwen2, Qwen3 and their mixtures of experts
mixtral.py     Mixtral
ernie.py       ERNIE 4.5, the mixtures
gemma.py       Gemma 1, 2 and 3 (text)
phi.py         Phi 1 and 2, Phi-3 and Phi-4
gpt.py         GPT-2, GPT-J, GPT-NeoX
opt.py         OPT, the 350m with its projections included
bloom.py       BLOOM
falcon.py      Falcon 7B, 40B, 180B, 11B, RW
stablelm.py    StableLM
starcoder2.py  StarCoder 2
olmo.py        OLMo 1 and 2
cohere.py      Command R
bert.py        BERT, RoBERTa and XLM-RoBERTa: encoders
modernbert.py  ModernBERT: an encoder
eagle.py       draft heads
"""

from . import (
    bert,
    bloom,
    cohere,
    eagle,
    ernie,
    falcon,
    gemma,
    gpt,
    llama,
    mixtral,
    modernbert,
    olmo,
    opt,
    phi,
    qwen,
    stablelm,
    starcoder2,
)
from .registry import ENCODERS, FAMILIES, HEADLESS, Family, encoder, family

__all__ = [
    "ENCODERS",
    "FAMILIES",
    "HEADLESS",
    "Family",
    "bert",
    "bloom",
    "cohere",
    "eagle",
    "encoder",
    "ernie",
    "falcon",
    "family",
    "gemma",
    "gpt",
    "llama",
    "mixtral",
    "modernbert",
    "olmo",
    "opt",
    "phi",
    "qwen",
    "stablelm",
    "starcoder2",
]
