"""Judgements become weights.

episode.py     Prompt, Rollout, Group: what is asked, and what came of it
scorer.py      RewardModel: what a score head says of whole texts
"""
