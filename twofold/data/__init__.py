"""Text to ids, and back.

tokenizer.py   a checkpoint's tokenizer: encode, decode, end and start tokens
gguf_vocabulary.py  the tokenizer that a GGUF file describes
vocabulary.py  the bytes a token stands for, and old GPT-2 vocabularies
detokenize.py  TextStream: ids to text as they arrive, stop strings held back
chat.py        ChatTemplate: messages to prompts; special tokens come from the template alone
called.py      messages with calls, in the way in which one template reads them
speech/        what an answer says: content, reasoning and calls, told while its text arrives
sandbox.py     where templates run: jinja2's sandbox with limits on time and size
dataset.py     sources of documents: files, JSONL and named ones; which are held out
corpus.py      documents as ids on disk, made once
stdlib.py      the source "python-stdlib": the standard library as text, and what it says of itself
questions.py   the source "python-docs": that as questions and answers
functions.py   the source "python-functions": its short functions, the end of the last line left out
bpe.py         a byte-level BPE vocabulary trained on sources
pack.py        batches of whole sequences without padding; the loader's state is one integer
order.py       the order of an epoch, by seed and number
rows.py        what stands in a row: text or messages, tools
preference.py  rows that judge: preferences, and single completions with a label
prompts.py     rows that only ask: Prompt, and prompts by number
wording.py     how rows become ids, for training and rollouts alike
examples.py    prompts with completions as ids, within limits
pairs.py       batches of those: pairs, and single ones
answers.py     which tokens of a chat are the assistant's
schema.py      JSON Schema: is parsed JSON what a schema says
guard.py       special tokens that messages spell, hidden while a template runs
"""

from typing import TYPE_CHECKING, Any

from .corpus import Corpus, Split, prepare
from .dataset import SOURCES, Document, documents
from .detokenize import TextStream
from .examples import Examples, Limits, read_judged, read_preferences
from .functions import python_functions
from .prompts import Prompt, PromptLoader, Prompts, read_prompts
from .questions import common_docs, python_docs
from .stdlib import stdlib_source
from .tokenizer import Tokenizer
from .wording import Wording

if TYPE_CHECKING:
    from .chat import ChatTemplate
    from .pack import Batch, PackedLoader
    from .pairs import PairLoader, UnpairedLoader

__all__ = [
    "SOURCES",
    "Batch",
    "ChatTemplate",
    "Corpus",
    "Document",
    "Examples",
    "Limits",
    "PackedLoader",
    "PairLoader",
    "Prompt",
    "PromptLoader",
    "Prompts",
    "Split",
    "TextStream",
    "Tokenizer",
    "UnpairedLoader",
    "Wording",
    "common_docs",
    "documents",
    "prepare",
    "python_docs",
    "python_functions",
    "read_judged",
    "read_preferences",
    "read_prompts",
    "stdlib_source",
]


def __getattr__(name: str) -> Any:
    """`pack` and `pairs` alone need torch and `chat` alone jinja2, and whoever only tokenises waits for neither."""
    if name in ("Batch", "PackedLoader"):
        from . import pack

        return getattr(pack, name)
    if name in ("PairLoader", "UnpairedLoader"):
        from . import pairs

        return getattr(pairs, name)
    if name == "ChatTemplate":
        from . import chat

        return chat.ChatTemplate
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
