"""OpenAI's Responses API over the same chats: answers that are kept, continued, run in the background and cancelled.

    body ──▶ items (as a chat) ──▶ the chat's deltas ──▶ Builder (items and events) ──▶ answer | events | store

shapes.py   requests, items and answers
items.py    what was sent as the messages of a chat
builder.py  what the model says as output items and the events that tell of them
store.py    the answers that are kept: bounded, and each owner's his own
running.py  one answer on its way: who writes it, who reads it, who stops it
routes.py   the routes
"""

from .routes import Responses
from .store import Store

__all__ = ["Responses", "Store"]
