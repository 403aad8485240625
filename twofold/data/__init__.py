"""Text to ids, and back.

tokenizer.py   a checkpoint's tokenizer: encode, decode, end and start tokens
vocabulary.py  the bytes a token stands for, and old GPT-2 vocabularies
detokenize.py  TextStream: ids to text as they arrive, stop strings held back
chat.py        ChatTemplate: messages to prompts; special tokens come from the template alone
sandbox.py     where templates run: jinja2's sandbox with limits on time and size
"""

from .chat import ChatTemplate
from .detokenize import TextStream
from .tokenizer import Tokenizer

__all__ = ["ChatTemplate", "TextStream", "Tokenizer"]
