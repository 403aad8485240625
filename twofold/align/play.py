"""Play: the policy in training, served by an engine on its own weights, and what its rollouts are worth.

    wake ─▶ weights gathered where ZeRO divides them ─▶ sync: nothing is copied ─▶ rollouts ─▶ sleep ─▶ rewards

The KV cache has its memory for as long as rollouts last; the trainer's step has it after.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import ConfigError, TwofoldError
from ..engine.capacity import forecast
from ..engine.config import EngineConfig
from ..engine.engine import Engine
from ..engine.sampling import SamplingParams
from ..models.decoder import Decoder
from ..parallel import Mesh
from ..platforms import free_on
from ..train.build import RecipeWords
from ..train.pieces import Piece, Stored
from ..train.trainer import Trainer
from .apart import Apart
from .episode import Group, Prompt
from .experience import Harvest, Share, Watch, gather, placed, seed_of, shared, valued
from .ledger import Ledger, of_engine, of_trainer
from .remote import RemoteEngine
from .rewards import Panel
from .rewards.function import load_function
from .rollout import Engine as Rolls
from .rollout import never, rollout
from .rollout_config import RolloutConfig
from .sync import Shared
from .turns import Turn, in_chat

TOLD = 5
"""Notes of reward functions that are said aloud; the rest are counted."""


class Play:
    """Rolls out and judges. `seed` is the run's, `longest` how many tokens a prompt may have."""

    def __init__(self, config: RolloutConfig, words: RecipeWords, panel: Panel, *, seed: int, longest: int) -> None:
        self.config, self.words, self.panel = config, words, panel
        self._seed, self._longest = seed, longest
        self._turn: Turn | None = load_function(config.turn) if config.turn else None
        if self._turn is not None and words.template is not None:
            self._turn = in_chat(self._turn)
        self._shared: Shared | None = None
        self._said: set[str] = set()
        self._apart: Apart | None = None
        self._stored: Stored | None = None
        self._ended = 0.0
        self._said_ledger = False
        self.ledger = Ledger()
        """Who holds what while rollouts last, and while the trainer steps."""

    def begin(self, trainer: Trainer, stored: Stored | None) -> None:
        """Before the first step of this process."""
        self._stored = stored
        of_trainer(self.ledger, trainer.zero, trainer.optimizer)
        of_engine(self.ledger, lambda: self._shared.engine if self._shared else None)

    @property
    def params(self) -> SamplingParams:
        """How the policy is sampled: what it is trained on is exactly what was drawn."""
        config = self.config
        return SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_tokens=config.max_tokens,
            stop=config.stop,
            logprobs=0,
            logprobs_mode="tempered",
            ignore_eos=config.ignore_eos,
        )

    def harvest(self, trainer: Trainer, prompts: Sequence[Prompt], n: int, round_: int = 0) -> Harvest:
        """`n` judged rollouts of each prompt, in order, on every rank; a collective. `round_` of one step's draws.

        Raises:
            GivenUp: a rank was asked to stop meanwhile.
        """
        seed = seed_of(self._seed, (trainer.position.step << 8) + round_)
        share = self._here(trainer, prompts, n, self.params, seed, until=lambda: trainer.stop.asked is not None)
        return self._told(trainer, share, prompts)

    def next(self, trainer: Trainer, prompts: Callable[[int], Sequence[Prompt]], n: int) -> Harvest:
        """As `harvest`, of the prompts of the run's step; where a process apart rolls out, it is asked."""
        step = trainer.position.step
        if not self.config.apart:
            return self.harvest(trainer, prompts(step), n)
        if self._apart is None:
            data = trainer.mesh
            # what is rolled out ahead is by weights that are gone when the run goes on: it is waited for
            until = never if self.config.overlap else lambda: trainer.stop.asked is not None
            roll = partial(self._there, prompts, n, data, until)
            settings = self._settings(trainer.decoder, n * math.ceil(len(prompts(step)) / data.size("data")))
            self._apart = Apart(self.config, trainer, settings, self.words.eos_ids, roll, self._stored)
        share = self._apart.take(trainer)
        return self._told(trainer, share, prompts(step))

    def look(self, trainer: Trainer, prompts: Sequence[Prompt]) -> Harvest:
        """One judged answer to each prompt, the likeliest: for held-out prompts, the same ones every time."""
        share = self._here(trainer, prompts, 1, self.params.with_(temperature=0.0), 0)
        return self._told(trainer, share, prompts)

    def _told(self, trainer: Trainer, share: Share, prompts: Sequence[Prompt]) -> Harvest:
        """Everyone's share, and what went wrong said once."""
        found = gather(share, placed(prompts), trainer.mesh)
        self._ended = time.perf_counter()
        for note in found.notes:
            if note not in self._said and len(self._said) < TOLD:
                self._said.add(note)
                trainer.display.say(f"reward: {note}")
        return found

    def _here(
        self,
        trainer: Trainer,
        prompts: Sequence[Prompt],
        n: int,
        params: SamplingParams,
        seed: int,
        until: Callable[[], bool] = never,
    ) -> Share:
        """This rank's share, by the engine on the trainer's own weights."""
        watch, mine = Watch(), shared(placed(prompts), trainer.mesh)
        if self._shared is None:
            most = math.ceil(len(prompts) / trainer.mesh.size("data"))
            self._shared = Shared(trainer.zero, self._settings(trainer.decoder, most * n), eos_ids=self.words.eos_ids)
        with torch.no_grad(), self._shared.awake(trainer.position.step + 1) as engine:
            before = _counters(engine)
            groups = self._groups(engine, mine, n, params, seed, until)
            counts = {name: value - before[name] for name, value in _counters(engine).items()}
            self.ledger.read("rollout")
        watch.lap("rollout")
        if until():
            return Share(groups=[], given_up=True)
        return valued(groups, self.panel, trainer.position.step, watch, counts)

    def _there(
        self,
        prompts: Callable[[int], Sequence[Prompt]],
        n: int,
        mesh: Mesh,
        until: Callable[[], bool],
        engine: RemoteEngine,
        step: int,
    ) -> Share:
        """This rank's share of a step, by the engine of a process apart."""
        watch, mine = Watch(), shared(placed(prompts(step)), mesh)
        groups = self._groups(engine, mine, n, self.params, seed_of(self._seed, step << 8), until)
        watch.lap("rollout")
        if until():
            return Share(groups=[], given_up=True)
        return valued(groups, self.panel, step, watch, {})

    def _groups(
        self,
        engine: Rolls,
        prompts: Sequence[Prompt],
        n: int,
        params: SamplingParams,
        seed: int,
        until: Callable[[], bool] = never,
    ) -> list[Group]:
        found = list(
            rollout(
                engine,
                prompts,
                n,
                params,
                seed=seed,
                words=self.words,
                turn=self._turn,
                max_turns=self.config.max_turns,
                max_total=self.config.max_tokens,
                until=until,
            )
        )
        failed = [it for group in found for it in group.rollouts if it.finish == "error"]
        if failed:
            raise TwofoldError(f"{len(failed)} rollouts ended with an error of the engine: {failed[0].error}")
        return sorted(found, key=lambda group: group.prompt.number)

    def _settings(self, decoder: Decoder, requests: int) -> EngineConfig:
        """The engine's dials: a cache that holds a step's rollouts at once, or what the machine can spare."""
        config = self.config
        longest = min(decoder.max_len, self._longest + config.max_tokens)
        settings = EngineConfig(
            max_model_len=longest,
            max_num_seqs=min(config.max_num_seqs, max(1, requests)),
            max_num_batched_tokens=max(config.max_num_batched_tokens, config.max_num_seqs),
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            quantization=config.quantization,
            kv_dtype=config.kv_dtype,
            device=str(decoder.device),
        )
        if config.num_blocks is not None:
            room, needed = config.num_blocks * config.block_size, -(-(longest - 1) // config.block_size)
            if config.num_blocks < needed:  # nobody reads the last token
                raise ConfigError(
                    f"rollout.num_blocks = {config.num_blocks} holds {room} tokens, and a prompt with its answer may "
                    f"have {longest}: give {needed} or more"
                )
            return settings
        wanted = requests * -(-longest // config.block_size)
        held: Any = str(decoder.dtype).removeprefix("torch.")
        spare = forecast(decoder.spec, replace(settings, dtype=held), free_on(str(decoder.device)), loaded=True)
        return replace(settings, num_blocks=min(wanted, spare.require().blocks))

    def updated(self, trainer: Trainer, figures: dict[str, float]) -> None:
        """After the optimizer's steps: note what they took, and who holds what now."""
        self.ledger.read("update")
        if not self._said_ledger:
            self._said_ledger = True
            trainer.display.say(self.ledger.table())
            trainer.journal.add(trainer.position.step + 1, ledger=self.ledger.record())
        figures["seconds_update"] = round(time.perf_counter() - self._ended, 3)

    def learned(self, trainer: Trainer) -> None:
        """After an update: its weights go to the process apart, if that is to have them before it is asked."""
        if self._apart is not None:
            self._apart.learned(trainer)

    def pieces(self, trainer: Trainer) -> dict[str, Piece]:
        """Rollouts that wait for the next step; a collective."""
        return self._apart.pieces(trainer) if self._apart is not None else {}

    def close(self) -> None:
        """End the processes of reward functions, and the one that rolls out."""
        self.panel.close()  # first: rollouts under way may be being judged
        if self._apart is not None:
            self._apart.close()


def together(harvests: Sequence[Harvest]) -> Harvest:
    """Several as one; groups are numbered on."""
    if len(harvests) == 1:
        return harvests[0]
    groups, at = list[Tensor](), 0
    for it in harvests:
        groups.append(it.group_N + at)
        at += int(it.group_N.max()) + 1 if len(it.group_N) else 0
    names = list(dict.fromkeys(name for it in harvests for name in it.parts))
    return Harvest(
        rollouts=tuple(one for it in harvests for one in it.rollouts),
        group_N=torch.cat(groups),
        rewards_N=torch.cat([it.rewards_N for it in harvests]),
        parts={name: [x for it in harvests for x in it.parts.get(name, [None] * len(it.rollouts))] for name in names},
        faults=_added([it.faults for it in harvests]),
        notes=tuple(note for it in harvests for note in it.notes),
        seconds=_added([it.seconds for it in harvests]),
        counts=_added([it.counts for it in harvests]),
    )


def chosen(harvest: Harvest, keep_N: Tensor) -> Harvest:
    """The rollouts that `keep_N` has True for; their groups keep their numbers."""
    places = keep_N.nonzero().squeeze(1).tolist()
    return replace(
        harvest,
        rollouts=tuple(harvest.rollouts[n] for n in places),
        group_N=harvest.group_N[keep_N],
        rewards_N=harvest.rewards_N[keep_N],
        parts={name: [values[n] for n in places] for name, values in harvest.parts.items()},
    )


def show(harvest: Harvest, advantage_N: Tensor, count: int) -> list[dict[str, Any]]:
    """The first rollouts of a step as the journal keeps them, groups side by side."""
    rows = []
    for n, it in enumerate(harvest.rollouts[:count]):
        reward = float(harvest.rewards_N[n])
        shown = it.prompt.shown if isinstance(it.prompt.shown, str) else it.prompt.shown[-1].get("content", "")
        rows.append(
            {
                "prompt": shown,
                "text": it.text,
                "group": int(harvest.group_N[n]),
                "reward": None if math.isnan(reward) else reward,
                "parts": {name: values[n] for name, values in harvest.parts.items()},
                "advantage": round(float(advantage_N[n]), 4),
                "finish": it.finish,
                "tokens": sum(it.mine),
            }
        )
    return rows


def _counters(engine: Engine) -> dict[str, float]:
    stats = engine.stats()
    counted = {
        "preemptions": stats.preemptions,
        "prompt_tokens": stats.prefix_queries,
        "cached_tokens": stats.prefix_hits,
    }
    return {name: float(value) for name, value in counted.items()}


def _added(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: sum(it.get(name, 0) for it in tables) for it in tables for name in it}
