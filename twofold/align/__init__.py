"""Judgements become weights.

episode.py     Prompt, Rollout, Group: what is asked, and what came of it
"""From demonstrations to a policy trained by reinforcement: the formulas of alignment and what runs them.

advantage.py          how much better a token or an answer was than expected: GAE, groups, leave-one-out
aggregate.py          many tokens' losses to one number that no split of the batch changes
correction.py         weights for tokens that another policy than the trained one has made
kl.py                 how far the policy has gone from its reference, and the coefficient that holds it there
policy.py             the losses of policies and of values: PPO, GRPO, DAPO, GSPO, CISPO
policy_config.py      the tables of PPO, GRPO with its variants, and of corrections
preference.py         the losses of preferences: reward models, DPO, IPO, KTO, ORPO, SimPO
preference_config.py  the tables of reward models and of DPO with its variants
scorer.py      RewardModel: what a score head says of whole texts
rollout.py     n samples of each prompt from the engine, as groups that come when they are finished
turns.py       what a tool says, as ids behind a turn of the model
"""
