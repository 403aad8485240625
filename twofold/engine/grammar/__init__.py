"""From the form that an answer must have to masks over the vocabulary, in a process of its own.

source.py      StructuredOutputs as the grammar text that llguidance reads
tags.py        structural tags as Lark: free text with forms inside
pythonic.py    a tool's schema as the keyword arguments of a call in Python
vocabulary.py  a checkpoint's tokenizer as llguidance wants it
matchers.py    compiled grammars, where each request stands in its own, and the masks from there
messages.py    what is said to the grammar process and back
child.py       the process: lanes of work, a watchdog, a limit on memory
process.py     one run of it, and the socket to it
masks.py       the engine's end: masks for the sampler, forced tokens for the scheduler
"""
