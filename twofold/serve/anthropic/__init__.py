"""Anthropic's Messages API over the same chats.

shapes.py  requests, answers and content blocks
blocks.py  what was sent as the messages of a chat
events.py  what the model says as content blocks and the events that tell of them
routes.py  the routes
"""

from .routes import Messages

__all__ = ["Messages"]
