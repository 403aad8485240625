"""Engine: DeepSpeed's verbs over FSDP2: forward, backward, step, and checkpoints.

loss = engine(batch)            gathers a block's weights as it comes to it
engine.backward(loss)           loss / micro-batches · scale; gradients added up over ranks, by the stage
engine.step()                   at the end of a step: norm ─▶ clip, average, unscale in one factor ─▶ masters move
                                                        └─▶ not finite: nothing moves, on any rank
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...core import ConfigError, StateError
from ...parallel import Mesh, Ranks
from ...parallel.messages import everyone
from ..pieces import Stored
from ..scaler import LossScaler
from ..zero import Zero
from . import checkpoint
from .config import DeepSpeedConfig
from .masters import Masters
from .monitor import Monitor
from .optimizer import RuleOptimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PHASES = ("forward", "backward", "step")


class Scheduling(Protocol):
    """A learning-rate schedule, Twofold's or a client's."""

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class Engine:
    """A module in training. Made by `twofold.initialize`; every rank makes the same calls."""

    def __init__(
        self,
        module: nn.Module,
        config: DeepSpeedConfig,
        mesh: Mesh,
        zero: Zero[nn.Module],
        masters: Masters,
        *,
        ranks: Ranks,
        device: torch.device,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Scheduling | None = None,
    ) -> None:
        self.module, self.config, self.mesh, self.device = module, config, mesh, device
        self.zero, self.masters = zero, masters
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.training_dataloader: Any = None
        self.scaler = LossScaler(config.fp16)
        self.monitor = Monitor(*((config.csv, config.tensorboard) if mesh.main else (None, None)))
        self.global_rank, self.local_rank, self.world_size = ranks.rank, ranks.local_rank, ranks.world
        self.dp_world_size = mesh.size("data")
        self.global_steps = self.micro_steps = self.global_samples = self.skipped_steps = 0
        self._boundary: bool | None = None if config.managed else False
        self._unsynced = self._applied = False
        self._norm: float | None = None
        self._loss: Tensor | None = None
        self._seconds = dict.fromkeys(PHASES, 0.0)

    # ---------------------------------------------------------------------------------------- the three verbs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward; what it needs is gathered on the way."""
        with ExitStack() as stack:
            stack.enter_context(self._timed("forward"))
            if self.config.host_activations:
                stack.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda"))
            if self.config.autocast:
                stack.enter_context(torch.autocast(self.device.type, getattr(torch, self.config.autocast)))
            if self.config.cast_inputs:
                args, kwargs = self._cast(args), self._cast(kwargs)
            return self.module(*args, **kwargs)

    forward = __call__

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Add a micro-batch's gradients; the loss that it counted as, of all micro-batches one part."""
        if loss.numel() != 1:
            raise ConfigError(
                f"engine.backward takes a loss of one number, not of shape {list(loss.shape)}: take its mean"
            )
        if scale_wrt_gas:
            loss = loss / self.config.accumulation
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        with self._timed("backward"):
            self.zero.micro_batch(last=self.is_gradient_accumulation_boundary() and not self._unsynced)
            scaled = loss.float() * self.scaler.scale
            torch.autograd.backward(scaled, retain_graph=retain_graph)
            self.masters.collect()
        return loss

    def step(self) -> None:
        """After each backward; at the last micro-batch of a step the weights move."""
        if self._unsynced:
            raise StateError(
                "engine.step() inside of no_sync(): leave it first, with a backward behind it that is reduced"
            )
        with self._timed("step"):
            last = self.is_gradient_accumulation_boundary()
            if last:
                self._move()
        self.micro_steps += 1
        self.global_samples += self.config.micro_batch * self.dp_world_size
        if last:
            self._report()

    def _move(self) -> None:
        if self.optimizer is None:
            raise ConfigError(
                "there is no optimizer: set optimizer.type in the ds_config, or initialize(optimizer=...)"
            )
        self.zero.settle()
        times = self.scaler.scale * (self.dp_world_size if self.config.mean else 1)
        norm = self._norm = self.masters.deliver() / times
        self._applied = math.isfinite(norm)
        if self._applied:
            clipped = min(1.0, self.config.clip / (norm + 1e-6)) if self.config.clip else 1.0
            self._update(clipped / times)
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
        else:
            self.skipped_steps += 1
            self.say(f"step {self.global_steps + 1} skipped: the gradient is not finite ({self.skipped_steps} so far)")
        self.masters.zero()
        self.global_steps += 1
        self.scaler.update(None if self._applied else "the gradient is not finite")

    def _update(self, factor: float) -> None:
        """One step of the optimizer, gradients times `factor`."""
        assert self.optimizer is not None
        if isinstance(self.optimizer, RuleOptimizer):
            self.optimizer.step(scale=factor)
        else:
            grads = [master.grad for master in self.masters.params.values() if master.grad is not None]
            if grads and factor != 1.0:
                torch._foreach_mul_(grads, factor)
            self.optimizer.step()
        self.masters.written()

    # ---------------------------------------------------------------------------------------- where a step ends
    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the coming, or just made, backward is the last of its step."""
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self.config.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say so by hand from now on."""
        self._boundary = is_boundary

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients stay on this rank; the next backward outside reduces them all.

        Raises:
            ConfigError: stages 2 and 3, which keep no whole gradient.
        """
        if self.config.stage >= 2:
            raise ConfigError(f"no_sync() needs whole gradients, and ZeRO stage {self.config.stage} divides them")
        self._unsynced = True
        try:
            yield
        finally:
            self._unsynced = False

    # ---------------------------------------------------------------------------------------- checkpoints
    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write `save_dir`/`tag` (global_step<n>) on all ranks together, whole or not at all.

        Raises:
            CheckpointError: it could not be written, or `client_state` is not plain data; what was there stays.
        """
        self.zero.settle()
        tag = self._agreed(str(tag or f"global_step{self.global_steps}"))
        pieces, groups = (
            ({}, None) if self.optimizer is None else checkpoint.optimizer_state(self.optimizer, self.masters)
        )
        told = {
            "format": 1,
            "steps": {name: getattr(self, name) for name in _COUNTS},
            "optimizer": groups,
            "scaler": self.scaler.state(),
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "client_state": dict(client_state or {}),
        }
        told = {key: checkpoint.plain_json(key, value) for key, value in told.items()}
        weights = self._weights(not exclude_frozen_parameters)
        checkpoint.write(Path(save_dir), tag, self.mesh, weights, pieces, told, save_latest)
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on from a tag, or from the latest, whatever number of ranks wrote it: its path and the client's state.

        (None, None) where nothing was saved yet.

        Raises:
            CheckpointError: it is not there, damaged, or of another module; what is wrong is named.
        """
        self.zero.settle()
        place = checkpoint.find(Path(load_dir), None if tag is None else str(tag), self.mesh)
        if place is None:
            self.say(f"{load_dir} has no '{checkpoint.LATEST}': nothing is loaded")
            return None, None
        told = checkpoint.read_told(place)
        checkpoint.read_weights(place / checkpoint.MODEL, self._weights(True), load_module_strict)
        self.masters.written()
        if load_module_only:
            return str(place), told["client_state"]
        if load_optimizer_states and self.optimizer is not None and told["optimizer"] is not None:
            checkpoint.load_optimizer(self.optimizer, self.masters, Stored(place), told["optimizer"])
        if load_lr_scheduler_states and self.lr_scheduler is not None and told["lr_scheduler"] is not None:
            self.lr_scheduler.load_state_dict(told["lr_scheduler"])
        self.scaler.load(told["scaler"])
        for name in _COUNTS:
            setattr(self, name, told["steps"][name])
        return str(place), told["client_state"]

    def save_16bit_model(
        self, save_dir: str | Path, save_filename: str = checkpoint.MODEL, exclude_frozen_parameters: bool = False
    ) -> bool:
        """The weights alone, in the dtype that they are multiplied in; fp32 where nothing narrower is enabled."""
        if not save_filename.endswith(".safetensors"):
            raise ConfigError(f"save_16bit_model writes safetensors, not '{save_filename}': name it model.safetensors")
        self.zero.settle()
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        weights = self._weights(not exclude_frozen_parameters)
        checkpoint.write_weights(Path(save_dir) / save_filename, weights, self.mesh, DTYPES[self.config.dtype])
        return True

    def _weights(self, frozen: bool) -> dict[str, Tensor]:
        found = checkpoint.named_weights(self.module, frozen)
        return {name: self.masters.value(name, weight) for name, weight in found.items()}

    def _agreed(self, tag: str) -> str:
        """One tag for all ranks."""
        tags = everyone(tag, self.mesh.group("world"))
        if self.config.tags != "ignore" and len(set(tags)) > 1:
            text = f"ranks name different tags: {', '.join(sorted(set(tags)))}"
            if self.config.tags == "fail":
                raise ConfigError(f"{text}; checkpoint.tag_validation is Fail")
            self.say(f"{text}; '{tags[0]}' is taken")
        return str(tags[0])

    # ---------------------------------------------------------------------------------------- what one may ask
    def train(self, mode: bool = True) -> Engine:
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        return self.train(False)

    @property
    def training(self) -> bool:
        return self.module.training

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by; 1 but in fp16."""
        return self.scaler.scale

    cur_scale = loss_scale

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.module.parameters(recurse)

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters(prefix, recurse)

    def train_batch_size(self) -> int:
        return self.config.train_batch

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config.micro_batch

    def gradient_accumulation_steps(self) -> int:
        return self.config.accumulation

    def zero_optimization_stage(self) -> int:
        return self.config.stage

    def gradient_clipping(self) -> float:
        return self.config.clip

    def bfloat16_enabled(self) -> bool:
        return self.config.dtype == "bf16"

    def fp16_enabled(self) -> bool:
        return self.config.dtype == "fp16"

    def get_global_grad_norm(self) -> float | None:
        """Of the last step's averaged gradient, before it was clipped; None before the first."""
        return self._norm

    def get_lr(self) -> list[float]:
        """Each group's rate."""
        return [] if self.optimizer is None else [float(group["lr"]) for group in self.optimizer.param_groups]

    def was_step_applied(self) -> bool:
        """Whether the last step moved the weights."""
        return self._applied

    def zero_grad(self) -> None:
        """Let all gradients go."""
        self.masters.zero()

    # ---------------------------------------------------------------------------------------- what is told
    def say(self, text: str) -> None:
        """A line, from one rank for all."""
        if self.mesh.main:
            print(f"twofold: {text}", flush=True)

    def _report(self) -> None:
        """Monitors every step, a line every `steps_per_print`."""
        every, sinks = self.config.print_every, self.config.csv or self.config.tensorboard
        due = (every and self.global_steps % every == 0) or (self.config.clock and not every)
        if (sinks or due) and self._loss is not None:
            loss = self.mesh.sum("data", float(self._loss))[0] / self.dp_world_size
            if sinks:
                values = {"train_loss": loss, "lr": self.get_lr()[0]}
                values |= {"loss_scale": self.loss_scale} if self.config.fp16 else {}
                self.monitor.write(self.global_samples, {f"Train/Samples/{k}": v for k, v in values.items()})
            if due:
                clock = "".join(f", {phase} {1e3 * self._seconds[phase]:.1f} ms" for phase in PHASES)
                self.say(
                    f"step {self.global_steps}, skipped {self.skipped_steps}, loss {loss:.4f}, lr {self.get_lr()}, "
                    f"gradient norm {self._norm:.4g}{clock if self.config.clock else ''}"
                )
        self._loss, self._seconds = None, dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.config.clock:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self._seconds[phase] += time.perf_counter() - began

    def _cast(self, value: Any) -> Any:
        """Floating tensors in it as the weights are."""
        if isinstance(value, Tensor):
            return value.to(DTYPES[self.config.dtype]) if value.is_floating_point() else value
        if isinstance(value, Mapping):
            return {key: self._cast(item) for key, item in value.items()}
        return type(value)(map(self._cast, value)) if isinstance(value, list | tuple) else value


_COUNTS = ("global_steps", "micro_steps", "global_samples", "skipped_steps")
