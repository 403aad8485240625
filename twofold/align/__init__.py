"""Judgements become weights.

episode.py     Prompt, Rollout, Group: what is asked, and what came of it
rollout.py     n samples of each prompt from the engine, as groups that come when they are finished
turns.py       what a tool says, as ids behind a turn of the model
sync.py        the engine on the trainer's own weights: nothing is copied, or gathered for as long as it is awake
buckets.py     named tensors as a few flat runs of bytes
gather.py      the weights that ranks hold between them, one tensor at a time
remote_config.py  RemoteConfig: how a generator is started, and how weights come to it
remote.py      RemoteEngine: an engine with weights of its own in a child process, by the same five verbs
child.py       that process as its trainer sees it: signs of life, last words
wire.py        what the two say to each other
channel.py     how a bucket gets across: shared memory, or gloo
generator.py   the process: steps on while new weights come
ahead.py       rollouts of the next step while the trainer works on this one
ledger.py      who holds how many bytes, phase by phase
"""
