"""What the longer commands do and say; `cli.py` is the one door to them.

align.py       a policy judged and improved, any key of the recipe a flag
bench.py       finds and runs the benchmarks
bytes.py       bytes, as people read them
chat.py        a conversation in the terminal, in this process or through a server
checkpoint.py  a run's checkpoints: proved whole, listed, made plain models
doctor.py      what this machine offers, what is missing, and what that costs
evaluate.py    a model or a server on a task file, and against another one
explain.py     where a request's time went, in words
flags.py       command lines read from settings dataclasses, wrong names refused with the nearest
generate.py    a prompt continued as the checkpoint says
kernels.py     every op, and which implementation serves it here
launch.py      the file that starts a run on many machines
model.py       where the bundled model lies, and a model opened for a command
plan.py        what a model needs and what fits, before it is loaded
quantize.py    a checkpoint rounded to int8 or int4, and what it costs
remote.py      a server with an OpenAI-compatible API, as commands speak to it
run_batch.py   a file of requests answered without a server
train.py       a recipe run, its samples spoken by the serving engine
train_plan.py  what a rank of a run would hold and send, how long it takes, what would make it fit
"""
