"""Hearing: how the answers of one chat are listened to, from its template, its tools and its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core import RequestError
from ..data.speech import Listener, Manner
from .tools import Tools


@dataclass(frozen=True, kw_only=True)
class Hearing:
    """What each choice's listener is made of. `silent` keeps the reasoning from the client."""

    manner: Manner
    tools: Tools
    start: str = "start"
    silent: bool = False

    @property
    def marks(self) -> Mapping[int, str]:
        """The tokens that stay in the text so that the listener sees them."""
        return self.manner.kept(calls=bool(self.tools))

    def listener(self) -> Listener:
        given: Any = self.tools.given if self.tools else None
        return self.manner.listen(tools=given, start=self.start, most=self.tools.most, spelled=self.tools.forced)


def check(manner: Manner, tools: Tools, *, takes_tools: bool) -> None:
    """Whether this model can be given tools at all.

    Raises:
        RequestError: its template does not show them, or nobody knows how it calls them.
    """
    if not tools:
        return
    if not takes_tools:
        raise RequestError("this model's chat template takes no tools: describe them in a message", "tools")
    if manner.calls is None:
        raise RequestError(
            "how this model calls tools is not known: start the server with --tool-call-parser NAME", "tools"
        )
