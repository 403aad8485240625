"""init_inference: a transformers model whose operations are swapped for ours, in place.

door.py       init_inference, and the engine it returns
config.py     its settings, under DeepSpeed's names
swap.py       which module may be replaced by what
proof.py      a replacement shows on the module itself that it gives the same
joined.py     products that read the same input, done as one
gated.py      gated feed-forwards and norms
attention.py  attention and rotary positions inside a module's own forward
reading.py    what an attention mask says, as spans
cut.py        tensor parallelism of what was replaced
report.py     what was replaced, and why the rest was not

transformers is never imported: modules are known by what they hold, and each replacement is proven on the module it
replaces. After DeepSpeed-Inference (Aminabadi et al. 2022), whose list of architectures this does without.
"""

from .config import InferenceConfig
from .door import InferenceEngine, init_inference

__all__ = ["InferenceConfig", "InferenceEngine", "init_inference"]
