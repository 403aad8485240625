"""Judgements become weights.

episode.py     Prompt, Rollout, Group: what is asked, and what came of it
"""
