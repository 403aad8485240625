"""Judgements become weights.

estimates.py   pass@k, and intervals for rates, means and differences
task.py        a task file: prompts, what judges the answers, and what counts as passing
evaluate.py    a rollout with no update: ask, judge, and learn nothing
scores.py      an evaluation as figures: the record for the terminal, the card and the page
episode.py     Prompt, Rollout, Group: what is asked, and what came of it
"""
