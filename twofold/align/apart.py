"""Apart: rollouts by an engine in a process of its own, with weights of its own: quantized, or one step ahead.

    quantized    weights ─▶ rounded there ─▶ this step's rollouts ─▶ update
    overlap      update k ║ rollouts of step k + 1, by the weights before update k        (ahead.py)

Each rank has such a process, which rolls out the rank's share. What waits for the next step goes into the checkpoint
whole, so that a run goes on with the same bits, on any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import torch

from ..engine.config import EngineConfig
from ..models.weights import spec_from
from ..parallel.messages import everyone
from ..train.export import plain
from ..train.pieces import Held, Piece, Stored
from ..train.trainer import Trainer
from .ahead import Ahead
from .experience import Share
from .gather import gathered
from .remote import RemoteEngine
from .rollout_config import RolloutConfig

WAITING = "lesson.waiting"

Roll = Callable[[RemoteEngine, int], Share]
"""(engine, step) to this rank's judged rollouts."""


class Apart:
    """The process of this rank. Making one is a collective, and so is each of its verbs but `close`."""

    def __init__(
        self,
        config: RolloutConfig,
        trainer: Trainer,
        settings: EngineConfig,
        eos_ids: tuple[int, ...],
        roll: Roll,
        stored: Stored | None,
    ) -> None:
        """Start it, and take back what waits in `stored`, the checkpoint that the run goes on from."""
        self._dtype = trainer.zero.dtype
        _, model = plain(trainer, self._dtype)
        remote = config.remote
        if not remote.threads:
            remote = replace(remote, threads=trainer.recipe.run.threads)
        self._engine = RemoteEngine(model, settings, dtype=self._dtype, eos_ids=eos_ids, remote=remote)
        self._ahead: Ahead[Share] | None = None
        self._roll = roll
        if config.overlap:
            steps = trainer.recipe.schedule.steps
            self._ahead = Ahead(self._engine, lambda step: roll(self._engine, step), Share, steps=steps)
            if stored is not None and WAITING in stored.entries:
                self._ahead.restore(self._mine(stored, trainer))
            self._send(trainer)

    def take(self, trainer: Trainer) -> Share:
        """This rank's rollouts of the run's step, waiting for them."""
        step = trainer.position.step
        if self._ahead is not None:
            return self._ahead.take(step)
        pieces, model = plain(trainer, self._dtype)
        named = gathered(pieces, spec_from(model), self._dtype, trainer.mesh, range(trainer.mesh.size("world")))
        self._engine.load_weights(named, step + 1)
        return self._roll(self._engine, step)

    def learned(self, trainer: Trainer) -> None:
        """After an update: its weights go to the process while that rolls out with those before it."""
        if self._ahead is not None:
            self._send(trainer, after=1)

    def pieces(self, trainer: Trainer) -> dict[str, Piece]:
        """What waits for the next step, of all ranks, as bytes; it is waited for."""
        if self._ahead is None:
            return {}
        told = everyone(self._ahead.state(), trainer.mesh.group("data"))
        text = json.dumps(told if told[0] is not None else None).encode()
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {WAITING: Piece(Held.all(data.shape), data, data.dtype)}

    def close(self) -> None:
        """End the process, and what waits for it."""
        self._engine.close()
        if self._ahead is not None:
            self._ahead.close()

    def _send(self, trainer: Trainer, after: int = 0) -> None:
        assert self._ahead is not None
        pieces, model = plain(trainer, self._dtype)
        named = gathered(pieces, spec_from(model), self._dtype, trainer.mesh, range(trainer.mesh.size("world")))
        self._ahead.send(named, trainer.position.step + 1 + after)

    def _mine(self, stored: Stored, trainer: Trainer) -> dict[str, Any] | None:
        """This rank's share of what waited, however many ranks there were."""
        told = json.loads(bytes(stored.read(WAITING).tolist()))
        if told is None:
            return None
        mesh = trainer.mesh
        whole = [msgspec.convert(one["batch"], Share) for one in told]
        groups = sorted((it for one in whole for it in one.groups), key=lambda it: it.group.prompt.number)
        mine = [it for it in groups if it.group.prompt.number % mesh.size("data") == mesh.rank("data")]
        first = whole[mesh.rank("data")] if len(whole) == mesh.size("data") else Share(groups=[])
        share = replace(first, groups=mine, seconds=whole[0].seconds)
        return {"step": told[0]["step"], "batch": msgspec.to_builtins(share)}
