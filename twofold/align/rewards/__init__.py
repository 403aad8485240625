"""What a completion is worth: functions, models and endpoints that judge, each where it can hurt nothing.

config.py      RewardConfig: one table of `[[rewards]]`
panel.py       Panel: all rewards of a run at work at the same time; Judgement: what they said
process.py     one reward's process as the panel sees it: asked, timed, killed, started again
worker.py      the process itself
wire.py        the messages between the two, and what may be called a reward
scorers.py     a config as a function that scores a batch
function.py    a Python function from a file or a module, in TRL's, verl's or OpenRLHF's shape
endpoint.py    an HTTP endpoint
builtin.py     regex, length, equals, json_schema, python_parses
extract.py     text, code and JSON out of a completion
passes.py      python_passes_tests: one court for each completion
court/         where a candidate's code meets its tests
"""

from typing import TYPE_CHECKING, Any

from .config import RewardConfig

if TYPE_CHECKING:
    from .panel import Judgement, Panel, RewardModel

__all__ = ["Judgement", "Panel", "RewardConfig", "RewardModel"]


def __getattr__(name: str) -> Any:
    if name in ("Judgement", "Panel", "RewardModel"):
        from . import panel

        return getattr(panel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
