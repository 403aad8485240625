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
    enforced: bool = False
    """Whether a grammar makes the calls, in the form that has one."""

    @property
    def marks(self) -> Mapping[int, str]:
        """The tokens that stay in the text so that the listener sees them."""
        return self._speaker.kept(calls=bool(self.tools))

    @property
    def _speaker(self) -> Manner:
        return self.manner.forced[0] if self.enforced else self.manner

    def listener(self) -> Listener:
        given: Any = self.tools.given if self.tools else None
        return self._speaker.listen(tools=given, start=self.start, most=self.tools.most)


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
