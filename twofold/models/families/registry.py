"""The table of families: an architecture's name to the function that turns its config.json into a ModelSpec."""

from __future__ import annotations

from collections.abc import Callable

from ...core.registry import Registry
from ..reader import Reader
from ..spec import ModelSpec

Family = Callable[[Reader], ModelSpec]

FAMILIES: Registry[Family] = Registry("architecture")
family = FAMILIES.register

ENCODERS: Registry[Family] = Registry("encoder")
"""Those whose tokens see what comes after them: no language head, and a score head only where the name says so."""
encoder = ENCODERS.register

HEADLESS: Registry[Family] = Registry("draft head")
"""Those that guess for another model, with its embedding and its head."""
headless = HEADLESS.register
