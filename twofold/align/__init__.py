"""Judgements become weights.

episode.py     Prompt, Rollout, Group: what is asked, and what came of it
rollout.py     n samples of each prompt from the engine, as groups that come when they are finished
turns.py       what a tool says, as ids behind a turn of the model
"""
