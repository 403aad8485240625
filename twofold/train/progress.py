"""The line that moves while a run does: step, loss, rate, speed, memory, time left; plain lines when nobody watches.

step 1200/4000 ━━━━━━━╸━━━━━━━━━━━━━━━  loss 2.113  lr 8.1e-04  grad 0.71  31.2k tok/s  41% of peak  2.1 GB  12:40 left
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_EVERY = 20
"""Without a terminal a line is printed this many times over the run, and at every message."""


class Display:
    """A progress bar on a terminal, a few plain lines elsewhere."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.steps = steps
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            auto_refresh=False,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, figures="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A message of its own, above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        speed: float,
        seconds_left: float,
        peak_share: float | None = None,
        memory: int | None = None,
        more: str = "",
    ) -> None:
        """Move to `step`, the number of steps done; `peak_share` of the machine's matmul peak, `memory` in bytes.

        `more` stands behind the loss.
        """
        peak = "" if peak_share is None else f"  {peak_share:.0%} of peak"
        used = "" if memory is None else f"  {memory / 1e9:.1f} GB"
        figures = (
            f"loss {loss:.3f}  {more}{more and '  '}lr {lr:.1e}  grad {grad_norm:.2f}  {_thousands(speed)} tok/s"
            f"{peak}{used}  {clock(seconds_left)} left"
        )
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step, figures=figures)
            self._bar.refresh()
        elif step % max(1, self.steps // PLAIN_EVERY) == 0 or step == self.steps:
            self.say(f"step {step}/{self.steps}  {figures}")


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def _thousands(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
