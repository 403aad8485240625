"""The tables of PPO, of GRPO with its variants, and of off-policy corrections; no torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..core import ConfigError

CHOSEN: Any = None
"""The default of a field that, left out, another field's value decides; `__post_init__` puts that in."""

GRPO: dict[str, Any] = {
    "loss": "clip",
    "baseline": "group",
    "scale": "group",
    "aggregate": "sequence",
    "ratio": "token",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dynamic_sampling": False,
    "mask_truncated": False,
}
"""The fields of GrpoConfig that a variant decides, as GRPO has them."""
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"scale": "none", "aggregate": "constant"},
    "dapo": {"aggregate": "token", "clip_high": 0.28, "dynamic_sampling": True, "mask_truncated": True},
    "rloo": {"baseline": "leave_one_out", "scale": "none", "ratio": "trajectory"},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"loss": "cispo", "aggregate": "token", "clip_low": 1.0, "clip_high": 4.0},
    "reinforce": {"baseline": "whiten", "scale": "none", "aggregate": "token"},
}
"""What each variant sets otherwise than GRPO."""


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """`[grpo]`: policy gradients whose baseline is the other answers to the same prompt (Shao et al. 2024)."""

    variant: Literal["grpo", "dr_grpo", "dapo", "rloo", "gspo", "cispo", "reinforce"] = "grpo"
    """Chooses the fields that are left out. dr_grpo: Liu et al. 2025; dapo: Yu et al. 2025; rloo: Ahmadian et al.
    2024; gspo: Zheng et al. 2025; cispo: MiniMax-M1 2025; reinforce: REINFORCE++ with a baseline, Hu 2025."""
    group: int = 8
    """Answers to each prompt."""
    loss: Literal["clip", "cispo"] = CHOSEN
    """clip: PPO's, which stops gradients; cispo: stops importance weights, every token keeps its gradient."""
    baseline: Literal["group", "leave_one_out", "whiten"] = CHOSEN
    """What a reward is compared with. group: its group's mean; leave_one_out: the mean of the others; whiten: its
    group's mean, and the outcome whitened over the tokens of the batch (a group of one: only whitened)."""
    scale: Literal["group", "batch", "none"] = CHOSEN
    """Whose standard deviation divides the advantages of baseline = "group"."""
    aggregate: Literal["token", "sequence", "sequence_sum", "constant"] = CHOSEN
    """How tokens' losses become one; the table is in `align/aggregate.py`."""
    ratio: Literal["token", "sequence", "trajectory"] = CHOSEN
    """The level of importance sampling: a token's own ratio, the geometric mean of its answer, or the product."""
    clip_low: float = CHOSEN
    """A ratio below 1 - clip_low has no gradient where the advantage is negative (cispo: is raised to that)."""
    clip_high: float = CHOSEN
    """A ratio above 1 + clip_high has no gradient where the advantage is positive (cispo: is lowered to that)."""
    dual_clip: float | None = None
    """The loss of a token with a negative advantage is at most this many times it (Ye et al. 2020 take 3)."""
    dynamic_sampling: bool = CHOSEN
    """Groups of equal rewards are dropped and other prompts rolled out in their place, until the batch is full."""
    overlong_buffer: int = 0
    """Tokens before the longest answer over which a penalty grows to `overlong_penalty` (DAPO: a fifth of it)."""
    overlong_penalty: float = 1.0
    """What an answer of full length loses."""
    mask_truncated: bool = CHOSEN
    """Answers cut off at the longest length teach nothing."""
    length: int | None = None
    """What aggregate = "constant" divides by; None: the longest answer that the rollout allows."""
    beta: float = 0.0
    """Times the KL to the reference policy, in the loss. 0 needs no reference; GRPO's authors took 0.04."""
    kl: Literal["k2", "k3", "k3+"] = "k3"
    """Its estimator; the table is in `align/kl.py`."""
    kl_unbiased: bool = False
    """Weight it with the ratio, whose gradient makes that of k3 the KL's own (DeepSeek-V3.2)."""
    epochs: int = 1
    """How often a batch of answers is gone through."""
    minibatches: int = 1
    """Optimizer steps of each time through."""

    def __post_init__(self) -> None:
        _choose(self, GRPO | VARIANTS[self.variant])
        _at_least("grpo", self, {"group": 1, "epochs": 1, "minibatches": 1})
        _at_least("grpo", self, {"beta": 0, "overlong_buffer": 0, "overlong_penalty": 0})
        _check_clip("grpo", self.clip_low, self.clip_high, self.dual_clip)
        if self.length is not None and self.length < 1:
            raise ConfigError(f"grpo.length must be 1 or more, not {self.length}")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.group == 1 and (self.baseline != "whiten" or self.dynamic_sampling):
            raise ConfigError(
                "grpo.group = 1 leaves nothing to compare an answer with: "
                "ask for 2 or more, or for baseline = 'whiten' without dynamic_sampling"
            )
        if self.scale != "none" and self.baseline != "group":
            raise ConfigError(f"grpo.scale = '{self.scale}' needs baseline = 'group', not '{self.baseline}'")
        if self.ratio == "trajectory" and self.aggregate != "sequence":
            raise ConfigError(
                "grpo.ratio = 'trajectory' is one ratio for an answer, so it needs aggregate = 'sequence', "
                f"not '{self.aggregate}'"
            )
        if self.loss == "cispo" and self.dual_clip is not None:
            raise ConfigError("grpo.dual_clip bounds a clipped loss; loss = 'cispo' has none: leave one of them out")
        if self.kl_unbiased and not self.beta:
            raise ConfigError("grpo.kl_unbiased does nothing while grpo.beta is 0")
        if self.overlong_penalty != 1.0 and not self.overlong_buffer:
            raise ConfigError("grpo.overlong_penalty does nothing while grpo.overlong_buffer is 0")
        if self.length is not None and self.aggregate != "constant":
            raise ConfigError(f"grpo.length is for aggregate = 'constant', not '{self.aggregate}'")


@dataclass(frozen=True, kw_only=True)
class PpoConfig:
    """`[ppo]`: a policy and a value, clipped both (Schulman et al. 2017; Ouyang et al. 2022)."""

    gamma: float = 1.0
    """How much a reward one token later is worth."""
    lam: float = 0.95
    """GAE's λ: 0 trusts the value, 1 trusts what happened."""
    clip: float = 0.2
    """A ratio further from 1 than this has no gradient away from it."""
    dual_clip: float | None = None
    """The loss of a token with a negative advantage is at most this many times it (Ye et al. 2020 take 3)."""
    value_clip: float | None = 0.2
    """A value further from the old one than this learns nothing that takes it further."""
    value_coef: float = 0.1
    """Times half the squared error of the values, added to the policy's loss."""
    kl_coef: float = 0.05
    """Times the KL to the reference policy; 0 needs no reference."""
    kl_in: Literal["reward", "loss"] = "reward"
    """reward: each token pays for its own (Ouyang et al. 2022); loss: it has a gradient of its own."""
    kl: Literal["k1", "k2", "k3", "k3+"] = CHOSEN
    """Its estimator, the table is in `align/kl.py`; left out: k1 in the reward, k3 in the loss."""
    kl_target: float | None = None
    """A KL of an answer, in nats, that the coefficient is steered to (Ziegler et al. 2019 take 6)."""
    kl_horizon: float = 10_000.0
    """Answers over which it is steered."""
    whiten_advantages: bool = True
    """Advantages of the batch are given mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Tokens' rewards are given variance 1, their mean left."""
    missing_eos_penalty: float | None = None
    """What an answer that does not end by itself loses of its reward."""
    entropy_coef: float = 0.0
    """Times the entropy of each token's distribution, taken from the loss."""
    ema_decay: float | None = None
    """Keep a moving average of the policy's weights with this decay, and save it too (DeepSpeed-Chat takes 0.992)."""
    pretrain_coef: float = 0.0
    """Times the next-token loss on text of `data`, mixed in (PPO-ptx, Ouyang et al. 2022; DeepSpeed-Chat: 27.8)."""
    epochs: int = 4
    """How often a batch of answers is gone through."""
    minibatches: int = 1
    """Optimizer steps of each time through."""

    def __post_init__(self) -> None:
        _choose(self, {"kl": "k1" if self.kl_in == "reward" else "k3"})
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"ppo.{name} must be in [0, 1], not {getattr(self, name)}")
        _check_clip("ppo", self.clip, self.clip, self.dual_clip)
        _at_least("ppo", self, {"epochs": 1, "minibatches": 1, "kl_coef": 0, "value_coef": 0})
        _at_least("ppo", self, {"entropy_coef": 0, "pretrain_coef": 0, "missing_eos_penalty": 0})
        for name in ("value_clip", "kl_target", "kl_horizon"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ConfigError(f"ppo.{name} must be more than 0, not {getattr(self, name)}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ppo.ema_decay must be more than 0 and less than 1, not {self.ema_decay}")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.kl_in == "loss" and self.kl == "k1":
            raise ConfigError(
                "ppo.kl = 'k1' in a loss has a gradient of mean 0: take k3, k3+ or k2, or kl_in = 'reward'"
            )
        if self.kl_in == "reward" and self.kl == "k3+":
            raise ConfigError("ppo.kl = 'k3+' differs from 'k3' in its gradient, and a reward has none: take k3")
        if self.kl_target is not None and not self.kl_coef:
            raise ConfigError("ppo.kl_target steers ppo.kl_coef, which is 0: give a coefficient to start from")


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """`[correction]`: what is done about tokens that another policy than the trained one has made."""

    level: Literal["none", "token", "sequence", "geometric"] = "none"
    """Whose ratio of probabilities, trainer over rollout, weights a token: its own, the product over its answer, or
    the geometric mean. none: no weights; an on-policy rollout needs none."""
    action: Literal["truncate", "mask"] = "truncate"
    """Of weights outside [low, high]. truncate: they become the bound (TIS); mask: 0 (IcePop, MIS)."""
    low: float = 0.0
    """IcePop's authors take 0.5."""
    high: float = 2.0
    """TIS takes 2 to 3, IcePop 5."""
    reject_low: float | None = None
    """Answers whose geometric mean ratio is below this are masked as a whole, whatever the level."""
    reject_high: float | None = None
    """The same above this; 1.001 to 1.01 are usual."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1 <= self.high:
            raise ConfigError(f"correction: low <= 1 <= high must hold, low 0 or more, not {self.low} and {self.high}")
        low = 0.0 if self.reject_low is None else self.reject_low
        high = 1.0 if self.reject_high is None else self.reject_high
        if not 0 <= low <= 1 <= high:
            raise ConfigError(
                "correction: reject_low <= 1 <= reject_high must hold, reject_low 0 or more, "
                f"not {self.reject_low} and {self.reject_high}"
            )

    @property
    def plain(self) -> bool:
        """Whether every token counts, with weight 1."""
        return self.level == "none" and self.reject_low is None and self.reject_high is None


def _choose(config: object, values: dict[str, Any]) -> None:
    """Fill the fields that were left out, once, before anybody has seen the config."""
    for name, value in values.items():
        if getattr(config, name) is CHOSEN:
            object.__setattr__(config, name, value)


def _at_least(table: str, config: object, least: dict[str, float]) -> None:
    """Raises ConfigError for the first field below its least value; None is allowed."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise ConfigError(f"{table}.{name} must be {bound} or more, not {value}")


def _check_clip(table: str, low: float, high: float, dual: float | None) -> None:
    if not 0 < low <= 1:
        raise ConfigError(f"{table}: the lower clip must be more than 0 and at most 1, not {low}")
    if high <= 0:
        raise ConfigError(f"{table}: the upper clip must be more than 0, not {high}")
    if dual is not None and dual <= 1 + high:
        raise ConfigError(f"{table}.dual_clip must be more than 1 + the upper clip ({1 + high:g}), not {dual}")
