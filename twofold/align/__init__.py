"""Judgements become weights: from demonstrations to a policy trained by reinforcement.

algorithms, each a module that reads as its paper
  reward.py             reward models, from pairs (Bradley-Terry)
  dpo.py                DPO and its relatives, from pairs or labelled answers
  grpo.py               GRPO and its variants, from rewards of groups of answers
  ppo.py                PPO, from rewards and a value
what they are made of
  aggregate.py          many tokens' losses to one number that no split of the batch changes
  advantage.py          how much better a token or an answer was than expected: GAE, groups, leave-one-out
  policy.py             the losses of policies and of values: PPO, GRPO, DAPO, GSPO, CISPO
  policy_config.py      the tables of PPO, GRPO with its variants, and of corrections
  preference.py         the losses of preferences: reward models, DPO, IPO, KTO, ORPO, SimPO
  preference_config.py  the tables of reward models and of DPO with its variants
  kl.py                 how far the policy has gone from its reference, and the coefficient that holds it there
  correction.py         weights for tokens that another policy than the trained one has made
rollouts
  episode.py            Prompt, Rollout, Group: what is asked, and what came of it
  rollout.py            n samples of each prompt from the engine, as groups that come when they are finished
  rollout_config.py     how the policy is sampled while it learns
  turns.py              what a tool says, as ids behind a turn of the model
  speech.py             how a model is spoken to: prompts from texts, messages and rows
  stops.py              whether a stop string may just have been completed
  experience.py         prompts to judged rollouts, each rank its share, all of it on every rank
  play.py               the policy in training, served by an engine on its own weights
  apart.py              the same by an engine in a process of its own: quantized, or a step ahead
runs
  config.py             the recipe: what train's has, an algorithm, and how answers are judged
  launch.py             alignment as a course of the trainer
  run.py                align(): the same from Python, with rows and functions of the caller's
  judged.py             an objective over whole sequences: every target of a micro-batch at once
  pairwise.py           what runs that learn from pairs have in common
  reference.py          the policy that another is held to
  update.py             a batch of judged rollouts as optimizer steps
  average.py            a moving average of the policy's weights
rewards/                what judges answers: functions, models, endpoints, tests
  scorer.py             RewardModel: what a score head says of whole texts
evaluation
  task.py               a task file: prompts, what judges the answers, and what counts as passing
  evaluate.py           a rollout with no update: ask, judge, and learn nothing
  estimates.py          pass@k, and intervals for rates, means and differences
  scores.py             an evaluation as figures: the record for the terminal, the card and the page
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
