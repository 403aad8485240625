"""What an answer says: content, reasoning and calls, told while its text arrives.

form.py      the language of the tables: states, marks, what is read between them
forms.py     the tables, one a family, by name
cursor.py    the text, the place, and what has been told: the events
listener.py  the machine that runs any table
jsons.py     JSON while it arrives
pythons.py   calls written as Python, told as JSON
values.py    parameters written one by one
manner.py    which tables a checkpoint speaks by
"""

from .cursor import Argued, Called, Event, Said, Thought
from .form import Form, Thoughts, Writing
from .forms import FORMS, PROMPT_MARKS, THOUGHTS
from .listener import Heard, Listener
from .manner import Manner

__all__ = [
    "FORMS",
    "PROMPT_MARKS",
    "THOUGHTS",
    "Argued",
    "Called",
    "Event",
    "Form",
    "Heard",
    "Listener",
    "Manner",
    "Said",
    "Thought",
    "Thoughts",
    "Writing",
]
