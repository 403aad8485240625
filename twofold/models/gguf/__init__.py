"""GGUF files (llama.cpp's): read as the Hugging Face checkpoint that they were made from.

    model.gguf ── file.py ──▶ metadata, tensors ─┬─ config.py ───▶ config.json
                                                 ├─ tensors.py ──▶ names and layouts of the checkpoint
                                                 └─ unfold.py ───▶ a folder with both, the tokenizer, and the file

file.py     the file: header, metadata, where tensors lie
config.py   metadata to config.json's contents
tensors.py  tensors by their checkpoint's names, rows put back
unfold.py   a folder that stands for a file
"""

from .file import GgufFile
from .tensors import GgufShard
from .unfold import folder_of, unfolded

__all__ = ["GgufFile", "GgufShard", "folder_of", "unfolded"]
