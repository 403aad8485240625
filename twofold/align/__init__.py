"""Judgements become weights.

episode.py     Prompt, Rollout, Group: what is asked, and what came of it
rollout.py     n samples of each prompt from the engine, as groups that come when they are finished
turns.py       what a tool says, as ids behind a turn of the model
sync.py        the engine on the trainer's own weights: nothing is copied, or gathered for as long as it is awake
ledger.py      who holds how many bytes, phase by phase
"""
