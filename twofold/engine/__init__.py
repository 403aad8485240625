"""Requests become tokens.

request.py      Request, its states, and Output
sampling.py     SamplingParams, what a caller may ask of the sampler
structured.py   StructuredOutputs, the form that an answer must have
grammar/        from such a form to masks, in a process of its own
config.py       EngineConfig, every dial
facts.py        what an engine alone knows of a request: why it waited, how its guesses went
limits.py       what a request may be on this engine
capacity.py     the sum of bytes: what fits this machine
gentler.py      settings that need less
opening.py      a checkpoint's decoder, whole in memory or with streamed layers
words.py        bad words as token sequences
blocks.py       BlockPool: who holds which block, and the prefix cache
adapters.py     which adapters there are, in memory and in slots
gate.py         what a row's grammar says of its next tokens
row.py          what the scheduler keeps beside a request
deadlines.py    whose time is over
tiers.py        blocks of the cache beyond the pool, found by name again
disk_tier.py    those in files, which outlive the process
contents.py     a block's bytes out of the cache and into it
identity.py     what makes keys and values what they are, as one digest
promises.py     which blocks can be found, or will be soon, and by whom
proposer.py     Proposer: who guesses at the next tokens
lookup.py       guesses found in text: n-grams, suffixes
draft.py        guesses of a smaller model
eagle.py        guesses of a head that goes on with the model's hidden states
pace.py         how many tokens to guess at
speculation.py  a proposer, its pace, and what came of it
beams.py        beam search: rows that share blocks, one request outside
scheduler.py    Scheduler: which tokens go into the next step
plan.py         StepPlan and StepResult, what passes between scheduler and runner
paged.py        KVCache, and attention over block tables
cuda.py         the cache and the context on CUDA
graphs.py       decode steps captured once and replayed
runner.py       Runner: executes a plan
sampler.py      from logits to tokens
waste.py        how much of the cache that is allocated holds nothing
stats.py        EngineStats, gauges and counters
kinds.py        what an engine is to be for a checkpoint: generating, pooling
vectors.py      what may be asked of a text besides its continuation, and the numbers that come
pooling.py      PoolingEngine: texts become vectors and scores, alone or beside generation
whole.py        a decoder over whole texts, without a cache
pooler.py       from hidden states to vectors and scores
embedding.py    LLM's embed, classify and score
wire.py         frames to an engine in a process of its own, and a Request on its way there
kinds.py        what an engine is to be for a checkpoint: generating, pooling
vectors.py      what may be asked of a text besides its continuation, and the numbers that come
pooling.py      PoolingEngine: texts become vectors and scores, alone or beside generation
whole.py        a decoder over whole texts, without a cache
pooler.py       from hidden states to vectors and scores
embedding.py    LLM's embed, classify and score
defaults.py     what a checkpoint asks of its sampler
around.py       what the settings want around an engine
engine.py       Engine: submit, abort, step, load_weights, sleep
llm.py          LLM: texts in, texts out, in this process
"""
