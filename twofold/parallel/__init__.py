"""Many processes acting as one: who they are, how they are laid out, and what they say to each other.

comm.py       collectives that autograd goes through
compress.py   narrow numbers on the wire, for what FSDP2 gathers and reduces
config.py     ParallelConfig: the sizes of the axes, free of torch
expert.py     experts on several ranks: tokens go to them and come back
launching.py  files that start a run on many machines: Slurm, Kubernetes, ssh
layout.py     Layout: which rank stands where, and whether that is legal; plain Python
mesh.py       Mesh: the process groups of a layout
messages.py   what ranks tell each other as JSON
ranks.py      Ranks: who this process is, from what its launcher left in the environment; joining the others
"""

from .config import ParallelConfig
from .layout import Layout
from .mesh import Mesh
from .ranks import Ranks, discover, joined

__all__ = ["Layout", "Mesh", "ParallelConfig", "Ranks", "discover", "joined"]
