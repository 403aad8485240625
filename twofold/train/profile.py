"""Where a step's work, time and memory go, module by module (`twofold train recipe.toml --profile`).

    step 1, 2    as always, so that everything is built and warm
    step 3       weighed: what is alive between forward and backward, and which module made it
    steps 4 to 6 timed: one clock, which at every moment runs for one module and one phase

The clock changes hands when a module is entered or left, when an op is called, and when the gradient of an op is due,
so all parts add up to the step. What runs between the gradients of two ops (additions, sums into a weight's gradient)
counts for the first of them. FLOPs are counted from shapes (`kernels/flops.py`), those of backward when it runs.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..kernels import flops
from ..kernels.op import Op, watch
from ..models.decoder import Decoder
from .collectives import CommProfile, main
from .live import Live
from .profile_tree import ROOT, Node, grouped, table
from .zero import local

WARM, TIMED = 2, 3
FILE = "profile.json"

Phase = Literal["forward", "backward", "again", "rest"]


class Clock:
    """Seconds for each (module, phase); it always runs for one of them."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[tuple[str, Phase], float] = defaultdict(float)
        self.at: tuple[str, Phase] = (ROOT, "rest")
        self._cuda = device.type == "cuda"
        self._since = 0.0

    def start(self) -> None:
        """Run from now on."""
        self.at, self._since = (ROOT, "rest"), self._now()

    def move(self, path: str, phase: Phase) -> tuple[str, Phase]:
        """Run for another one; returns the one it ran for."""
        now, before = self._now(), self.at
        self.seconds[before] += now - self._since
        self.at, self._since = (path, phase), now
        return before

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()  # else it would time how fast kernels are asked for
        return time.perf_counter()


class Tracer:
    """Follows a step of a decoder: which module is at work, in which phase, and what it costs."""

    def __init__(self, decoder: Decoder) -> None:
        self.clock = Clock(next(decoder.parameters()).device)
        self.flops: Counter[tuple[str, Phase]] = Counter()
        self.held: Counter[str] | None = None
        self._live: Live | None = None
        self._names = {module: f"decoder.{name}".rstrip(".") for name, module in decoder.named_modules()}
        self._leaves = {name for module, name in self._names.items() if not list(module.children())}
        self._decoder, self._module, self._within = decoder, ROOT, False
        self._callers: list[tuple[str, tuple[str, Phase]]] = []
        self._before: tuple[str, tuple[str, Phase]] | None = None  # where backward took over

    @contextmanager
    def entered(self, live: Live | None = None) -> Iterator[None]:
        """Follow what happens inside; with `live` also weigh what waits for the first backward pass."""
        self._live = live
        with ExitStack() as stack:
            for module in self._names:
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(watch(self._called, everywhere=True))
            if live is not None:
                stack.enter_context(live)
            self.clock.start()
            yield
            self.clock.move(ROOT, "rest")

    def who(self) -> str:
        """The module or op at work."""
        return self.clock.at[0]

    def _enter(self, module: nn.Module, args: Any) -> None:
        name, phase = self._names[module], self._phase()
        self._callers.append((self._module, self.clock.move(name, phase)))
        self._module = name

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self._module, before = self._callers.pop()
        self.clock.move(*before)

    def _called(self, op: Op[..., Any], args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        if self._within:  # an op that is made of others counts whole
            return call()
        forward, backward = flops.of(op, args)
        alone = self._module in self._leaves
        path, owner = self._module if alone else f"{self._module}.{op.name}".lstrip("."), self._module
        owner = owner.rpartition(".")[0] if alone else owner
        phase, self._within = self._phase(), True
        before = self.clock.move(path, phase)
        try:
            out = call()
        finally:
            self._within = False
            self.clock.move(*before)
        self.flops[path, phase] += forward
        if phase == "forward":
            first = out[0] if isinstance(out, tuple) else out
            flops.when_due(first, lambda: self._due(path, owner, backward))
        return out

    def _due(self, path: str, owner: str, backward: int) -> None:
        """The gradient of an op comes next; what is run again for it belongs to `owner`."""
        if self._before is None:
            self._weigh()
            self._before = self._module, self.clock.at
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_done)
        self.clock.move(path, "backward")
        self._module = owner
        self.flops[path, "backward"] += backward

    def _backward_done(self) -> None:
        assert self._before is not None
        self._module, at = self._before
        self._before = None
        self.clock.move(*at)

    def _weigh(self) -> None:
        """What the decoder holds when the first backward pass begins; gathered weights are no activations."""
        if self._live is not None and self.held is None:
            alive = self._live.bytes(without=map(local, self._decoder.parameters()))
            self.held = Counter({path: size for path, size in alive.items() if path.startswith("decoder")})

    @staticmethod
    def _phase() -> Phase:
        return "again" if flops.in_backward() else "forward"


class Profile:
    """Goes around the trainer's steps; after the last one that it wants it says the table and writes `profile.json`."""

    def __init__(self, decoder: Decoder, folder: Path, say: Callable[[str], None]) -> None:
        self._decoder, self._folder, self._say = decoder, folder, say
        self._seen = 0
        self._tracer = Tracer(decoder)
        self._held: Counter[str] = Counter()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """One step of the trainer is done inside."""
        self._seen += 1
        if self._seen == WARM + 1:
            tracer = Tracer(self._decoder)
            with tracer.entered(Live(map(local, self._decoder.parameters()), tracer.who)):
                yield
            self._held = tracer.held or self._held
        elif WARM + 1 < self._seen <= WARM + 1 + TIMED:
            with self._tracer.entered():
                yield
            if self._seen == WARM + 1 + TIMED and main():
                self._report()
        else:
            yield

    def _report(self) -> None:
        tree = self.tree()
        layers = {f"decoder.layers.{i}": layer for i, layer in enumerate(self._decoder.spec.layers)}
        path = self._folder / FILE
        path.write_text(json.dumps({"steps": TIMED, "tree": tree.plain()}, indent=1) + "\n", encoding="utf-8")
        self._say(f"one step, the mean of {TIMED}; layers alike are summed, every one by itself is in {path}")
        self._say(table(grouped(tree, layers)))

    def tree(self) -> Node:
        """All that was found, of one step."""
        root, tracer = Node(ROOT), self._tracer
        for (path, phase), seconds in tracer.clock.seconds.items():
            root.at(path).seconds[phase] += seconds / TIMED
        for (path, phase), count in tracer.flops.items():
            root.at(path).flops[phase] += count // TIMED
        for path, held in self._held.items():
            root.at(path).held += held
        for name, parameter in self._decoder.named_parameters():
            root.at(f"decoder.{name}".rpartition(".")[0]).parameters += parameter.numel()
        return root


def around(
    profiles: Collection[str], decoder: Decoder, folder: Path, say: Callable[[str], None]
) -> Callable[[], AbstractContextManager[None]]:
    """What goes around each step of a trainer, for those of "modules" and "collectives" that are asked for."""
    watchers: list[Callable[[], AbstractContextManager[None]]] = []
    if "modules" in profiles:
        watchers.append(Profile(decoder, folder, say))
    if "collectives" in profiles:
        watchers.append(CommProfile(folder, say))

    @contextmanager
    def together() -> Iterator[None]:
        with ExitStack() as stack:
            for watcher in watchers:
                stack.enter_context(watcher())
            yield

    return together
