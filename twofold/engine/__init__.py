"""Requests become tokens.

What is asked
request.py      Request, its states, and Output
sampling.py     SamplingParams, what a caller may ask of the sampler
structured.py   StructuredOutputs, the form that an answer must have
words.py        bad words as token sequences
vectors.py      what may be asked of a text besides its continuation, and the numbers that come
defaults.py     what a checkpoint asks of its sampler

What fits
config.py       EngineConfig, every dial
kinds.py        what an engine is to be for a checkpoint: generating, pooling
limits.py       what a request may be on this engine
capacity.py     the sum of bytes: what fits this machine
gentler.py      settings that need less
opening.py      a checkpoint's decoder, whole in memory or with streamed layers
around.py       what the settings want around an engine

What is kept
blocks.py       BlockPool: who holds which block, and the prefix cache
promises.py     which blocks can be found, or will be soon, and by whom
tiers.py        blocks of the cache beyond the pool, found by name again
disk_tier.py    those in files, which outlive the process
contents.py     a block's bytes out of the cache and into it
identity.py     what makes keys and values what they are, as one digest
waste.py        how much of the cache that is allocated holds nothing

What is computed next
row.py          what the scheduler keeps beside a request
deadlines.py    whose time is over
beams.py        beam search: rows that share blocks, one request outside
gate.py         what a row's grammar says of its next tokens
grammar/        from such a form to masks, in a process of its own
adapters.py     which adapters there are, in memory and in slots
scheduler.py    Scheduler: which tokens go into the next step
plan.py         StepPlan and StepResult, what passes between scheduler and runner

Guesses, computed several at a time
proposer.py     Proposer: who guesses at the next tokens
lookup.py       guesses found in text: n-grams, suffixes
draft.py        guesses of a smaller model
eagle.py        guesses of a head that goes on with the model's hidden states
pace.py         how many tokens to guess at
speculation.py  a proposer, its pace, and what came of it

A step
runner.py       Runner: executes a plan
paged.py        KVCache, and attention over block tables
cuda.py         the cache and the context on CUDA
graphs.py       decode steps captured once and replayed
sampler.py      from logits to tokens

Texts that are read and not continued
pooling.py      PoolingEngine: texts become vectors and scores, alone or beside generation
whole.py        a decoder over whole texts, without a cache
pooler.py       from hidden states to vectors and scores
embedding.py    LLM's embed, classify and score

All of it
engine.py       Engine: submit, abort, step, load_weights, sleep
llm.py          LLM: texts in, texts out, in this process
stats.py        EngineStats, gauges and counters
facts.py        what an engine alone knows of a request: why it waited, how its guesses went
wire.py         frames to an engine in a process of its own, and a Request on its way there
"""
