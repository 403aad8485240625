"""Files that are kept, and batches: many requests in one file, answered when there is nothing more urgent to do.

    upload ──▶ files/ ──▶ batch: lines ──▶ asked of this server itself ──▶ output and error files

multipart.py  a form with a file, read strictly and as it comes
files.py      the files: bounded, on disk, each owner's his own
lines.py      a batch's lines: checked, indexed, and which of them are done already
job.py        one batch, from its lines to its files
inside.py     a request that the server asks itself
offline.py    a file of requests answered without a server
desk.py       which batches run, and when they give way
shapes.py     what clients are told
routes.py     the routes of both
"""

from .desk import Desk
from .files import Files
from .inside import Inside
from .routes import Batches

__all__ = ["Batches", "Desk", "Files", "Inside"]
