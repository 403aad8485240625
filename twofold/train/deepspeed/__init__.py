"""DeepSpeed's door: a ds_config and any nn.Module in, an engine with DeepSpeed's verbs out.

    from twofold.train import deepspeed     where a script has: import deepspeed

keys.py       every key of a ds_config, and what becomes of it
check.py      a ds_config as it was written, key by key
config.py     what it means here: DeepSpeedConfig
schedules.py  DeepSpeed's learning rates, as pure functions of the step
blocks.py     the repeated parts of a module
masters.py    fp32 weights, as an optimizer sees them
optimizer.py  Twofold's rules as a torch optimizer, and a client's own
checkpoint.py  DeepSpeed's directories without pickles
monitor.py    CSV files and TensorBoard's events
engine.py     Engine: forward, backward, step
door.py       initialize, and what scripts call before it
"""

from .config import DeepSpeedConfig, resolve
from .door import add_config_arguments, init_distributed, initialize
from .engine import Engine

__all__ = ["DeepSpeedConfig", "Engine", "add_config_arguments", "init_distributed", "initialize", "resolve"]
